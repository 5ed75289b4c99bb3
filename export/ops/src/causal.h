// CausalGMA and ForgettingGMA for the CPU: one scan over every head of every document.
#pragma once

#include "operator.h"

namespace gma {

class Mixer {
 public:
  Mixer(Ort::ConstKernelInfo info, bool forgets);
  void compute(Ort::KernelContext& context) const;

 private:
  bool normalize_, forgets_;
  float routing_epsilon_, epsilon_, most_;
};

struct CausalGMA : Mixer {
  explicit CausalGMA(Ort::ConstKernelInfo info) : Mixer(info, false) {}
};

struct ForgettingGMA : Mixer {
  explicit ForgettingGMA(Ort::ConstKernelInfo info) : Mixer(info, true) {}
};

}  // namespace gma
