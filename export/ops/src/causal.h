// CausalGMA for the CPU: one scan over every head of every document.
#pragma once

#include "operator.h"

namespace gma {

class CausalGMA {
 public:
  explicit CausalGMA(Ort::ConstKernelInfo info);
  void compute(Ort::KernelContext& context) const;

 private:
  bool normalize_;
  float routing_epsilon_, epsilon_;
};

}  // namespace gma
