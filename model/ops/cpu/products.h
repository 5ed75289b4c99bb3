// Matrix products. Each number is a sum of its inputs in their order, so it does not depend on what
// is multiplied beside it. As vectors.h, it is compiled into the anonymous namespace of its
// including file.
#pragma once

#include "vectors.h"

namespace gma {
namespace {

// Columns and rows of a tile: as many sums as the registers hold beside what they are made of.
constexpr Index kColumns = 2 * kLanes;
constexpr int kTall = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;

// Inputs whose sum is made in registers, and then added to the sum of those before: a panel of them
// stays in the first cache.
constexpr Index kDepth = 256;

// x / (1 + exp(-2u)) is x (1 + tanh(u)) / 2
GMA_INLINE Vector gelu(Vector x) {
  const Vector u = 0.797884561f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exponential(-2.0f * u));
}

// Columns from `column` on of a matrix (inputs, outputs), side by side: (inputs, kColumns), zeros
// beyond the last.
template <class T>
GMA_INLINE void pack_of(const T* weight, Index inputs, Index outputs, Index column, float* panel) {
  const Index count = outputs - column < kColumns ? outputs - column : kColumns;
  for (Index i = 0; i < inputs; ++i, panel += kColumns) {
    load_row(weight + i * outputs + column, panel, count);
    memset(panel + count, 0, sizeof(float) * (kColumns - count));
  }
}

// A row's sums of the columns from `column` on, as they are wanted, into y.
template <class T>
GMA_INLINE void finish(const Product& p, Index row, Index column, Vector left, Vector right) {
  if (p.gelu) {
    left = gelu(left);
    right = gelu(right);
  }
  const Index at = row * p.outputs + column, count = p.outputs - column;
  const T* residual = p.residual == nullptr ? nullptr : static_cast<const T*>(p.residual) + at;
  T* y = static_cast<T*>(p.y) + at;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (count >= kColumns) {
      store(y, residual == nullptr ? left : left + load(residual));
      store(y + kLanes, residual == nullptr ? right : right + load(residual + kLanes));
      return;
    }
  }
  const Index columns = count < kColumns ? count : kColumns;
  float found[kColumns], added[kColumns] = {};
  if (residual != nullptr) load_row(residual, added, columns);
  store(found, left + load(added));
  store(found + kLanes, right + load(added + kLanes));
  store_row(found, y, columns);
}

// Some inputs of a product, and what is done to their sums.
struct Part {
  const float* panel;  // (depth, kColumns)
  Index first, depth;
  Index column;
};

// Rows from `row` on, of which x has the inputs: with the last of these y gets them, until then
// sums (rows, kColumns).
template <class T, int rows>
void tile(const Product& p, const Part& part, const float* x, Index row, float* sums) {
  const float* panel = part.panel;
  x += part.first;
  Vector found[rows][2] = {};
  for (Index i = 0; i < part.depth; ++i, panel += kColumns) {
    const Vector left = load(panel), right = load(panel + kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const Vector number = all(x[r * p.inputs + i]);
      found[r][0] += number * left;
      found[r][1] += number * right;
    }
  }
  const bool begins = part.first == 0, ends = part.first + part.depth == p.inputs;
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r, sums += kColumns) {
    const Vector left = begins ? found[r][0] : load(sums) + found[r][0];
    const Vector right = begins ? found[r][1] : load(sums + kLanes) + found[r][1];
    if (ends) {
      finish<T>(p, row + r, part.column, left, right);
    } else {
      store(sums, left);
      store(sums + kLanes, right);
    }
  }
}

// Of up to kTall rows.
template <class T, int rows = kTall>
GMA_INLINE void tile_of(Index count, const Product& p, const Part& part, const float* x, Index row,
                        float* sums) {
  if (count == rows) return tile<T, rows>(p, part, x, row, sums);
  if constexpr (rows > 1) tile_of<T, rows - 1>(count, p, part, x, row, sums);
}

template <class T>
GMA_INLINE void product_of(const Product& p, Index first, Index last, Index column, float* work) {
  const Index end = column + kPanel < p.outputs ? column + kPanel : p.outputs;
  float* sums = work;                           // (kRowsAtOnce, kColumns)
  float* rows = sums + kRowsAtOnce * kColumns;  // (kRowsAtOnce, I), unless x is of floats
  const float* panels = p.packed + column * p.inputs;
  if (p.packed == nullptr) {
    float* packed = rows + kRowsAtOnce * p.inputs;  // (kPanel / kColumns, I, kColumns)
    for (Index c = column; c < end; c += kColumns) {
      pack_of(static_cast<const T*>(p.weight), p.inputs, p.outputs, c,
              packed + (c - column) * p.inputs);
    }
    panels = packed;
  }
  for (Index row = first; row < last; row += kRowsAtOnce) {
    const Index count = last - row < kRowsAtOnce ? last - row : kRowsAtOnce;
    const T* own = static_cast<const T*>(p.x) + row * p.inputs;
    const float* x = rows;
    if constexpr (sizeof(T) == sizeof(float)) {
      x = own;
    } else {
      load_row(own, rows, count * p.inputs);
    }
    for (Index c = column; c < end; c += kColumns) {
      const float* panel = panels + (c - column) * p.inputs;
      for (Index i = 0; i < p.inputs; i += kDepth) {
        const Part part{panel + i * kColumns, i, p.inputs - i < kDepth ? p.inputs - i : kDepth, c};
        for (Index r = 0; r < count; r += kTall) {
          tile_of<T>(count - r < kTall ? count - r : kTall, p, part, x + r * p.inputs, row + r,
                     sums + r * kColumns);
        }
      }
    }
  }
}

void product(const Product& p, Index first, Index last, Index column, float* work) {
  by_type(p.type, [&](auto number) { product_of<decltype(number)>(p, first, last, column, work); });
}

void pack(const float* weight, Index inputs, Index outputs, float* packed) {
  for (Index column = 0; column < outputs; column += kColumns) {
    pack_of(weight, inputs, outputs, column, packed + column * inputs);
  }
}

}  // namespace
}  // namespace gma
