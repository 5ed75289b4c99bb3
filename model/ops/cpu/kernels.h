// What the CPU computes: pointers, counts and strides.
//
// Letters as in the operators' documentation: R rows of C tokens, D documents, W width, H heads,
// r routing_dim, K components, v value_dim, T tail, I and O a product's inputs and outputs.
//
// kernels.cc is compiled once for each set of instructions; kernels() gives the best that this
// processor has. Nothing of it throws or allocates.
#pragma once

#include <cstddef>
#include <cstdint>

// No inline function of this header may be linked from the code of one set of instructions into
// that of another.
#define GMA_INLINE inline __attribute__((always_inline))

namespace gma {

using Index = std::ptrdiff_t;

enum class Type { float32, float16, bfloat16 };

constexpr GMA_INLINE Index size_of(Type type) { return type == Type::float32 ? 4 : 2; }

// Tokens whose affinities are formed explicitly, and into which every run of tokens is cut.
constexpr Index kBlock = 32;

// Tokens of a row that are summed in float32 before their sum is added to the state, which is
// float64 up to the row's end. There it is rounded, as where a call ends: so it does not matter
// which rows of a document are read together.
constexpr Index kSegment = 256;

// The largest rate at which a token forgets: over a block it adds up to what exp can undo.
constexpr float kMostForgotten = 0.25f;

// Columns of a product that a task computes, and what a packed matrix has a multiple of.
constexpr Index kPanel = 128;

// Rows of a product that are taken through a panel together: whole tiles of any instructions.
constexpr Index kRowsAtOnce = 24;

// Where the element is that so many lie before.
GMA_INLINE const void* at(const void* data, Type type, Index elements) {
  return static_cast<const char*>(data) + elements * size_of(type);
}
GMA_INLINE void* at(void* data, Type type, Index elements) {
  return static_cast<char*>(data) + elements * size_of(type);
}

constexpr GMA_INLINE Index rounded(Index size, Index to) { return (size + to - 1) / to * to; }

// Where the segment of a token ends, in rows of `chunk` tokens: both count from a row's first one.
constexpr GMA_INLINE Index end_of_segment(Index token, Index chunk) {
  const Index row = token / chunk * chunk, end = row + rounded(token - row + 1, kSegment);
  return end < row + chunk ? end : row + chunk;
}

// One head of a mixture, packed so that eight components lie side by side.
struct Mixture {
  Index components;      // K
  Index routing;         // r
  const float* weights;  // (2r, padded()): linear, then quadratic, transposed; 0 beyond K
  const float* bias;     // (padded(),); 0 beyond K
  bool normalize;
  float epsilon;  // added to the mean square that a routing vector is normalised by

  GMA_INLINE Index padded() const { return rounded(components, 8); }
};

// What each token of a head does beside its write, in the form that forgets.
struct Gates {
  const void* open;  // (count, v): sigmoids of it multiply what is read, or null in other forms
  const void* rate;  // (count,): softplus of it is the rate, or null if the head keeps all
  float keep_bias;
  float most;    // the largest rate, at most kMostForgotten
  float* usage;  // (K,) of each row: its sums of responsibilities are added to it
  Index usage_stride;
};

// One head of tokens of a document, from a row's first one or a segment's on. Those of Gates are
// `stride` apart too.
struct Tokens {
  Type type;
  const void* q;    // (count, r)
  const void* k;    // (count, r)
  const void* val;  // (count, v)
  void* out;        // (count, v)
  Index stride;     // elements from a token's q, k or val to the next token's
  Index out_stride;
  Index count;
  Index chunk;    // tokens of a row
  Index value;    // v
  float epsilon;  // added to the mass that is divided by
  Gates gates;
};

// What a scan works in. It lies in one piece of `size` floats on a boundary of 64 bytes.
struct Scratch {
  Index turned;    // (2r, kBlock): routing vectors and their squares, a token in each column
  Index rows;      // (kBlock, max(r, v)): tokens as they were loaded or will be stored
  Index written;   // (K, kBlock): responsibilities of keys
  Index reading;   // (K + kBlock, kBlock): responsibilities of queries, then affinities
  Index readable;  // (K + kBlock, v): the memory before the block, then the block's values
  Index segment;   // (K, v): what the segment has added
  Index mass;      // (K,) before the block
  Index added;     // (K,) what the segment has added to it
  Index inverse;   // (kBlock,)
  Index grown;     // (kBlock,): one over what is kept from the block's beginning up to a token
  Index opened;    // (v,)
  Index size;

  GMA_INLINE Scratch(Index components, Index routing, Index value) {
    const Index k = rounded(components, 16), r = rounded(routing, 16), v = rounded(value, 16);
    turned = 0;
    rows = turned + 2 * r * kBlock;
    written = rows + kBlock * (r > v ? r : v);
    reading = written + k * kBlock;
    readable = reading + (k + kBlock) * kBlock;
    segment = readable + (k + kBlock) * v;
    mass = segment + k * v;
    added = mass + k;
    inverse = added + k;
    grown = inverse + kBlock;
    opened = grown + kBlock;
    size = opened + v;
  }
};

struct Product {
  Type type;
  const void* x;         // (rows, inputs)
  const void* weight;    // (inputs, outputs), or null if it is packed
  const void* residual;  // (rows, outputs) or null
  void* y;               // (rows, outputs)
  Index rows, inputs, outputs;
  bool gelu;
  const float* packed = nullptr;  // see Kernels::pack

  // Of one panel; `work` is on a boundary of 64 bytes.
  GMA_INLINE Index work_floats() const {
    const Index of_panel = packed == nullptr ? kPanel : 0;
    return kRowsAtOnce * kPanel + inputs * (kRowsAtOnce + of_panel);
  }
};

struct Convolution {
  Type type;
  const void* x;               // (count, W): a document's tokens
  const float* tail;           // (T, W) normalised tokens before them, or null for zeros
  const float* scale;          // (W,)
  const float* taps;           // (T + 1, W)
  void* y;                     // (count, W)
  void* normal;                // (count, W)
  float* tail_after;           // (T, W)
  Index count, width, length;  // length: T
  float epsilon;

  GMA_INLINE Index work_floats() const { return (length + 2) * width; }
};

// Sums of products of integers, (rows, width), and what each row's and each column's are scaled by.
struct Sums {
  const int32_t* sums;
  const float *of_row, *of_column;
  float* y;  // (rows, width): they are put there, or added to what it has
  Index rows, width;
  bool add;
};

// What tokens say for labels: with a factor for each label, softplus(read + bias + own) times it;
// else read + bias times softplus of what stands behind the labels' of both, plus own.
struct Scoring {
  const float* read;      // of each token `width`
  const float* table;     // (V, labels): what tokens say of their own
  const float* bias;      // (labels,) or (labels + 1,)
  const float* factor;    // (labels,) or null
  const int64_t* tokens;  // ids
  Index width, labels;

  GMA_INLINE Index work_doubles() const { return 2 * rounded(labels, 16); }
};

struct Kernels {
  const char* instructions;

  // They go through the tokens; `state` (memory (K, v), then mass (K,)) is what came before them
  // and becomes what follows. The number behind it grows by what is forgotten: exp(-that) of what
  // came before is left. `write` reads nothing for the tokens: it has no queries, no `out`, and
  // adds to no `usage`.
  void (*causal)(const Mixture&, const Tokens&, double* state, float* work);
  void (*write)(const Mixture&, const Tokens&, double* state, float* work);

  // What a segment's sums, as `write` leaves them from zeros, do to the `size` numbers of a state
  // before it; whether it ends a row.
  void (*follow)(double* state, const double* sums, Index size, bool row_ends);

  // The rows [first, last) and the panel of columns that starts at `column`.
  void (*product)(const Product&, Index first, Index last, Index column, float* work);

  // A matrix (inputs, outputs) as products take it fastest: inputs * rounded(outputs, kPanel)
  // floats, in an order of these instructions.
  void (*pack)(const float* weight, Index inputs, Index outputs, float* packed);

  // The tokens [first, last); those that the last is among write the tail.
  void (*convolve)(const Convolution&, Index first, Index last, float* work);

  // `work` has `width` floats.
  void (*normalize)(Type, const void* x, void* normal, Index rows, Index width, float epsilon,
                    float* work);

  // In place.
  void (*gelu)(float* x, Index count);

  // What the tokens [first, last) say: their sums, in the order of the tokens, (labels,).
  void (*score)(const Scoring&, Index first, Index last, double* work, float* evidence);

  // See layers.h.
  void (*quantize)(const float* x, int8_t* y, float* scale, Index rows, Index width);
  void (*dequantize)(const Sums&, Index first, Index last);
};

// The best that this processor has, or those that GMA_OPS_INSTRUCTIONS names in the environment.
// Throws std::runtime_error if there are no such.
const Kernels& kernels();

}  // namespace gma
