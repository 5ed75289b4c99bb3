// The kernels that the library carries, and the CUDA driver that launches them.
//
// The driver is opened when the first kernel is launched: where there is none the library loads.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "operator.h"

namespace gma::cuda {

struct Kernel {
  const char* key;   // what it is and was compiled for
  int architecture;  // compute capability, ten times
  const char* entry;
  const char* parameters;  // P: pointer to a multiple of 16 bytes, p: pointer, i: int32, f: float
  unsigned threads;
  unsigned shared;  // bytes
  const unsigned char* cubin;
  size_t size;
};

struct Function {
  CUfunction handle;
  const Kernel* kernel;
};

// The context that is current. Throws std::runtime_error if none is.
CUcontext current();

// The kernel with this key in the current context, loaded when first asked for. Throws Refused with
// `remedy` if the library carries none, or none for this device.
Function function(const std::string& key, const char* remedy);

struct Grid {
  int64_t x;
  int64_t y = 1;
  int64_t z = 1;
};

// Throws std::runtime_error with the driver's words. A grid without programs is no launch.
void launch(const Function& function, Grid grid, CUstream stream, void** parameters);

// Throws Refused for what 32 bits do not hold.
inline int32_t narrow(int64_t number) {
  require(number >= 0 && number <= std::numeric_limits<int32_t>::max(),
          "the step is too large for the kernels' indices");
  return static_cast<int32_t>(number);
}

template <class Argument>
bool fits(Argument argument, char parameter) {
  if constexpr (std::is_pointer_v<Argument>) {
    require(parameter != 'P' || reinterpret_cast<uintptr_t>(argument) % 16 == 0,
            "a tensor must begin at a multiple of 16 bytes");
    return parameter == 'p' || parameter == 'P';
  } else {
    static_assert(std::is_same_v<Argument, int32_t> || std::is_same_v<Argument, float>);
    return parameter == (std::is_same_v<Argument, float> ? 'f' : 'i');
  }
}

// Launches a kernel with these arguments: pointers, int32s and floats, in the kernel's order.
template <class... Arguments>
void launch(const Function& function, Grid grid, CUstream stream, Arguments... arguments) {
  const char* parameter = function.kernel->parameters;
  const bool each = ((*parameter != '\0' && fits(arguments, *parameter++)) && ...);
  if (!each || *parameter != '\0') {
    throw std::logic_error(std::string(function.kernel->key) + ": launched with other arguments");
  }
  CUdeviceptr scratch = 0;  // two that Triton's kernels take at the end, and these do not use
  void* addresses[] = {&arguments..., &scratch, &scratch};
  launch(function, grid, stream, static_cast<void**>(addresses));
}

}  // namespace gma::cuda
