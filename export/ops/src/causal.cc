#include "causal.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "documents.h"
#include "kernels.h"
#include "mixtures.h"
#include "tensors.h"
#include "work.h"

namespace gma {
namespace {

// A run of one head's tokens of one document that one thread goes through.
struct Part {
  Index document, head;
  Index first, count;
  Index before;  // parts of the same head and document before it; they precede it in the list
  bool last;
};

constexpr Index kShortestPart = 1024;

// A document is cut only where its heads alone would leave threads idle: what a part adds has to be
// known before the next can read, and is computed once more for it.
std::vector<Part> parts_of(const std::vector<Document>& documents, Index heads) {
  Index tokens = 0;
  for (const Document& document : documents) tokens += document.count;
  const Index share = std::max(kShortestPart, tokens * heads / threads());
  std::vector<Part> parts;
  for (size_t index = 0; index < documents.size(); ++index) {
    const Document& document = documents[index];
    const Index cuts = std::max<Index>(1, (document.count + share - 1) / share);
    const Index length = rounded((document.count + cuts - 1) / cuts, kSegment);
    for (Index head = 0; head < heads; ++head) {
      Index before = 0, first = 0;
      do {
        const Index count = std::min(length, document.count - first);
        parts.push_back({static_cast<Index>(index), head, document.first + first, count, before++,
                         first + count == document.count});
        first += count;
      } while (first < document.count);
    }
  }
  return parts;
}

// What the operator takes and gives: its tensors, beginning with those of the first document.
struct Step {
  const void* routed;
  Type type;
  Index width, heads, routing, value, components;
  Index size;  // of one head's memory
  float epsilon;
  const float *memory, *mass;
  const bool* fresh;
  void* out;
  float *memory_after, *mass_after;

  // In the form that forgets; elsewhere `usage` is null.
  Index chunk, lasting;  // tokens of a row; heads that keep all
  const float* keep_bias;
  float most;
  float* usage;  // (R, H, K)

  Index state() const { return size + components + 1; }  // as a kernel takes it
};

// Of a part of a head, beginning with its first token; adds to `usage`, (rows, K) from its row on.
Gates gates_of(const Step& step, const Part& part, float* usage) {
  const Index gate = part.first * step.width + step.heads * (2 * step.routing + step.value);
  Gates gates{};
  gates.open = at(step.routed, step.type, gate + part.head * step.value);
  if (const Index index = part.head - step.lasting; index >= 0) {
    gates.rate = at(step.routed, step.type, gate + step.heads * step.value + index);
    gates.keep_bias = step.keep_bias[index];
  }
  gates.most = step.most;
  gates.usage = usage, gates.before = part.first % step.chunk, gates.chunk = step.chunk;
  return gates;
}

using Scan = decltype(Kernels::causal);

void scan(Scan kernel, const Step& step, const Mixtures& mixtures, const Part& part, double* state,
          float* usage = nullptr) {
  const Index q = part.first * step.width + part.head * step.routing;
  const Index k = q + step.heads * step.routing;
  const Index val = part.first * step.width + 2 * step.heads * step.routing +
                    part.head * step.value;
  const Index out = part.first * step.heads * step.value + part.head * step.value;
  Tokens tokens{};
  tokens.type = step.type;
  tokens.q = at(step.routed, step.type, q);
  tokens.k = at(step.routed, step.type, k);
  tokens.val = at(step.routed, step.type, val);
  tokens.out = at(step.out, step.type, out);
  tokens.stride = step.width;
  tokens.out_stride = step.heads * step.value;
  tokens.count = part.count;
  tokens.value = step.value;
  tokens.epsilon = step.epsilon;
  if (step.usage != nullptr) tokens.gates = gates_of(step, part, usage);
  const Scratch scratch(step.components, step.routing, step.value);
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
std::vector<std::vector<double>> sums_of(Ort::KernelContext& context, const Step& step,
                                         const Mixtures& mixtures, const std::vector<Part>& parts) {
  std::vector<std::vector<double>> sums(parts.size());
  std::vector<size_t> leading;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (!parts[i].last) leading.push_back(i);
  }
  in_parallel(context, static_cast<Index>(leading.size()), [&](Index i) {
    const size_t index = leading[static_cast<size_t>(i)];
    sums[index].assign(static_cast<size_t>(step.state()), 0.0);
    scan(kernels().write, step, mixtures, parts[index], sums[index].data());
  });
  return sums;
}

// What later parts of a document do to the state before them.
void follow(std::vector<double>& state, const std::vector<double>& sums) {
  const double left = std::exp(-sums.back());
  for (size_t j = 0; j + 1 < state.size(); ++j) state[j] = state[j] * left + sums[j];
}

// Parts may share a row, so each has counted for itself; `counts` (rows, K) of each, by their order.
void add_usage(const Step& step, const std::vector<Part>& parts,
               const std::vector<std::vector<float>>& counts) {
  for (size_t index = 0; index < parts.size(); ++index) {
    if (counts[index].empty()) continue;
    const Part& part = parts[index];
    float* to = step.usage + (part.first / step.chunk * step.heads + part.head) * step.components;
    for (size_t i = 0; i < counts[index].size(); ++i) {
      const auto at = static_cast<Index>(i);
      to[at / step.components * step.heads * step.components + at % step.components] +=
          counts[index][i];
    }
  }
}

void run(Ort::KernelContext& context, const Step& step, const Mixtures& mixtures,
         const std::vector<Part>& parts) {
  const std::vector<std::vector<double>> sums = sums_of(context, step, mixtures, parts);
  std::vector<std::vector<float>> counts(parts.size());
  in_parallel(context, static_cast<Index>(parts.size()), [&](Index i) {
    const auto index = static_cast<size_t>(i);
    const Part& part = parts[index];
    const Index row = part.document * step.heads + part.head;
    const float* memory = step.memory + row * step.size;
    const float* mass = step.mass + row * step.components;
    const bool fresh = step.fresh[part.document];
    if (part.count == 0) {  // what most of a pool's states are in a step: left as they are
      carry(memory, fresh, step.size, step.memory_after + row * step.size);
      carry(mass, fresh, step.components, step.mass_after + row * step.components);
      return;
    }
    std::vector<double> state(static_cast<size_t>(step.state()), 0.0);
    if (!fresh) {
      std::copy(mass, mass + step.components,
                std::copy(memory, memory + step.size, state.begin()));
    }
    for (size_t earlier = index - static_cast<size_t>(part.before); earlier < index; ++earlier) {
      follow(state, sums[earlier]);
    }
    if (step.usage != nullptr) {
      const Index rows = (part.first % step.chunk + part.count - 1) / step.chunk + 1;
      counts[index].assign(static_cast<size_t>(rows * step.components), 0.0f);
    }
    scan(kernels().causal, step, mixtures, part, state.data(), counts[index].data());
    if (part.last) {
      const auto narrow = [](double x) { return static_cast<float>(x); };
      const auto masses = state.begin() + step.size, end = masses + step.components;
      std::transform(state.begin(), masses, step.memory_after + row * step.size, narrow);
      std::transform(masses, end, step.mass_after + row * step.components, narrow);
    }
  });
  if (step.usage != nullptr) add_usage(step, parts, counts);
}

}  // namespace

Mixer::Mixer(Ort::ConstKernelInfo info, bool forgets)
    : normalize_(info.GetAttribute<int64_t>("normalize") != 0),
      forgets_(forgets),
      routing_epsilon_(info.GetAttribute<float>("routing_epsilon")),
      epsilon_(info.GetAttribute<float>("epsilon")),
      most_(forgets ? info.GetAttribute<float>("most_forgotten") : 0.0f) {
  require(0.0f <= most_ && most_ <= kMostForgotten, "most_forgotten must be from 0 to 1/4");
}

void Mixer::compute(Ort::KernelContext& context) const {
  const Input routed(context, 0, "routed"), memory(context, 1, "memory"), mass(context, 2, "mass"),
      linear(context, 3, "linear"), quadratic(context, 4, "quadratic"), bias(context, 5, "bias"),
      lengths(context, 6, "lengths"), document_of_row(context, 7, "document_of_row"),
      fresh(context, 8, "fresh");
  const int64_t rows = routed.has(3).shape()[0], chunk = routed.shape()[1];
  const int64_t heads = linear.has(3).shape()[0], components = linear.shape()[1];
  const int64_t routing = linear.shape()[2];
  const int64_t documents = memory.has(4).shape()[0], value = memory.shape()[3];
  require(heads > 0 && components > 0 && routing > 0 && value > 0, "a mixture without a size");
  memory.is({documents, heads, components, value});
  mass.is({documents, heads, components});
  quadratic.is(linear.shape());
  bias.is({heads, components});
  lengths.is({rows});
  document_of_row.is({rows});
  fresh.is({documents});

  Step step{};
  int64_t width = heads * (2 * routing + value);
  if (forgets_) {
    const Input keep_bias(context, 9, "keep_bias");
    const int64_t forgetting = keep_bias.has(1).shape()[0];
    require(forgetting <= heads, "keep_bias has more than heads");
    width += heads * value + forgetting;
    require(routed.shape()[2] >= width, "routed has less than its parts");
    width = routed.shape()[2];
    step.chunk = chunk, step.lasting = heads - forgetting;
    step.keep_bias = keep_bias.of<float>(), step.most = most_;
    step.usage = static_cast<float*>(output(context, 3, {rows, heads, components}));
    std::fill_n(step.usage, rows * heads * components, 0.0f);
  }
  routed.is({rows, chunk, width});

  const Mixtures mixtures(linear.of<float>(), quadratic.of<float>(), bias.of<float>(),
                          linear.shape(), normalize_, routing_epsilon_);
  const std::vector<Document> found = documents_of(
      lengths.of<int64_t>(), document_of_row.of<int64_t>(), rows, chunk, documents);

  step.routed = routed.data(), step.type = routed.type(), step.width = width;
  step.heads = heads, step.routing = routing, step.value = value;
  step.memory = memory.of<float>(), step.mass = mass.of<float>(), step.fresh = fresh.of<bool>();
  step.size = components * value, step.components = components, step.epsilon = epsilon_;
  step.out = output(context, 0, {rows, chunk, heads * value});
  clear(step.out, step.type, lengths.of<int64_t>(), rows, chunk, heads * value);
  step.memory_after = static_cast<float*>(output(context, 1, memory.shape()));
  step.mass_after = static_cast<float*>(output(context, 2, mass.shape()));
  run(context, step, mixtures, parts_of(found, heads));
}

}  // namespace gma
