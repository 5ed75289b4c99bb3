// Compiled once for each set of instructions, into the namespace that GMA_INSTRUCTIONS names.
#include "kernels.h"

#include "scan.h"
#include "tiles.h"

#define GMA_TEXT_(name) #name
#define GMA_TEXT(name) GMA_TEXT_(name)

namespace gma {
namespace {

// x / (1 + exp(-2u)) is x (1 + tanh(u)) / 2
GMA_INLINE Vector gelu(Vector x) {
  const Vector u = 0.797884561f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exponential(-2.0f * u));
}

template <class T>
GMA_INLINE void product_of(const Product& p, Index first, Index last, Index column, float* work) {
  const Index padded = rounded(p.inputs, 16);
  const Index columns = p.outputs - column < kPanel ? p.outputs - column : kPanel;
  float* panel = work;                          // (I, kPanel)
  float* turned = panel + padded * kPanel;      // (I, kBlock)
  float* rows = turned + padded * kBlock;       // (kBlock, I)
  float* results = rows + kBlock * padded;      // (kRows, kPanel)
  float* residuals = results + kRows * kPanel;  // (kPanel,)
  memset(panel, 0, sizeof(float) * padded * kPanel);
  memset(residuals, 0, sizeof(float) * kPanel);
  const T* weight = static_cast<const T*>(p.weight) + column;
  for (Index i = 0; i < p.inputs; ++i)
    load_row(weight + i * p.outputs, panel + i * kPanel, columns);
  for (Index row = first; row < last; row += kBlock) {
    const Index count = last - row < kBlock ? last - row : kBlock;
    turn(static_cast<const T*>(p.x) + row * p.inputs, p.inputs, count, p.inputs, rows, turned);
    for (Index tile = 0; tile < count; tile += kRows) {
      across(0, kPanel, [&](auto vectors, Index lane) {
        constexpr int n = decltype(vectors)::value;
        Vector acc[kRows][n] = {};
        accumulate<kRows, n>(acc, turned + tile, 1, kBlock, panel + lane, kPanel, p.inputs);
        for (int i = 0; i < kRows; ++i) {
          for (int j = 0; j < n; ++j) {
            store(results + i * kPanel + lane + j * kLanes, p.gelu ? gelu(acc[i][j]) : acc[i][j]);
          }
        }
      });
      for (Index i = 0; i < kRows && tile + i < count; ++i) {
        const Index at = (row + tile + i) * p.outputs + column;
        float* result = results + i * kPanel;
        if (p.residual != nullptr) {
          load_row(static_cast<const T*>(p.residual) + at, residuals, columns);
          for (Index j = 0; j < columns; ++j) result[j] += residuals[j];
        }
        store_row(result, static_cast<T*>(p.y) + at, columns);
      }
    }
  }
}

void product(const Product& p, Index first, Index last, Index column, float* work) {
  by_type(p.type, [&](auto number) { product_of<decltype(number)>(p, first, last, column, work); });
}

GMA_INLINE float inverse_rms(const float* x, Index width, float epsilon) {
  Vector squares{};
  Index i = 0;
  for (; i + kLanes <= width; i += kLanes) squares += load(x + i) * load(x + i);
  float total = sum(squares);
  for (; i < width; ++i) total += x[i] * x[i];
  return 1.0f / __builtin_sqrtf(total / static_cast<float>(width) + epsilon);
}

template <class T>
GMA_INLINE void convolve_of(const Convolution& c, Index first, Index last, float* work) {
  const Index width = c.width, length = c.length, seen = length + 1;
  float* ring = work;  // (T + 1, W): normalised tokens, token p in row p mod (T + 1)
  float* y = ring + seen * width;
  const auto slot = [&](Index token) { return ring + (token + seen) % seen * width; };
  const auto enter = [&](Index token) {
    float* own = slot(token);
    if (token >= 0) {
      load_row(static_cast<const T*>(c.x) + token * width, own, width);
      const float scale = inverse_rms(own, width, c.epsilon);
      for (Index i = 0; i < width; ++i) own[i] = own[i] * scale * c.scale[i];
    } else if (c.tail != nullptr) {
      memcpy(own, c.tail + (length + token) * width, sizeof(float) * width);
    } else {
      memset(own, 0, sizeof(float) * width);
    }
  };
  for (Index token = first - length; token < first; ++token) enter(token);
  for (Index token = first; token < last; ++token) {
    enter(token);
    load_row(static_cast<const T*>(c.x) + token * width, y, width);
    for (Index tap = 0; tap < seen; ++tap) {
      const float* before = slot(token - length + tap);
      const float* weight = c.taps + tap * width;
      for (Index i = 0; i < width; ++i) y[i] += before[i] * weight[i];
    }
    T* rounded_y = static_cast<T*>(c.y) + token * width;
    store_row(y, rounded_y, width);
    load_row(rounded_y, y, width);
    const float scale = inverse_rms(y, width, c.epsilon);
    for (Index i = 0; i < width; ++i) y[i] *= scale;
    store_row(y, static_cast<T*>(c.normal) + token * width, width);
  }
  if (last == c.count) {
    for (Index i = 0; i < length; ++i) {
      memcpy(c.tail_after + i * width, slot(last - length + i), sizeof(float) * width);
    }
  }
}

void convolve(const Convolution& c, Index first, Index last, float* work) {
  by_type(c.type, [&](auto number) { convolve_of<decltype(number)>(c, first, last, work); });
}

template <class T>
GMA_INLINE void normalize_of(const void* x, void* normal, Index rows, Index width, float epsilon,
                             float* work) {
  for (Index row = 0; row < rows; ++row) {
    load_row(static_cast<const T*>(x) + row * width, work, width);
    const float scale = inverse_rms(work, width, epsilon);
    for (Index i = 0; i < width; ++i) work[i] *= scale;
    store_row(work, static_cast<T*>(normal) + row * width, width);
  }
}

void normalize(Type type, const void* x, void* normal, Index rows, Index width, float epsilon,
               float* work) {
  by_type(type, [&](auto number) {
    normalize_of<decltype(number)>(x, normal, rows, width, epsilon, work);
  });
}

void gelu_in_place(float* x, Index count) {
  Index i = 0;
  for (; i + kLanes <= count; i += kLanes) store(x + i, gelu(load(x + i)));
  float rest[kLanes] = {};
  memcpy(rest, x + i, sizeof(float) * (count - i));
  store(rest, gelu(load(rest)));
  memcpy(x + i, rest, sizeof(float) * (count - i));
}

void quantize(const float* x, int8_t* y, float* scale, Index rows, Index width) {
  constexpr uint32_t infinite = 0x7f800000u;  // a number that is not finite has bits of no less
  constexpr float least = 1e-30f;             // whose inverse is finite
  constexpr float rounder = 0x1.8p23f;        // adding it rounds to an integer, in the lowest bits
  for (Index row = 0; row < rows; ++row) {
    const float* own = x + row * width;
    int8_t* to = y + row * width;
    uint32_t largest = 0;
    for (Index i = 0; i < width; ++i) {
      const uint32_t bits = float_to_bits(own[i]) & 0x7fffffffu;
      largest = bits > largest ? bits : largest;
    }
    const float most = bits_to_float(largest);
    const bool there = largest < infinite && most > least;
    const float inverse = there ? 127.0f / most : 0.0f;
    scale[row] = there ? most / 127.0f : largest < infinite ? 0.0f : __builtin_nanf("");
    for (Index i = 0; i < width; ++i) {
      to[i] = static_cast<int8_t>(float_to_bits(own[i] * inverse + rounder));
    }
  }
}

void dequantize(const Sums& s, Index first, Index last) {
  for (Index row = first; row < last; ++row) {
    const int32_t* sums = s.sums + row * s.width;
    float* y = s.y + row * s.width;
    const float scale = s.of_row[row];
    for (Index i = 0; i < s.width; ++i) {
      const float found = static_cast<float>(sums[i]) * (scale * s.of_column[i]);
      y[i] = s.add ? y[i] + found : found;
    }
  }
}

}  // namespace

namespace GMA_INSTRUCTIONS {
extern const Kernels kernels{GMA_TEXT(GMA_INSTRUCTIONS),
                             scan<true>,
                             scan<false>,
                             follow,
                             product,
                             convolve,
                             normalize,
                             gelu_in_place,
                             quantize,
                             dequantize};
}  // namespace GMA_INSTRUCTIONS
}  // namespace gma
