// CausalGMA and ForgettingGMA for CUDA: the sums of segments, the states before them, what their
// tokens read.
#pragma once

#include <algorithm>
#include <string>

#include "cuts.h"
#include "driver.h"
#include "scratch.h"
#include "step.h"

namespace gma::cuda {

// What both operators take but fresh, and how it is cut.
struct Mixed {
  Tensor routed, memory, mass, linear, quadratic, bias;
  int64_t H, K, r, v;
  int64_t token;  // numbers of a token in routed
  Step step;
  int32_t segment, segments;
  std::string shape;

  explicit Mixed(const Ort::KernelContext& context)
      : routed(context, 0),
        memory(context, 1),
        mass(context, 2),
        linear(context, 3),
        quadratic(context, 4),
        bias(context, 5),
        H(dimension(linear, 3, 0, "linear must be (H, K, r)")),
        K(linear.shape[1]),
        r(linear.shape[2]),
        v(dimension(memory, 4, 3, "memory must be (D, H, K, v)")),
        token(dimension(routed, 3, 2, "routed must be (R, C, what is projected)")),
        step(context, 6, routed.shape[0], routed.shape[1], memory.shape[0]) {
    require(memory.is({step.D, H, K, v}), "memory must be (D, H, K, v)");
    require(mass.is({step.D, H, K}), "mass must be (D, H, K)");
    require(quadratic.is({H, K, r}), "quadratic must be (H, K, r)");
    require(bias.is({H, K}), "bias must be (H, K)");
    segment = cut();
    segments = narrow(parts(step.C, segment));
    shape = std::to_string(r) + "x" + std::to_string(K) + "x" + std::to_string(v);
  }

  int64_t tokens() const { return H * (2 * r + v); }  // of q, k and val
  int64_t row() const { return step.C * token; }
  int64_t programs() const { return step.R * segments * H; }
  std::string state() const { return std::to_string(K) + "x" + std::to_string(v); }

 private:
  static int64_t dimension(const Tensor& tensor, size_t rank, size_t index, const char* message) {
    require(tensor.shape.size() == rank, message);
    return tensor.shape[index];
  }

  // Tokens of a segment, as gma.model.ops.triton: long ones save memory traffic, many keep the
  // device busy.
  int32_t cut() const {
    int32_t tokens = 64;
    while (tokens < 1024 && tokens < step.C) tokens *= 2;
    while (tokens > 64 && step.R * H * parts(step.C, tokens) < enough) tokens /= 2;
    return tokens;
  }
};

// The gates of ForgettingGMA: its last inputs, and where a token's lie in routed.
struct Gated {
  Tensor write_bias, keep_bias;
  int64_t lasting, blocks;
  int64_t open, strength;  // numbers before the output's gates, and before those of writing

  Gated(const Ort::KernelContext& context, const Mixed& mixed)
      : write_bias(context, 9),
        keep_bias(context, 10),
        blocks(parts(mixed.step.C, block)),
        open(mixed.tokens()),
        strength(open + mixed.H * mixed.v) {
    require(write_bias.is({mixed.H}), "write_bias must be (H,)");
    require(keep_bias.shape.size() == 1 && keep_bias.shape[0] <= mixed.H,
            "keep_bias must be (F,), of at most H heads");
    lasting = mixed.H - keep_bias.shape[0];
    require(mixed.token >= strength + 2 * mixed.H - lasting, "routed has less than its parts");
    require(mixed.token % 16 == 0, "the kernels for CUDA take routed of a width that is a multiple of 16");
    require(mixed.H <= most_heads, "the kernels for CUDA take fewer heads that forget");
  }
};

template <Type type, bool forgets>
class Mixer {
 public:
  explicit Mixer(Ort::ConstKernelInfo info)
      : arena_(info),
        normalize_(info.GetAttribute<int64_t>("normalize")),
        epsilon_(info.GetAttribute<float>("epsilon")),
        routing_epsilon_(info.GetAttribute<float>("routing_epsilon")),
        most_(forgets ? info.GetAttribute<float>("most_forgotten") : 0.0f) {
    require(normalize_ == 0 || normalize_ == 1, "normalize must be 0 or 1");
    require(0.0f <= most_ && most_ <= 0.25f, "most_forgotten must be from 0 to 1/4");
  }

  void compute(Ort::KernelContext& context) const {
    const Mixed mixed(context);
    const Step& step = mixed.step;
    const char* fresh = fresh_of(context, 8, step.D);
    const CUstream stream = stream_of(context);
    const int64_t of_gates = forgets ? step.R * mixed.H : 0;
    const size_t of_documents = step.D * sizeof(int32_t);
    const Scratch scratch(
        arena_, context,
        {step.R * sizeof(int32_t), of_documents, of_documents,
         mixed.programs() * (mixed.v + 1) * mixed.K * sizeof(float),
         static_cast<size_t>(step.R * mixed.H * step.C * mixed.K * size_of(type)),
         mixed.programs() * (mixed.segment / block) * mixed.K * sizeof(float),
         forgets ? mixed.programs() * sizeof(float) : 0, of_gates * step.C * sizeof(float),
         of_gates * step.C * sizeof(float), of_gates * parts(step.C, block) * sizeof(float),
         forgets ? mixed.programs() * mixed.K * sizeof(float) : 0});
    const Work work{scratch[0], scratch[1], scratch[2], scratch[3], scratch[4], scratch[5],
                    scratch[6], scratch[7], scratch[8], scratch[9], scratch[10]};
    step.place(work.lengths, work.first_row, work.row_count, stream);
    if constexpr (forgets) {
      const Gated gated(context, mixed);
      gate(mixed, gated, work, stream);
      count(context, mixed, work, stream);
      sum(mixed, work, stream);
      prefix(context, mixed, work, fresh, stream);
      read(context, mixed, gated, work, stream);
    } else {
      require(mixed.token == mixed.tokens(), "routed must be (R, C, H * (2r + v))");
      sum(mixed, work, stream);
      prefix(context, mixed, work, fresh, stream);
      read(context, mixed, work, stream);
    }
  }

 private:
  // What kernels leave for each other; gammas and masses are what `read` goes on from `sum` with,
  // decays, times, grown and left what the gates come to, counts each segment's usage.
  struct Work {
    void *lengths, *first_row, *row_count, *sums, *gammas, *masses, *decays, *times, *grown, *left,
        *counts;
  };

  Function kernel(const char* name, const Mixed& mixed, const char* form) const {
    return function(std::string(name) + " " + name_of(type) + " " + mixed.shape +
                        (normalize_ ? " normalized" : " plain") + form,
                    name_shapes);
  }
  static constexpr const char* form = forgets ? " forgetting" : "";

  static const char* keys(const Mixed& mixed) {
    return mixed.routed.data + mixed.H * mixed.r * size_of(type);
  }
  static const char* values(const Mixed& mixed) {
    return mixed.routed.data + 2 * mixed.H * mixed.r * size_of(type);
  }

  // times and grown (R, H, C), left (R, H, blocks).
  void gate(const Mixed& mixed, const Gated& gated, const Work& work, CUstream stream) const {
    const int heads = mixed.H <= few_heads ? few_heads : most_heads;
    launch(function(std::string("gate ") + name_of(type) + " " + std::to_string(heads), name_shapes),
           {mixed.step.R * gated.blocks}, stream, mixed.routed.data, gated.write_bias.data,
           gated.keep_bias.data, work.lengths, work.times, work.grown, work.left,
           narrow(mixed.step.C), narrow(mixed.token), most_, narrow(gated.strength),
           narrow(mixed.H), narrow(gated.lasting));
  }

  // usage (R, H, K), the operator's last output.
  void count(const Ort::KernelContext& context, const Mixed& mixed, const Work& work,
             CUstream stream) const {
    char* usage = output(context, 3, {mixed.step.R, mixed.H, mixed.K});
    launch(kernel("count", mixed, ""), {mixed.programs()}, stream, keys(mixed), mixed.linear.data,
           mixed.quadratic.data, mixed.bias.data, work.lengths, work.counts, narrow(mixed.row()),
           narrow(mixed.token), narrow(mixed.r), narrow(mixed.step.C), mixed.segments,
           narrow(mixed.H), mixed.segment, routing_epsilon_);
    launch(function("add_counts " + std::to_string(mixed.K), name_shapes),
           {mixed.step.R * mixed.H}, stream, work.counts, usage, mixed.segments, narrow(mixed.H));
  }

  // sums (G, H, v + 1, K) of the segments.
  void sum(const Mixed& mixed, const Work& work, CUstream stream) const {
    const Function sum = kernel("sum", mixed, form);
    const int32_t token = narrow(mixed.token), row = narrow(mixed.row());
    const int32_t r = narrow(mixed.r), v = narrow(mixed.v), C = narrow(mixed.step.C);
    const int32_t H = narrow(mixed.H);
    const Grid grid{mixed.programs()};
    if constexpr (forgets) {
      launch(sum, grid, stream, keys(mixed), values(mixed), work.times, work.left,
             mixed.linear.data, mixed.quadratic.data, mixed.bias.data, work.lengths, work.sums,
             work.decays, work.gammas, work.masses, row, token, r, row, token, v, C, mixed.segments,
             H, mixed.segment, routing_epsilon_);
    } else {
      launch(sum, grid, stream, keys(mixed), values(mixed), mixed.linear.data,
             mixed.quadratic.data, mixed.bias.data, work.lengths, work.sums, work.gammas,
             work.masses, row, token, r, row, token, v, C, mixed.segments, H, mixed.segment,
             routing_epsilon_);
    }
  }

  // The sums become the states before the segments; memory_after and mass_after are written.
  void prefix(const Ort::KernelContext& context, const Mixed& mixed, const Work& work,
              const char* fresh, CUstream stream) const {
    const int64_t D = mixed.step.D, H = mixed.H, K = mixed.K, v = mixed.v;
    char* memory_after = output(context, 1, {D, H, K, v});
    char* mass_after = output(context, 2, {D, H, K});
    const int32_t document = narrow(H * K * v), head = narrow(K * v), component = narrow(v);
    const int32_t mass_document = narrow(H * K), mass_head = narrow(K);
    const Grid grid{parts((v + 1) * K, tile), H, std::min<int64_t>(D, documents_at_once)};
    const Function prefix = function("prefix " + mixed.state() + form, name_shapes);
    const auto start = [&](auto... sums) {
      launch(prefix, grid, stream, sums..., mixed.memory.data, mixed.mass.data, memory_after,
             mass_after, work.first_row, work.row_count, work.first_row, fresh, narrow(D), document,
             head, component, mass_document, mass_head, document, head, component, mass_document,
             mass_head, mixed.segments, narrow(H));
    };
    if constexpr (forgets) {
      start(work.sums, work.decays);
    } else {
      start(work.sums);
    }
  }

  void read(const Ort::KernelContext& context, const Mixed& mixed, const Work& work,
            CUstream stream) const {
    char* out = output(context, 0, {mixed.step.R, mixed.step.C, mixed.H * mixed.v});
    const int32_t token = narrow(mixed.token), row = narrow(mixed.row());
    launch(kernel("read", mixed, form), {mixed.programs()}, stream, mixed.routed.data, work.gammas,
           work.masses, values(mixed), mixed.linear.data, mixed.quadratic.data, mixed.bias.data,
           work.lengths, work.sums, out, row, token, narrow(mixed.r), row, token, narrow(mixed.v),
           narrow(mixed.step.C), mixed.segments, epsilon_, narrow(mixed.H), mixed.segment,
           routing_epsilon_);
  }

  void read(const Ort::KernelContext& context, const Mixed& mixed, const Gated& gated,
            const Work& work, CUstream stream) const {
    char* out = output(context, 0, {mixed.step.R, mixed.step.C, mixed.H * mixed.v});
    const int32_t token = narrow(mixed.token), row = narrow(mixed.row()), v = narrow(mixed.v);
    const char* open = mixed.routed.data + gated.open * size_of(type);
    launch(kernel("read", mixed, form), {mixed.programs()}, stream, mixed.routed.data, work.gammas,
           work.masses, values(mixed), work.grown, work.left, open, mixed.linear.data,
           mixed.quadratic.data, mixed.bias.data, work.lengths, work.sums, out, row, token,
           narrow(mixed.r), row, token, v, row, token, v, narrow(mixed.step.C), mixed.segments,
           epsilon_, narrow(mixed.H), mixed.segment, routing_epsilon_);
  }

  const Arena arena_;
  const int64_t normalize_;
  const float epsilon_, routing_epsilon_, most_;
};

template <Type type>
using CausalGMA = Mixer<type, false>;
template <Type type>
using ForgettingGMA = Mixer<type, true>;

}  // namespace gma::cuda
