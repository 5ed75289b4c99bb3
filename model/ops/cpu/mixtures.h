// The mixture of every head, packed as kernels take it.
#pragma once

#include <cstring>

#include "kernels.h"
#include "work.h"

namespace gma {

class Mixtures {
 public:
  // linear and quadratic (H, K, r), bias (H, K).
  Mixtures(const float* linear, const float* quadratic, const float* bias, Index heads,
           Index components, Index routing, bool normalize, float epsilon)
      : heads_(heads),
        one_{components, routing, nullptr, nullptr, normalize, epsilon},
        padded_(one_.padded()) {
    packed_ = floats(heads_ * (2 * routing + 1) * padded_);
    float* to = packed_.get();
    std::memset(to, 0, sizeof(float) * static_cast<size_t>(heads_ * (2 * routing + 1) * padded_));
    for (Index head = 0; head < heads_; ++head) {
      for (const float* from : {linear, quadratic}) {
        from += head * components * routing;
        for (Index c = 0; c < components; ++c) {
          for (Index m = 0; m < routing; ++m) to[m * padded_ + c] = from[c * routing + m];
        }
        to += routing * padded_;
      }
      std::memcpy(to, bias + head * components, sizeof(float) * static_cast<size_t>(components));
      to += padded_;
    }
  }

  Mixture operator[](Index head) const {
    Mixture mixture = one_;
    mixture.weights = packed_.get() + head * (2 * one_.routing + 1) * padded_;
    mixture.bias = mixture.weights + 2 * one_.routing * padded_;
    return mixture;
  }

 private:
  Index heads_;
  Mixture one_;
  Index padded_;
  Floats packed_;
};

}  // namespace gma
