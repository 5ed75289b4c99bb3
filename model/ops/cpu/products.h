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

// sums (rows, kColumns) of x (rows, depth), `step` apart, times a panel (depth, kColumns): put
// there, or added to what they are.
template <int rows>
void tile(const float* x, Index step, const float* panel, Index depth, bool add, float* sums) {
  Vector found[rows][2] = {};
  for (Index i = 0; i < depth; ++i, panel += kColumns) {
    const Vector left = load(panel), right = load(panel + kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const Vector number = all(x[r * step + i]);
      found[r][0] += number * left;
      found[r][1] += number * right;
    }
  }
  for (int r = 0; r < rows; ++r, sums += kColumns) {
    store(sums, add ? load(sums) + found[r][0] : found[r][0]);
    store(sums + kLanes, add ? load(sums + kLanes) + found[r][1] : found[r][1]);
  }
}

// Of up to kTall rows.
template <int rows = kTall>
GMA_INLINE void tile_of(Index count, const float* x, Index step, const float* panel, Index depth,
                        bool add, float* sums) {
  if (count == rows) return tile<rows>(x, step, panel, depth, add, sums);
  if constexpr (rows > 1) tile_of<rows - 1>(count, x, step, panel, depth, add, sums);
}

// A row's sums, as they are wanted, into y: the first `columns` of kColumns.
template <class T>
GMA_INLINE void finish(const float* sums, bool with_gelu, const T* residual, T* y, Index columns) {
  float found[kColumns], added[kColumns] = {};
  if (residual != nullptr) load_row(residual, added, columns);
  for (Index i = 0; i < kColumns; i += kLanes) {
    const Vector sum = load(sums + i);
    store(found + i, (with_gelu ? gelu(sum) : sum) + load(added + i));
  }
  store_row(found, y, columns);
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
        const Index depth = p.inputs - i < kDepth ? p.inputs - i : kDepth;
        for (Index r = 0; r < count; r += kTall) {
          tile_of(count - r < kTall ? count - r : kTall, x + r * p.inputs + i, p.inputs,
                  panel + i * kColumns, depth, i > 0, sums + r * kColumns);
        }
      }
      for (Index r = 0; r < count; ++r) {
        const Index at = (row + r) * p.outputs + c;
        const T* residual = p.residual ? static_cast<const T*>(p.residual) + at : nullptr;
        T* y = static_cast<T*>(p.y) + at;
        if (c + kColumns <= p.outputs) {  // a count that the compiler knows
          finish(sums + r * kColumns, p.gelu, residual, y, kColumns);
        } else {
          finish(sums + r * kColumns, p.gelu, residual, y, p.outputs - c);
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
