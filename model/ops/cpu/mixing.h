// The operation over a step: one scan over every head of every document.
#pragma once

#include <vector>

#include "documents.h"
#include "mixtures.h"
#include "work.h"

namespace gma {

// What it takes and gives: tensors, beginning with those of the first document. A document's states
// are `stride` elements from the next one's.
struct Mixing {
  Type type;
  const void*
      routed;  // of each token width: q, k, val; then, in the form that forgets, gates and rates
  Index rows, chunk, width;
  Index heads, routing, components, value;
  float epsilon;
  const float *memory, *mass;  // (D, H, K, v), (D, H, K)
  float *memory_after, *mass_after;
  Index memory_stride, mass_stride;
  const bool* fresh;  // (D,): what a document's states hold counts as zeros; null: of none
  void* out;          // of each token H * v; nothing is written where no token is

  // In the form that forgets; elsewhere `usage` is null.
  Index lasting;  // heads that keep all
  const float* keep_bias;
  float most;
  float* usage;  // (R, H, K)

  Index size() const { return components * value; }  // of one head's memory
};

void mix(const Threads& threads, const Mixing& mixing, const Mixtures& mixtures,
         const std::vector<Document>& documents);

}  // namespace gma
