// What stands around the mixer in a layer, over the tokens of a step.
#pragma once

#include <vector>

#include "documents.h"
#include "work.h"

namespace gma {

struct Convolving {
  Type type;
  const void* x;       // of each token W
  const float* tail;   // (D, T, W), a document's `tail_stride` elements from the next one's
  const float* scale;  // (W,)
  const float* taps;   // (T + 1, W)
  const bool* fresh;   // (D,), or null: no document is
  void* y;             // likewise; nothing is written where no token is
  void* normal;        // likewise
  float* tail_after;
  Index tail_stride, width, length;  // length: T
  float epsilon;
};

void convolve(const Threads& threads, const Convolving& step,
              const std::vector<Document>& documents);

// x and normal (rows, width).
void normalize(const Threads& threads, Type type, const void* x, void* normal, Index rows,
               Index width, float epsilon);

void multiply(const Threads& threads, const Product& product);

// In place.
void gelu(const Threads& threads, float* x, Index count);

// evidence (rows, labels) is what each row's tokens say, `lengths` of which lie one after the
// other.
void score(const Threads& threads, const Scoring& scoring, const int64_t* lengths, float* evidence,
           Index rows);

// x (rows, width) as integers from -127 to 127 in y, and what each row's are to be multiplied by:
// zero if all of it is next to nothing, NaN if a number is not finite.
void quantize(const Threads& threads, const float* x, int8_t* y, float* scale, Index rows,
              Index width);

void dequantize(const Threads& threads, const Sums& sums);

}  // namespace gma
