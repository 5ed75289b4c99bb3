// What a kernel for the CPU works with: aligned memory, and the threads of whatever runtime calls
// it.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>

#include "kernels.h"

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

class Threads {
 public:
  virtual Index count() const = 0;
  // task(data, index) for 0 <= index < count, in any order, and returns when all have ended.
  virtual void run(Index count, void (*task)(void* data, size_t index), void* data) const = 0;

 protected:
  ~Threads() = default;
};

// task(index) for 0 <= index < count; what one throws is thrown here.
template <class Task>
void in_parallel(const Threads& threads, Index count, const Task& task) {
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
  threads.run(count, run, &shared);
  if (shared.error) std::rethrow_exception(shared.error);
}

}  // namespace gma
