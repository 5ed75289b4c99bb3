#include "mixing.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "mixtures.h"
#include "work.h"

namespace gma {
namespace {

// Rows of one document, as one head sees them, that one thread goes through.
struct Part {
  Index document, head;
  Index first, count;  // tokens
  Index row;           // that of the first token
  Index before;        // parts of the same head and document before it; they precede it in the list
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
    const Index length = rounded((document.count + cuts - 1) / cuts, std::max<Index>(chunk, 1));
    for (Index head = 0; head < heads; ++head) {
      Index before = 0, first = 0;
      do {
        const Index count = std::min(length, document.count - first);
        parts.push_back({static_cast<Index>(index), head, document.first + first, count,
                         document.row + first / chunk, before++, first + count == document.count});
        first += count;
      } while (first < document.count);
    }
  }
  return parts;
}

// Its segments, in order.
std::vector<Part> segments_of(const Part& part, Index chunk) {
  std::vector<Part> segments;
  for (Index first = 0; first < part.count;) {
    const Index end = std::min(end_of_segment(first, chunk), part.count);
    Part segment = part;
    segment.first = part.first + first, segment.count = end - first;
    segment.row = part.row + first / chunk;
    segments.push_back(segment);
    first = end;
  }
  return segments;
}

// Of a part of a head, beginning with its first token.
Gates gates_of(const Mixing& mixing, const Part& part) {
  const Index gate = part.first * mixing.width + mixing.heads * (2 * mixing.routing + mixing.value);
  Gates gates{};
  gates.open = at(mixing.routed, mixing.type, gate + part.head * mixing.value);
  if (const Index index = part.head - mixing.lasting; index >= 0) {
    gates.rate = at(mixing.routed, mixing.type, gate + mixing.heads * mixing.value + index);
    gates.keep_bias = mixing.keep_bias[index];
  }
  gates.most = mixing.most;
  gates.usage = mixing.usage + (part.row * mixing.heads + part.head) * mixing.components;
  gates.usage_stride = mixing.heads * mixing.components;
  return gates;
}

// As a kernel takes it.
size_t state_size(const Mixing& mixing) {
  return static_cast<size_t>(mixing.size() + mixing.components + 1);
}

using Scan = decltype(Kernels::causal);

void scan(Scan kernel, const Mixing& mixing, const Mixtures& mixtures, const Part& part,
          double* state) {
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
  tokens.chunk = mixing.chunk;
  tokens.value = mixing.value;
  tokens.epsilon = mixing.epsilon;
  if (mixing.usage != nullptr) tokens.gates = gates_of(mixing, part);
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

// Each segment's sums, one's behind the other's, of the parts that others of their document follow;
// of the others, nothing.
std::vector<std::vector<double>> sums_of(const Threads& threads, const Mixing& mixing,
                                         const Mixtures& mixtures, const std::vector<Part>& parts) {
  std::vector<std::vector<double>> sums(parts.size());
  std::vector<size_t> leading;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (!parts[i].last) leading.push_back(i);
  }
  in_parallel(threads, static_cast<Index>(leading.size()), [&](Index i) {
    const size_t index = leading[static_cast<size_t>(i)];
    const std::vector<Part> segments = segments_of(parts[index], mixing.chunk);
    sums[index].assign(segments.size() * state_size(mixing), 0.0);
    double* of_segment = sums[index].data();
    for (const Part& segment : segments) {
      scan(kernels().write, mixing, mixtures, segment, of_segment);
      of_segment += state_size(mixing);
    }
  });
  return sums;
}

// The state that a part finds: as if one thread had gone through all of its document.
std::vector<double> found(const Mixing& mixing, const std::vector<Part>& parts, size_t index,
                          const std::vector<std::vector<double>>& sums, const float* memory,
                          const float* mass) {
  std::vector<double> state(state_size(mixing), 0.0);
  if (memory != nullptr) {
    std::copy(mass, mass + mixing.components,
              std::copy(memory, memory + mixing.size(), state.begin()));
  }
  for (size_t earlier = index - static_cast<size_t>(parts[index].before); earlier < index;
       ++earlier) {
    const double* of_segment = sums[earlier].data();
    Index end = 0;
    for (const Part& segment : segments_of(parts[earlier], mixing.chunk)) {
      end += segment.count;
      kernels().follow(state.data(), of_segment, mixing.size() + mixing.components,
                       end % mixing.chunk == 0);
      of_segment += state_size(mixing);
    }
  }
  return state;
}

void run(const Threads& threads, const Mixing& mixing, const Mixtures& mixtures,
         const std::vector<Part>& parts) {
  const std::vector<std::vector<double>> sums = sums_of(threads, mixing, mixtures, parts);
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
    std::vector<double> state =
        found(mixing, parts, index, sums, fresh ? nullptr : memory, fresh ? nullptr : mass);
    scan(kernels().causal, mixing, mixtures, part, state.data());
    if (part.last) {
      const auto narrow = [](double x) { return static_cast<float>(x); };
      const auto masses = state.begin() + mixing.size(), end = masses + mixing.components;
      std::transform(state.begin(), masses, mixing.memory_after + memory_at, narrow);
      std::transform(masses, end, mixing.mass_after + mass_at, narrow);
    }
  });
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
