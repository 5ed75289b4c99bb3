// Compiled once for each set of instructions, into the namespace that GMA_INSTRUCTIONS names.
#include "kernels.h"

#include "vectors.h"

#define GMA_TEXT_(name) #name
#define GMA_TEXT(name) GMA_TEXT_(name)

namespace gma {
namespace {

// Rows of a tile: with two vectors of columns, as many sums as the registers hold.
constexpr int kRows = kLanes == 16 ? 8 : 4;

template <int n>
struct Count {
  static constexpr int value = n;
};

// action(Count<vectors>, first column) for tiles that cover columns [first, last).
template <class Action>
GMA_INLINE void across(Index first, Index last, Action&& action) {
  for (; first + 2 * kLanes <= last; first += 2 * kLanes) action(Count<2>{}, first);
  for (; first < last; first += kLanes) action(Count<1>{}, first);
}

// Tokens (count, width), `stride` apart, -> to (width, kBlock): a token in each column, zeros beyond
// the last. Rows up to `width` rounded to 16 are written. `rows` holds (kBlock, width).
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

// One head's scan; its parts in the order of the chunked form.
template <class T, bool writes, bool reads>
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
      if constexpr (writes) {
        prefetch(k + ahead, tokens.stride, next, routing);
        prefetch(val + ahead, tokens.stride, next, value);
        route(k, count, written);
        for (Index i = 0; i < count; ++i) {
          load_row(val + i * tokens.stride, values + i * value_padded, value);
        }
      }
      if constexpr (writes && reads) affinities(written, reading, components, count, affinity);
      if constexpr (reads) {
        divide(count);
        read(static_cast<T*>(tokens.out) + token * tokens.out_stride, count);
      }
      if constexpr (writes) {
        write(count);
        if (left <= kBlock || (token + kBlock) % kSegment == 0) settle();
      }
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
      if constexpr (writes) {
        const Index last = lane + kLanes < count ? lane + kLanes : count;
        for (Index writer = 0; writer < last; ++writer) {
          total[writer % 2] += load(affinity + writer * kBlock + lane);
        }
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
                             padded + (writes ? last : 0));
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

template <bool writes, bool reads>
void scan(const Mixture& mixture, const Tokens& tokens, double* state, float* work) {
  switch (tokens.type) {
    case Type::float32: return Scan<float, writes, reads>(mixture, tokens, state, work).run();
    case Type::float16: return Scan<Half, writes, reads>(mixture, tokens, state, work).run();
    case Type::bfloat16: return Scan<Brain, writes, reads>(mixture, tokens, state, work).run();
  }
}

// x / (1 + exp(-2u)) is x (1 + tanh(u)) / 2
GMA_INLINE Vector gelu(Vector x) {
  const Vector u = 0.797884561f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exponential(-2.0f * u));
}

template <class T>
GMA_INLINE void product_of(const Product& p, Index first, Index last, Index column, float* work) {
  const Index padded = rounded(p.inputs, 16);
  const Index columns = p.outputs - column < kPanel ? p.outputs - column : kPanel;
  float* panel = work;                        // (I, kPanel)
  float* turned = panel + padded * kPanel;    // (I, kBlock)
  float* rows = turned + padded * kBlock;     // (kBlock, I)
  float* results = rows + kBlock * padded;    // (kRows, kPanel)
  float* residuals = results + kRows * kPanel;  // (kPanel,)
  memset(panel, 0, sizeof(float) * padded * kPanel);
  memset(residuals, 0, sizeof(float) * kPanel);
  const T* weight = static_cast<const T*>(p.weight) + column;
  for (Index i = 0; i < p.inputs; ++i) load_row(weight + i * p.outputs, panel + i * kPanel, columns);
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
  switch (p.type) {
    case Type::float32: return product_of<float>(p, first, last, column, work);
    case Type::float16: return product_of<Half>(p, first, last, column, work);
    case Type::bfloat16: return product_of<Brain>(p, first, last, column, work);
  }
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
  switch (c.type) {
    case Type::float32: return convolve_of<float>(c, first, last, work);
    case Type::float16: return convolve_of<Half>(c, first, last, work);
    case Type::bfloat16: return convolve_of<Brain>(c, first, last, work);
  }
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
  switch (type) {
    case Type::float32: return normalize_of<float>(x, normal, rows, width, epsilon, work);
    case Type::float16: return normalize_of<Half>(x, normal, rows, width, epsilon, work);
    case Type::bfloat16: return normalize_of<Brain>(x, normal, rows, width, epsilon, work);
  }
}

}  // namespace

namespace GMA_INSTRUCTIONS {
extern const Kernels kernels{GMA_TEXT(GMA_INSTRUCTIONS), scan<true, true>, scan<true, false>,
                             scan<false, true>,          product,          convolve,
                             normalize};
}  // namespace GMA_INSTRUCTIONS
}  // namespace gma
