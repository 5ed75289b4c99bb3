// A kernel's own memory on the device: from the session's arena, for the length of a call.
//
// What a stream still reads when it goes back to the arena is given out again in that stream's
// order.
#pragma once

#include <initializer_list>
#include <vector>

#include "operator.h"

namespace gma::cuda {

class Arena {
 public:
  explicit Arena(Ort::ConstKernelInfo info) {
    Ort::ThrowOnError(Ort::GetApi().KernelInfoGetAllocator(info, OrtMemTypeDefault, &allocator_));
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { Ort::GetApi().ReleaseAllocator(allocator_); }

  void* take(const Ort::KernelContext& context, size_t bytes) const {
    const OrtMemoryInfo* info = allocator_->Info(allocator_);
    void* memory = nullptr;
    Ort::ThrowOnError(Ort::GetApi().KernelContext_GetScratchBuffer(context.GetOrtKernelContext(),
                                                                   info, bytes, &memory));
    return memory;
  }

  void give_back(void* memory) const { allocator_->Free(allocator_, memory); }

 private:
  OrtAllocator* allocator_ = nullptr;
};

// Pieces of one allocation, each at a multiple of 256 bytes.
class Scratch {
 public:
  Scratch(const Arena& arena, const Ort::KernelContext& context,
          std::initializer_list<size_t> pieces)
      : arena_(arena) {
    size_t total = 0;
    for (const size_t bytes : pieces) {
      places_.push_back(total);
      total += (bytes + 255) / 256 * 256;
    }
    memory_ = static_cast<char*>(arena.take(context, total > 0 ? total : 256));
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { arena_.give_back(memory_); }

  void* operator[](size_t piece) const { return memory_ + places_[piece]; }

 private:
  const Arena& arena_;
  std::vector<size_t> places_;
  char* memory_;
};

}  // namespace gma::cuda
