// What tokens say for each label. As vectors.h, it is compiled into the anonymous namespace of its
// including file.
#pragma once

#include "vectors.h"

namespace gma {
namespace {

// log(1 + exp(x)), exact where that is small: 2 artanh(y / (2 + y)) of y = exp(-|x|), and x if it
// is positive.
GMA_INLINE Vector softplus(Vector x) {
  const Vector zero{}, negative = x < zero ? x : -x;
  const Vector y = exponential(negative), root = y / (2.0f + y), square = root * root;
  Vector series = square * (1.0f / 15.0f) + 1.0f / 13.0f;
  series = series * square + 1.0f / 11.0f;
  series = series * square + 1.0f / 9.0f;
  series = series * square + 1.0f / 7.0f;
  series = series * square + 1.0f / 5.0f;
  series = series * square + 1.0f / 3.0f;
  series = series * square + 1.0f;
  return (x < zero ? zero : x) + 2.0f * root * series;
}

// Labels [label, label + kLanes), zeros beyond the last.
GMA_INLINE Vector some(const float* from, Index label, Index labels) {
  if (label + kLanes <= labels) return load(from + label);
  float lanes[kLanes] = {};
  memcpy(lanes, from + label, sizeof(float) * (labels - label));
  return load(lanes);
}

void score(const Scoring& s, Index first, Index last, double* sums, float* evidence) {
  const Index labels = s.labels, padded = rounded(labels, 16);
  float* block = reinterpret_cast<float*>(sums + padded);  // (labels,)
  memset(sums, 0, sizeof(double) * padded);
  for (Index begin = first; begin < last; begin += kBlock) {
    const Index end = begin + kBlock < last ? begin + kBlock : last;
    memset(block, 0, sizeof(float) * padded);
    for (Index token = begin; token < end; ++token) {
      const float* read = s.read + token * s.width;
      const float* own = s.table + s.tokens[token] * labels;
      Vector gate{};
      if (s.factor == nullptr) gate = softplus(all(read[labels] + s.bias[labels]));
      for (Index label = 0; label < labels; label += kLanes) {
        const Vector deep = some(read, label, labels) + some(s.bias, label, labels);
        const Vector mine = some(own, label, labels);
        const Vector said = s.factor == nullptr
                                ? deep * gate + mine
                                : softplus(deep + mine) * some(s.factor, label, labels);
        store(block + label, load(block + label) + said);
      }
    }
    for (Index label = 0; label < padded; ++label) sums[label] += block[label];
  }
  for (Index label = 0; label < labels; ++label) evidence[label] = static_cast<float>(sums[label]);
}

}  // namespace
}  // namespace gma
