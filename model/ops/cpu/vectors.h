// Vectors of floats as wide as the instructions that this is compiled for, and how to fill them.
// Everything is in the anonymous namespace of its including file, and nothing of the standard
// library's templates is used: what is compiled for one set of instructions must not be linked
// into code for another.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace gma {
namespace {

#if defined(__AVX512F__)
constexpr Index kLanes = 16;
#elif defined(__AVX2__)
constexpr Index kLanes = 8;
#else
constexpr Index kLanes = 4;
#endif

template <int n>
struct Count {
  static constexpr int value = n;
};

using Vector = float __attribute__((vector_size(kLanes * 4)));
using Integers = int32_t __attribute__((vector_size(kLanes * 4)));

GMA_INLINE Vector load(const float* from) {
  Vector x;
  memcpy(&x, from, sizeof x);
  return x;
}

GMA_INLINE void store(float* to, Vector x) { memcpy(to, &x, sizeof x); }

GMA_INLINE Vector all(float x) { return x - Vector{}; }

GMA_INLINE Vector larger(Vector a, Vector b) { return a < b ? b : a; }

GMA_INLINE Vector lanes_from(Index first) {
  Vector x;
  for (Index lane = 0; lane < kLanes; ++lane) x[lane] = static_cast<float>(first + lane);
  return x;
}

GMA_INLINE float sum(Vector x) {
  float lanes[kLanes];
  memcpy(lanes, &x, sizeof x);
  for (Index half = kLanes / 2; half > 0; half /= 2) {
    for (Index lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

GMA_INLINE Vector inverse_root(Vector x) {
  float lanes[kLanes];
  store(lanes, x);
  for (Index lane = 0; lane < kLanes; ++lane) lanes[lane] = 1.0f / __builtin_sqrtf(lanes[lane]);
  return load(lanes);
}

// exp(x) for |x| <= 87, and of the nearest such number beyond; NaN stays. 2^f is a polynomial that
// interpolates at Chebyshev's nodes for |f| <= 1/2: its relative error is below 3e-9.
GMA_INLINE Vector exponential(Vector x) {
  constexpr float rounder = 0x1.8p23f;  // adding it rounds to an integer, in the lowest bits
  x = x < -87.0f ? all(-87.0f) : x;
  x = x > 87.0f ? all(87.0f) : x;
  const Vector shifted = x * 1.44269502f + rounder;
  const Vector whole = shifted - rounder;
  const Vector f = (x * 1.44269502f - whole) + x * 1.92596303e-8f;  // log2(e) in two parts
  Vector y = all(1.5469732e-4f);
  y = y * f + 1.340043217e-3f;
  y = y * f + 9.618025603e-3f;
  y = y * f + 5.550327214e-2f;
  y = y * f + 2.402265121e-1f;
  y = y * f + 6.931472067e-1f;
  y = y * f + 1.0f;
  Integers bits, exponent;
  memcpy(&bits, &y, sizeof y);
  memcpy(&exponent, &shifted, sizeof shifted);
  bits += exponent << 23;
  memcpy(&y, &bits, sizeof y);
  return y;
}

// softplus(x) where it is at most `most`, which is no more than 1/4, and that where it is more.
// log(1 + y) is 2 artanh(y / (2 + y)), whose series needs few terms for so small a y.
GMA_INLINE Vector softplus(Vector x, float most) {
  x = x > -1.25f ? all(-1.25f) : x;
  const Vector y = exponential(x), s = y / (2.0f + y), square = s * s;
  Vector series = all(1.0f / 9.0f);
  series = series * square + 1.0f / 7.0f;
  series = series * square + 1.0f / 5.0f;
  series = series * square + 1.0f / 3.0f;
  series = series * square + 1.0f;
  const Vector rate = 2.0f * s * series;
  return rate > most ? all(most) : rate;
}

GMA_INLINE Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

GMA_INLINE float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

GMA_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof x);
  return bits;
}

GMA_INLINE float widened(float x) { return x; }
GMA_INLINE float widened(Brain x) { return bits_to_float(uint32_t{x.bits} << 16); }
GMA_INLINE float widened(Half x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Scaling by 2^112 moves the exponent, and makes subnormal numbers normal.
  const float scaled = bits_to_float(rest << 13) * 0x1p112f;
  return bits_to_float(sign | float_to_bits(scaled));
}

// To the nearest, ties to even.
GMA_INLINE void narrow(float x, float& to) { to = x; }
GMA_INLINE void narrow(float x, Brain& to) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t nearest = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to.bits = static_cast<uint16_t>(x != x ? (bits >> 16 | 0x40u) : nearest);
}
GMA_INLINE void narrow(float x, Half& to) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;
  } else if (rest >= 0x47800000u) {  // 65536
    half = 0x7c00u;
  } else if (rest < 0x38800000u) {  // 2^-14: adding 1/2 leaves the subnormal's bits, rounded
    half = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u;
  } else {
    half = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13;
  }
  to.bits = static_cast<uint16_t>(sign | half);
}

template <class T>
GMA_INLINE void load_row(const T* from, float* to, Index count) {
  for (Index i = 0; i < count; ++i) to[i] = widened(from[i]);
}

template <class T>
GMA_INLINE void store_row(const float* from, T* to, Index count) {
  for (Index i = 0; i < count; ++i) narrow(from[i], to[i]);
}

#if defined(__F16C__)
GMA_INLINE void load_row(const Half* from, float* to, Index count) {
  Index i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(bits));
  }
  for (; i < count; ++i) to[i] = widened(from[i]);
}

GMA_INLINE void store_row(const float* from, Half* to, Index count) {
  Index i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i bits = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), bits);
  }
  for (; i < count; ++i) narrow(from[i], to[i]);
}
#endif

#if defined(__AVX512F__)
#define GMA_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define GMA_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define GMA_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define GMA_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define GMA_LOW 0, 4, 1, 5
#define GMA_HIGH 2, 6, 3, 7
#endif

// A square of kLanes by kLanes floats, transposed: interleaving its halves log2(kLanes) times.
GMA_INLINE void transpose(const float* from, Index from_step, float* to, Index to_step) {
  Vector a[kLanes], b[kLanes];
#pragma GCC unroll 16
  for (Index i = 0; i < kLanes; ++i) a[i] = load(from + i * from_step);
#pragma GCC unroll 4
  for (Index stage = 1; stage < kLanes; stage *= 2) {
#pragma GCC unroll 8
    for (Index i = 0; i < kLanes / 2; ++i) {
      b[2 * i] = __builtin_shufflevector(a[i], a[i + kLanes / 2], GMA_LOW);
      b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + kLanes / 2], GMA_HIGH);
    }
#pragma GCC unroll 16
    for (Index i = 0; i < kLanes; ++i) a[i] = b[i];
  }
#pragma GCC unroll 16
  for (Index i = 0; i < kLanes; ++i) store(to + i * to_step, a[i]);
}

// acc[i][j] += sum over p < depth of a[i * a_row + p * a_step] * b[p * b_step + lanes of vector j]
template <int rows, int vectors>
GMA_INLINE void accumulate(Vector (&acc)[rows][vectors], const float* a, Index a_row, Index a_step,
                           const float* b, Index b_step, Index depth) {
  for (Index p = 0; p < depth; ++p, a += a_step, b += b_step) {
    Vector columns[vectors];
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) columns[j] = load(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const Vector x = all(a[i * a_row]);
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) acc[i][j] += x * columns[j];
    }
  }
}

// action(a number of the type). PyTorch's library is of float32 alone: it is compiled wherever the
// service is installed.
template <class Action>
GMA_INLINE void by_type(Type type, Action&& action) {
#ifndef GMA_FLOAT32_ALONE
  if (type == Type::float16) return action(Half{});
  if (type == Type::bfloat16) return action(Brain{});
#endif
  if (type == Type::float32) action(float{});
}

// While it lives, numbers too small to be normal count as zero: states decay towards them, and a
// processor takes long for each.
class Flush {
#if defined(__SSE2__)
 public:
  GMA_INLINE explicit Flush(bool wanted) : before_(_mm_getcsr()) {
    if (wanted) _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON | 0x40);  // the other: denormals are zeros
  }
  GMA_INLINE ~Flush() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
 public:
  explicit Flush(bool) {}
#endif
};

}  // namespace
}  // namespace gma
