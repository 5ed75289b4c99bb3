// The threads of a session of ONNX Runtime.
#pragma once

#include <algorithm>
#include <thread>

#include "operator.h"
#include "work.h"

namespace gma {

class SessionThreads : public Threads {
 public:
  explicit SessionThreads(const Ort::KernelContext& context) : context_(context) {}

  // The machine's, for ONNX Runtime does not say how many the session has.
  Index count() const override { return std::max<Index>(1, std::thread::hardware_concurrency()); }

  void run(Index count, void (*task)(void* data, size_t index), void* data) const override {
    const auto total = static_cast<size_t>(count);
    context_.ParallelFor(task, total, total, data);
  }

 private:
  const Ort::KernelContext& context_;
};

}  // namespace gma
