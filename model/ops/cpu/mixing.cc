#include "mixing.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "mixtures.h"
#include "work.h"

namespace gma {
namespace {

// A run of one head's tokens of one document that one thread goes through.
struct Part {
  Index document, head;
  Index first, count;
  Index row, column;  // where in the grid of rows its first token is
  Index before;       // parts of the same head and document before it; they precede it in the list
  bool last;
};

constexpr Index kShortestPart = 1024;

// A document is cut only where its heads alone would leave threads idle: what a part adds has to be
// known before the next can read, and is computed once more for it.
std::vector<Part> parts_of(const std::vector<Document>& documents, Index heads, Index chunk,
                           Index threads) {
  Index tokens = 0;
  for (const Document& document : documents) tokens += document.count;
  const Index share = std::max(kShortestPart, tokens * heads / threads);
  std::vector<Part> parts;
  for (size_t index = 0; index < documents.size(); ++index) {
    const Document& document = documents[index];
    const Index cuts = std::max<Index>(1, (document.count + share - 1) / share);
    const Index length = rounded((document.count + cuts - 1) / cuts, kSegment);
    for (Index head = 0; head < heads; ++head) {
      Index before = 0, first = 0;
      do {
        const Index count = std::min(length, document.count - first);
        parts.push_back({static_cast<Index>(index), head, document.first + first, count,
                         document.row + first / chunk, first % chunk, before++,
                         first + count == document.count});
        first += count;
      } while (first < document.count);
    }
  }
  return parts;
}

// Of a part of a head, beginning with its first token; adds to `usage`, (rows, K) from its row on.
Gates gates_of(const Mixing& mixing, const Part& part, float* usage) {
  const Index gate = part.first * mixing.width + mixing.heads * (2 * mixing.routing + mixing.value);
  Gates gates{};
  gates.open = at(mixing.routed, mixing.type, gate + part.head * mixing.value);
  if (const Index index = part.head - mixing.lasting; index >= 0) {
    gates.rate = at(mixing.routed, mixing.type, gate + mixing.heads * mixing.value + index);
    gates.keep_bias = mixing.keep_bias[index];
  }
  gates.most = mixing.most;
  gates.usage = usage, gates.before = part.column, gates.chunk = mixing.chunk;
  return gates;
}

// As a kernel takes it.
Index state_size(const Mixing& mixing) { return mixing.size() + mixing.components + 1; }

using Scan = decltype(Kernels::causal);

void scan(Scan kernel, const Mixing& mixing, const Mixtures& mixtures, const Part& part,
          double* state, float* usage = nullptr) {
  const Index q = part.first * mixing.width + part.head * mixing.routing;
  const Index k = q + mixing.heads * mixing.routing;
  const Index val =
      part.first * mixing.width + 2 * mixing.heads * mixing.routing + part.head * mixing.value;
  const Index out = part.first * mixing.heads * mixing.value + part.head * mixing.value;
  Tokens tokens{};
  tokens.type = mixing.type;
  tokens.q = at(mixing.routed, mixing.type, q);
  tokens.k = at(mixing.routed, mixing.type, k);
  tokens.val = at(mixing.routed, mixing.type, val);
  tokens.out = at(mixing.out, mixing.type, out);
  tokens.stride = mixing.width;
  tokens.out_stride = mixing.heads * mixing.value;
  tokens.count = part.count;
  tokens.value = mixing.value;
  tokens.epsilon = mixing.epsilon;
  if (mixing.usage != nullptr) tokens.gates = gates_of(mixing, part, usage);
  const Scratch scratch(mixing.components, mixing.routing, mixing.value);
  const Floats work = floats(scratch.size);
  kernel(mixtures[part.head], tokens, state, work.get());
}

void carry(const float* from, bool fresh, Index count, float* to) {
  if (fresh) {
    std::fill(to, to + count, 0.0f);
  } else {
    std::copy(from, from + count, to);
  }
}

// The sums of each part that others of its document follow; of the others, nothing.
std::vector<std::vector<double>> sums_of(const Threads& threads, const Mixing& mixing,
                                         const Mixtures& mixtures, const std::vector<Part>& parts) {
  std::vector<std::vector<double>> sums(parts.size());
  std::vector<size_t> leading;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (!parts[i].last) leading.push_back(i);
  }
  in_parallel(threads, static_cast<Index>(leading.size()), [&](Index i) {
    const size_t index = leading[static_cast<size_t>(i)];
    sums[index].assign(static_cast<size_t>(state_size(mixing)), 0.0);
    scan(kernels().write, mixing, mixtures, parts[index], sums[index].data());
  });
  return sums;
}

// What later parts of a document do to the state before them.
void follow(std::vector<double>& state, const std::vector<double>& sums) {
  const double left = std::exp(-sums.back());
  for (size_t j = 0; j + 1 < state.size(); ++j) state[j] = state[j] * left + sums[j];
}

// Parts may share a row, so each has counted for itself; `counts` (rows, K) of each, by their
// order.
void add_usage(const Mixing& mixing, const std::vector<Part>& parts,
               const std::vector<std::vector<float>>& counts) {
  for (size_t index = 0; index < parts.size(); ++index) {
    if (counts[index].empty()) continue;
    const Part& part = parts[index];
    float* to = mixing.usage + (part.row * mixing.heads + part.head) * mixing.components;
    for (size_t i = 0; i < counts[index].size(); ++i) {
      const auto at = static_cast<Index>(i);
      to[at / mixing.components * mixing.heads * mixing.components + at % mixing.components] +=
          counts[index][i];
    }
  }
}

void run(const Threads& threads, const Mixing& mixing, const Mixtures& mixtures,
         const std::vector<Part>& parts) {
  const std::vector<std::vector<double>> sums = sums_of(threads, mixing, mixtures, parts);
  std::vector<std::vector<float>> counts(parts.size());
  in_parallel(threads, static_cast<Index>(parts.size()), [&](Index i) {
    const auto index = static_cast<size_t>(i);
    const Part& part = parts[index];
    const Index memory_at = part.document * mixing.memory_stride + part.head * mixing.size();
    const Index mass_at = part.document * mixing.mass_stride + part.head * mixing.components;
    const float* memory = mixing.memory + memory_at;
    const float* mass = mixing.mass + mass_at;
    const bool fresh = mixing.fresh != nullptr && mixing.fresh[part.document];
    if (part.count == 0) {  // what most of a pool's states are in a step: left as they are
      carry(memory, fresh, mixing.size(), mixing.memory_after + memory_at);
      carry(mass, fresh, mixing.components, mixing.mass_after + mass_at);
      return;
    }
    std::vector<double> state(static_cast<size_t>(state_size(mixing)), 0.0);
    if (!fresh) {
      std::copy(mass, mass + mixing.components,
                std::copy(memory, memory + mixing.size(), state.begin()));
    }
    for (size_t earlier = index - static_cast<size_t>(part.before); earlier < index; ++earlier) {
      follow(state, sums[earlier]);
    }
    if (mixing.usage != nullptr) {
      const Index rows = (part.column + part.count - 1) / mixing.chunk + 1;
      counts[index].assign(static_cast<size_t>(rows * mixing.components), 0.0f);
    }
    scan(kernels().causal, mixing, mixtures, part, state.data(), counts[index].data());
    if (part.last) {
      const auto narrow = [](double x) { return static_cast<float>(x); };
      const auto masses = state.begin() + mixing.size(), end = masses + mixing.components;
      std::transform(state.begin(), masses, mixing.memory_after + memory_at, narrow);
      std::transform(masses, end, mixing.mass_after + mass_at, narrow);
    }
  });
  if (mixing.usage != nullptr) add_usage(mixing, parts, counts);
}

}  // namespace

void mix(const Threads& threads, const Mixing& mixing, const Mixtures& mixtures,
         const std::vector<Document>& documents) {
  if (mixing.usage != nullptr) {
    std::fill_n(mixing.usage, mixing.rows * mixing.heads * mixing.components, 0.0f);
  }
  run(threads, mixing, mixtures, parts_of(documents, mixing.heads, mixing.chunk, threads.count()));
}

}  // namespace gma
