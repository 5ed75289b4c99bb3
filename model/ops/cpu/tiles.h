// Products and transpositions in tiles that the registers hold. As vectors.h, it is compiled into
// the anonymous namespace of its including file.
#pragma once

#include "vectors.h"

namespace gma {
namespace {

// Rows of a tile: with two vectors of columns, as many sums as the registers hold.
constexpr int kRows = kLanes == 16 ? 8 : 4;

// action(Count<vectors>, first column) for tiles that cover columns [first, last).
template <class Action>
GMA_INLINE void across(Index first, Index last, Action&& action) {
  for (; first + 2 * kLanes <= last; first += 2 * kLanes) action(Count<2>{}, first);
  for (; first < last; first += kLanes) action(Count<1>{}, first);
}

// Tokens (count, width), `stride` apart, -> to (width, kBlock): a token in each column, zeros
// beyond the last. Rows up to `width` rounded to 16 are written. `rows` holds (kBlock, width).
template <class T>
GMA_INLINE void turn(const T* from, Index stride, Index count, Index width, float* rows,
                     float* to) {
  const Index padded = rounded(width, 16);
  for (Index token = 0; token < count; token += kLanes) {
    const float* source = rows;
    Index step = padded;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (token + kLanes <= count && width % kLanes == 0) {
        source = from + token * stride;
        step = stride;
      }
    }
    if (source == rows) {
      memset(rows, 0, sizeof(float) * kLanes * padded);
      for (Index i = 0; i < kLanes && token + i < count; ++i) {
        load_row(from + (token + i) * stride, rows + i * padded, width);
      }
    }
    const Index columns = source == rows ? padded : width;
    for (Index column = 0; column < columns; column += kLanes) {
      transpose(source + column, step, to + column * kBlock + token, kBlock);
    }
  }
}

}  // namespace
}  // namespace gma
