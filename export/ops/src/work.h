// What a kernel for the CPU works with: aligned memory, and the session's threads.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

#include "kernels.h"
#include "operator.h"

namespace gma {

struct Release {
  void operator()(float* memory) const { std::free(memory); }
};
using Floats = std::unique_ptr<float, Release>;

inline Floats floats(Index count) {
  const size_t bytes = static_cast<size_t>(rounded(std::max<Index>(count, 1), 16)) * sizeof(float);
  Floats memory(static_cast<float*>(std::aligned_alloc(64, bytes)));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

// task(index) for 0 <= index < count on the session's threads; what one throws is thrown here.
template <class Task>
void in_parallel(const Ort::KernelContext& context, Index count, const Task& task) {
  if (count <= 0) return;
  struct Shared {
    const Task& task;
    std::exception_ptr error;
    std::once_flag once;
  } shared{task, nullptr, {}};
  const auto run = [](void* data, size_t index) {
    Shared& all = *static_cast<Shared*>(data);
    try {
      all.task(static_cast<Index>(index));
    } catch (...) {
      std::call_once(all.once, [&] { all.error = std::current_exception(); });
    }
  };
  const auto total = static_cast<size_t>(count);
  context.ParallelFor(run, total, total, &shared);
  if (shared.error) std::rethrow_exception(shared.error);
}

// The machine's threads, for ONNX Runtime does not say how many the session has.
inline Index threads() { return std::max<Index>(1, std::thread::hardware_concurrency()); }

}  // namespace gma
