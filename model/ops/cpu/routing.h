// Responsibilities of one head's mixture for a block of tokens. As vectors.h, it is compiled into
// the anonymous namespace of its including file.
#pragma once

#include "tiles.h"

namespace gma {
namespace {

// turned (r, kBlock) -> normalised, if the mixture says so, and its squares behind it.
GMA_INLINE void square(const Mixture& mixture, Index lanes, float* turned) {
  const Index routing = mixture.routing;
  for (Index lane = 0; lane < lanes; lane += kLanes) {
    Vector scale = all(1.0f);
    if (mixture.normalize) {
      Vector squares{};
      for (Index m = 0; m < routing; ++m) {
        const Vector x = load(turned + m * kBlock + lane);
        squares += x * x;
      }
      scale = inverse_root(squares * (1.0f / static_cast<float>(routing)) + mixture.epsilon);
    }
    for (Index m = 0; m < routing; ++m) {
      const Vector x = load(turned + m * kBlock + lane) * scale;
      store(turned + m * kBlock + lane, x);
      store(turned + (routing + m) * kBlock + lane, x * x);
    }
  }
}

// turned (2r, kBlock) -> gamma (K, kBlock). Zeros for components and tokens that are not there.
GMA_INLINE void responsibilities(const Mixture& mixture, const float* turned, Index count,
                                 float* gamma) {
  const Index components = mixture.components, padded = mixture.padded();
  const Index lanes = rounded(count, kLanes);
  for (Index c = 0; c < padded; c += kRows) {
    across(0, lanes, [&](auto vectors, Index lane) {
      constexpr int n = decltype(vectors)::value;
      Vector acc[kRows][n];
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < n; ++j) acc[i][j] = all(mixture.bias[c + i]);
      }
      accumulate<kRows, n>(acc, mixture.weights + c, 1, padded, turned + lane, kBlock,
                           2 * mixture.routing);
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < n; ++j) store(gamma + (c + i) * kBlock + lane + j * kLanes, acc[i][j]);
      }
    });
  }
  for (Index lane = 0; lane < kBlock; lane += kLanes) {
    float* column = gamma + lane;
    if (lane >= count) {
      for (Index c = 0; c < padded; ++c) store(column + c * kBlock, Vector{});
      continue;
    }
    Vector top = load(column), total{};
    for (Index c = 1; c < components; ++c) top = larger(top, load(column + c * kBlock));
    for (Index c = 0; c < components; ++c) {
      const Vector x = exponential(load(column + c * kBlock) - top);
      total += x;
      store(column + c * kBlock, x);
    }
    const Vector scale = 1.0f / total, there = lanes_from(lane);
    const float end = static_cast<float>(count);
    for (Index c = 0; c < components; ++c) {
      const Vector x = load(column + c * kBlock) * scale;
      store(column + c * kBlock, there < end ? x : Vector{});
    }
    for (Index c = components; c < padded; ++c) store(column + c * kBlock, Vector{});
  }
}

// Adds the responsibilities gamma (K, kBlock) of the first tokens to usage (K,); those of tokens
// that are not there are zeros.
GMA_INLINE void count_usage(const float* gamma, Index components, float* usage) {
  for (Index c = 0; c < components; ++c) {
    Vector whole{};
    for (Index lane = 0; lane < kBlock; lane += kLanes) whole += load(gamma + c * kBlock + lane);
    usage[c] += sum(whole);
  }
}

}  // namespace
}  // namespace gma
