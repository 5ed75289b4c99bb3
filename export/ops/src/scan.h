// Gaussian Mixture Attention of one head over the tokens of a document. As vectors.h, it is compiled
// into the anonymous namespace of its including file.
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

// What each of the block's tokens reads of each that is not later: written and read (K, kBlock)
// -> affinity (kBlock, kBlock), the token that wrote in each row.
GMA_INLINE void affinities(const float* written, const float* read, Index components, Index count,
                           float* affinity) {
  const Index lanes = rounded(count, kLanes);
  for (Index writer = 0; writer < count; writer += kRows) {
    across(writer / kLanes * kLanes, lanes, [&](auto vectors, Index lane) {
      constexpr int n = decltype(vectors)::value;
      Vector acc[kRows][n] = {};
      accumulate<kRows, n>(acc, written + writer, 1, kBlock, read + lane, kBlock, components);
      for (int j = 0; j < n; ++j) {
        const Vector reader = lanes_from(lane + j * kLanes);
        for (int i = 0; i < kRows; ++i) {
          const Vector later = all(static_cast<float>(writer + i));
          store(affinity + (writer + i) * kBlock + lane + j * kLanes,
                reader < later ? Vector{} : acc[i][j]);
        }
      }
    });
  }
}

template <class T>
GMA_INLINE void prefetch(const T* from, Index stride, Index count, Index width) {
  constexpr Index line = 64 / sizeof(T);
  for (Index token = 0; token < count; ++token) {
    for (Index i = 0; i < width; i += line) __builtin_prefetch(from + token * stride + i, 0, 2);
  }
}

// One head's scan; its parts in the order of the chunked form. Every scan writes into the state; one
// that reads too gives each token's mean.
template <class T, bool reads>
struct Scan {
  const Mixture& mixture;
  const Tokens& tokens;
  double* state;
  const Index components, padded, routing, value, value_padded;
  float *turned, *rows, *written, *reading, *affinity, *memory, *values, *segment, *mass, *added,
      *inverse;

  GMA_INLINE Scan(const Mixture& mixture, const Tokens& tokens, double* state, float* work)
      : mixture(mixture),
        tokens(tokens),
        state(state),
        components(mixture.components),
        padded(mixture.padded()),
        routing(mixture.routing),
        value(tokens.value),
        value_padded(rounded(tokens.value, 16)) {
    const Scratch at(components, routing, value);
    turned = work + at.turned;
    rows = work + at.rows;
    written = work + at.written;
    reading = work + at.reading;
    affinity = reading + padded * kBlock;
    memory = work + at.readable;
    values = memory + padded * value_padded;
    segment = work + at.segment;
    mass = work + at.mass;
    added = work + at.added;
    inverse = work + at.inverse;
    memset(memory, 0, sizeof(float) * (at.size - at.readable));
    settle();
  }

  GMA_INLINE void run() {
    for (Index token = 0; token < tokens.count; token += kBlock) {
      const Index left = tokens.count - token, count = left < kBlock ? left : kBlock;
      const T* q = static_cast<const T*>(tokens.q) + token * tokens.stride;
      const T* k = static_cast<const T*>(tokens.k) + token * tokens.stride;
      const T* val = static_cast<const T*>(tokens.val) + token * tokens.stride;
      const Index next = left - count < kBlock ? left - count : kBlock;
      const Index ahead = kBlock * tokens.stride;
      if constexpr (reads) {
        prefetch(q + ahead, tokens.stride, next, routing);
        route(q, count, reading);
      }
      prefetch(k + ahead, tokens.stride, next, routing);
      prefetch(val + ahead, tokens.stride, next, value);
      route(k, count, written);
      for (Index i = 0; i < count; ++i) {
        load_row(val + i * tokens.stride, values + i * value_padded, value);
      }
      if constexpr (reads) {
        affinities(written, reading, components, count, affinity);
        divide(count);
        read(static_cast<T*>(tokens.out) + token * tokens.out_stride, count);
      }
      write(count);
      if (left <= kBlock || (token + kBlock) % kSegment == 0) settle();
    }
  }

 private:
  GMA_INLINE void route(const T* from, Index count, float* gamma) {
    turn(from, tokens.stride, count, routing, rows, turned);
    square(mixture, rounded(count, kLanes), turned);
    responsibilities(mixture, turned, count, gamma);
  }

  // One over the mass that each token of the block reads.
  GMA_INLINE void divide(Index count) {
    for (Index lane = 0; lane < count; lane += kLanes) {
      Vector total[2] = {};
      for (Index c = 0; c < padded; c += 2) {
        total[0] += all(mass[c]) * load(reading + c * kBlock + lane);
        total[1] += all(mass[c + 1]) * load(reading + (c + 1) * kBlock + lane);
      }
      const Index last = lane + kLanes < count ? lane + kLanes : count;
      for (Index writer = 0; writer < last; ++writer) {
        total[writer % 2] += load(affinity + writer * kBlock + lane);
      }
      store(inverse + lane, 1.0f / (total[0] + total[1] + tokens.epsilon));
    }
  }

  // Memory and earlier tokens' values, in one product: they lie behind each other.
  GMA_INLINE void read(T* out, Index count) {
    for (Index token = 0; token < count; token += kRows) {
      const Index last = token + kRows < count ? token + kRows : count;
      across(0, value_padded, [&](auto vectors, Index column) {
        constexpr int n = decltype(vectors)::value;
        Vector acc[kRows][n] = {};
        accumulate<kRows, n>(acc, reading + token, 1, kBlock, memory + column, value_padded,
                             padded + last);
        for (int i = 0; i < kRows; ++i) {
          const Vector scale = all(inverse[token + i]);
          for (int j = 0; j < n; ++j) {
            store(rows + i * value_padded + column + j * kLanes, acc[i][j] * scale);
          }
        }
      });
      for (Index i = token; i < last; ++i) {
        store_row(rows + (i - token) * value_padded, out + i * tokens.out_stride, value);
      }
    }
  }

  GMA_INLINE void write(Index count) {
    for (Index c = 0; c < padded; c += kRows) {
      across(0, value_padded, [&](auto vectors, Index column) {
        constexpr int n = decltype(vectors)::value;
        Vector acc[kRows][n] = {};
        accumulate<kRows, n>(acc, written + c * kBlock, kBlock, 1, values + column, value_padded,
                             count);
        for (int i = 0; i < kRows; ++i) {
          for (int j = 0; j < n; ++j) {
            const Index at = (c + i) * value_padded + column + j * kLanes;
            store(segment + at, load(segment + at) + acc[i][j]);
            if constexpr (reads) store(memory + at, load(memory + at) + acc[i][j]);
          }
        }
      });
    }
    for (Index c = 0; c < components; ++c) {
      Vector total{};
      for (Index lane = 0; lane < kBlock; lane += kLanes) total += load(written + c * kBlock + lane);
      const float sums = sum(total);
      added[c] += sums;
      mass[c] += sums;
    }
  }

  // Adds the segment to the state, from which the next one starts.
  GMA_INLINE void settle() {
    double* masses = state + components * value;
    for (Index c = 0; c < components; ++c) {
      double* row = state + c * value;
      for (Index i = 0; i < value; ++i) {
        row[i] += static_cast<double>(segment[c * value_padded + i]);
        memory[c * value_padded + i] = static_cast<float>(row[i]);
        segment[c * value_padded + i] = 0.0f;
      }
      masses[c] += static_cast<double>(added[c]);
      mass[c] = static_cast<float>(masses[c]);
      added[c] = 0.0f;
    }
  }
};

template <bool reads>
void scan(const Mixture& mixture, const Tokens& tokens, double* state, float* work) {
  switch (tokens.type) {
    case Type::float32: return Scan<float, reads>(mixture, tokens, state, work).run();
    case Type::float16: return Scan<Half, reads>(mixture, tokens, state, work).run();
    case Type::bfloat16: return Scan<Brain, reads>(mixture, tokens, state, work).run();
  }
}

}  // namespace
}  // namespace gma
