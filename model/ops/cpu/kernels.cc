// Compiled once for each set of instructions, into the namespace that GMA_INSTRUCTIONS names.
#include "kernels.h"

#include "products.h"
#include "scan.h"
#include "scoring.h"
#include "tiles.h"

#define GMA_TEXT_(name) #name
#define GMA_TEXT(name) GMA_TEXT_(name)

namespace gma {
namespace {

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
                             pack,
                             convolve,
                             normalize,
                             gelu_in_place,
                             score,
                             quantize,
                             dequantize};
}  // namespace GMA_INSTRUCTIONS
}  // namespace gma
