// Gaussian Mixture Attention of one head over the tokens of a document. As vectors.h, it is
// compiled into the anonymous namespace of its including file.
#pragma once

#include "routing.h"
#include "tiles.h"

namespace gma {
namespace {

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

// A number of a state behind a segment. Only here, for the compiler may round it once or twice.
GMA_INLINE double settled(double before, double kept, double sum, bool row_ends) {
  const double after = before * kept + sum;
  return row_ends ? static_cast<double>(static_cast<float>(after)) : after;
}

void follow(double* state, const double* sums, Index size, bool row_ends) {
  const double kept = exp(-sums[size]);
  for (Index i = 0; i < size; ++i) state[i] = settled(state[i], kept, sums[i], row_ends);
}

// One head's scan; its parts in the order of the chunked form. Every scan writes into the state;
// one that reads too gives each token's mean.
//
// Where heads forget, all of a block is in units of what its first token finds: a write is divided
// by what is kept from there up to it, what is read cancels the unit but for epsilon, and what
// leaves the block is multiplied by all that it keeps.
template <class T, bool reads>
struct Scan {
  const Mixture& mixture;
  const Tokens& tokens;
  double* state;
  const Index components, padded, routing, value, value_padded;
  float *turned, *rows, *written, *reading, *affinity, *memory, *values, *segment, *mass, *added,
      *inverse, *grown, *opened;
  const bool gated;
  float left = 1.0f;       // of what the block finds, at its end
  double forgotten = 0.0;  // in the segment

  GMA_INLINE Scan(const Mixture& mixture, const Tokens& tokens, double* state, float* work)
      : mixture(mixture),
        tokens(tokens),
        state(state),
        components(mixture.components),
        padded(mixture.padded()),
        routing(mixture.routing),
        value(tokens.value),
        value_padded(rounded(tokens.value, 16)),
        gated(tokens.gates.open != nullptr) {
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
    grown = work + at.grown;
    opened = work + at.opened;
    memset(memory, 0, sizeof(float) * (at.size - at.readable));
    for (Index lane = 0; lane < kBlock; ++lane) grown[lane] = 1.0f;
    settle(false);
  }

  GMA_INLINE void run() {
    for (Index token = 0; token < tokens.count;) {
      const Index segment = end_of_segment(token, tokens.chunk);
      const Index end = segment < tokens.count ? segment : tokens.count;
      const Index count = end - token < kBlock ? end - token : kBlock;
      const T* q = static_cast<const T*>(tokens.q) + token * tokens.stride;
      const T* k = static_cast<const T*>(tokens.k) + token * tokens.stride;
      const T* val = static_cast<const T*>(tokens.val) + token * tokens.stride;
      const Index left = tokens.count - token - count, next = left < kBlock ? left : kBlock;
      const Index ahead = count * tokens.stride;
      if constexpr (reads) {
        prefetch(q + ahead, tokens.stride, next, routing);
        route(q, count, reading);
      }
      prefetch(k + ahead, tokens.stride, next, routing);
      prefetch(val + ahead, tokens.stride, next, value);
      route(k, count, written);
      if (gated) gate(token, count);
      for (Index i = 0; i < count; ++i) {
        load_row(val + i * tokens.stride, values + i * value_padded, value);
      }
      if constexpr (reads) {
        affinities(written, reading, components, count, affinity);
        divide(count);
        read(static_cast<T*>(tokens.out) + token * tokens.out_stride, token, count);
      }
      write(count);
      token += count;
      if (token == end) settle(token % tokens.chunk == 0);
    }
  }

 private:
  GMA_INLINE void route(const T* from, Index count, float* gamma) {
    turn(from, tokens.stride, count, routing, rows, turned);
    square(mixture, rounded(count, kLanes), turned);
    responsibilities(mixture, turned, count, gamma);
  }

  // What the block's tokens forget, and their usage of the components.
  GMA_INLINE void gate(Index token, Index count) {
    if constexpr (reads) {
      const Gates& gates = tokens.gates;
      count_usage(written, components, gates.usage + token / tokens.chunk * gates.usage_stride);
    }
    if (tokens.gates.rate != nullptr) forget(token, count);
  }

  GMA_INLINE void forget(Index token, Index count) {
    const T* rate = static_cast<const T*>(tokens.gates.rate) + token * tokens.stride;
    for (Index i = 0; i < kBlock; ++i) {
      grown[i] = i < count ? widened(rate[i * tokens.stride]) + tokens.gates.keep_bias : 0.0f;
    }
    for (Index lane = 0; lane < kBlock; lane += kLanes) {
      store(grown + lane, softplus(load(grown + lane), tokens.gates.most));
    }
    float total = 0.0f;
    for (Index i = 0; i < kBlock; ++i) {
      if (i < count) total += grown[i];
      grown[i] = total;
    }
    left = static_cast<float>(exp(-static_cast<double>(total)));
    forgotten += static_cast<double>(total);
    for (Index lane = 0; lane < kBlock; lane += kLanes) {
      const Vector times = exponential(load(grown + lane));
      store(grown + lane, times);
      if (lane >= count) continue;
      for (Index c = 0; c < components; ++c) {
        float* of = written + c * kBlock + lane;
        store(of, load(of) * times);
      }
    }
  }

  // A head's mean, through the output's gate.
  GMA_INLINE void open(Index token, float* mean) {
    const T* gate = static_cast<const T*>(tokens.gates.open) + token * tokens.stride;
    load_row(gate, opened, value);
    for (Index column = 0; column < value_padded; column += kLanes) {
      store(mean + column, load(mean + column) * sigmoid(load(opened + column)));
    }
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
      const Vector epsilon = tokens.epsilon * load(grown + lane);
      store(inverse + lane, 1.0f / (total[0] + total[1] + epsilon));
    }
  }

  // Memory and earlier tokens' values, in one product: they lie behind each other.
  GMA_INLINE void read(T* out, Index first, Index count) {
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
        float* mean = rows + (i - token) * value_padded;
        if (gated) open(first + i, mean);
        store_row(mean, out + i * tokens.out_stride, value);
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
            store(segment + at, (load(segment + at) + acc[i][j]) * left);
            if constexpr (reads) store(memory + at, (load(memory + at) + acc[i][j]) * left);
          }
        }
      });
    }
    for (Index c = 0; c < components; ++c) {
      Vector total{};
      for (Index lane = 0; lane < kBlock; lane += kLanes)
        total += load(written + c * kBlock + lane);
      const float sums = sum(total);
      added[c] = (added[c] + sums) * left;
      mass[c] = (mass[c] + sums) * left;
    }
  }

  // Adds the segment to what is left of the state, from which the next one starts.
  GMA_INLINE void settle(bool row_ends) {
    double* masses = state + components * value;
    const double kept = exp(-forgotten);
    masses[components] += forgotten;
    forgotten = 0.0;
    for (Index c = 0; c < components; ++c) {
      double* row = state + c * value;
      for (Index i = 0; i < value; ++i) {
        row[i] = settled(row[i], kept, segment[c * value_padded + i], row_ends);
        memory[c * value_padded + i] = static_cast<float>(row[i]);
        segment[c * value_padded + i] = 0.0f;
      }
      masses[c] = settled(masses[c], kept, added[c], row_ends);
      mass[c] = static_cast<float>(masses[c]);
      added[c] = 0.0f;
    }
  }
};

template <bool reads>
void scan(const Mixture& mixture, const Tokens& tokens, double* state, float* work) {
  const Flush flush(tokens.gates.open != nullptr);
  by_type(tokens.type,
          [&](auto number) { Scan<decltype(number), reads>(mixture, tokens, state, work).run(); });
}

}  // namespace
}  // namespace gma
