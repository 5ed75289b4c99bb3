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

// The last input of ForgettingGMA, and where a token's numbers for it lie in routed.
struct Gated {
  Tensor keep_bias;
  int64_t lasting;
  int64_t open, rates;  // numbers before the output's gates, and before the rates

  Gated(const Ort::KernelContext& context, const Mixed& mixed)
      : keep_bias(context, 9), open(mixed.tokens()), rates(open + mixed.H * mixed.v) {
    require(keep_bias.shape.size() == 1 && keep_bias.shape[0] <= mixed.H,
            "keep_bias must be (F,), of at most H heads");
    lasting = mixed.H - keep_bias.shape[0];
    require(mixed.token >= rates + mixed.H - lasting, "routed has less than its parts");
    require(mixed.token % 16 == 0, "routed must be of a width that is a multiple of 16");
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
    const int64_t heads = forgets ? step.R * mixed.H : 0;  // of all rows
    const size_t of_documents = step.D * sizeof(int32_t);
    const Scratch scratch(
        arena_, context,
        {step.R * sizeof(int32_t), of_documents, of_documents,
         mixed.programs() * (mixed.v + 1) * mixed.K * sizeof(float),
         static_cast<size_t>(step.R * mixed.H * step.C * mixed.K * size_of(type)),
         mixed.programs() * (mixed.segment / of_block) * mixed.K * sizeof(float),
         forgets ? mixed.programs() * sizeof(float) : 0, heads * step.C * sizeof(float),
         heads * parts(step.C, of_block) * sizeof(float),
         forgets ? mixed.programs() * mixed.K * sizeof(float) : 0});
    const Work work{scratch[0], scratch[1], scratch[2], scratch[3], scratch[4],
                    scratch[5], scratch[6], scratch[7], scratch[8], scratch[9]};
    step.place(work.lengths, work.first_row, work.row_count, stream);
    if constexpr (forgets) {
      const Gated gated(context, mixed);
      forget(mixed, gated, work, stream);
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
  // decays, grown and left what is forgotten, counts each segment's usage.
  struct Work {
    void *lengths, *first_row, *row_count, *sums, *gammas, *masses, *decays, *grown, *left, *counts;
  };

  // Tokens. In units of a longer block's beginning, a float16 does not hold what is written.
  static constexpr int64_t of_block =
      forgets && type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? short_block : block;
  static constexpr const char* form = forgets ? " forgetting" : "";

  Function kernel(const char* name, const Mixed& mixed, const char* form) const {
    return function(std::string(name) + " " + name_of(type) + " " + mixed.shape +
                        (normalize_ ? " normalized" : " plain") + form,
                    name_shapes);
  }
  static const char* keys(const Mixed& mixed) {
    return mixed.routed.data + mixed.H * mixed.r * size_of(type);
  }
  static const char* values(const Mixed& mixed) {
    return mixed.routed.data + 2 * mixed.H * mixed.r * size_of(type);
  }

  // grown (R, H, C), left (R, H, blocks).
  void forget(const Mixed& mixed, const Gated& gated, const Work& work, CUstream stream) const {
    const int heads = mixed.H <= few_heads ? few_heads : most_heads;
    const std::string key = std::string("forget ") + name_of(type) + " " + std::to_string(heads);
    launch(function(key, name_shapes), {mixed.step.R * parts(mixed.step.C, of_block)}, stream,
           mixed.routed.data, gated.keep_bias.data, work.lengths, work.grown, work.left,
           narrow(mixed.step.C), narrow(mixed.token), most_, narrow(gated.rates), narrow(mixed.H),
           narrow(gated.lasting));
  }

  // usage (R, H, K), the operator's last output.
  void count(const Ort::KernelContext& context, const Mixed& mixed, const Work& work,
             CUstream stream) const {
    char* usage = output(context, 3, {mixed.step.R, mixed.H, mixed.K});
    launch(kernel("count", mixed, ""), {mixed.programs()}, stream, keys(mixed), mixed.linear.data,
           mixed.quadratic.data, mixed.bias.data, work.lengths, work.counts, narrow(mixed.row()),
           narrow(mixed.token), narrow(mixed.r), narrow(mixed.step.C), mixed.segments,
           narrow(mixed.H), mixed.segment, routing_epsilon_);
    launch(function("add_counts " + std::to_string(mixed.K), name_shapes), {mixed.step.R * mixed.H},
           stream, work.counts, usage, mixed.segments, narrow(mixed.H));
  }

  // sums (G, H, v + 1, K) of the segments.
  void sum(const Mixed& mixed, const Work& work, CUstream stream) const {
    const Function sum = kernel("sum", mixed, form);
    const int32_t token = narrow(mixed.token), row = narrow(mixed.row());
    const int32_t r = narrow(mixed.r), v = narrow(mixed.v), C = narrow(mixed.step.C);
    const int32_t H = narrow(mixed.H);
    const Grid grid{mixed.programs()};
    if constexpr (forgets) {
      launch(sum, grid, stream, keys(mixed), values(mixed), work.grown, work.left,
             mixed.linear.data, mixed.quadratic.data, mixed.bias.data, work.lengths, work.sums,
             work.decays, work.gammas, work.masses, row, token, r, row, token, v, C, mixed.segments,
             H, mixed.segment, routing_epsilon_);
    } else {
      launch(sum, grid, stream, keys(mixed), values(mixed), mixed.linear.data, mixed.quadratic.data,
             mixed.bias.data, work.lengths, work.sums, work.gammas, work.masses, row, token, r, row,
             token, v, C, mixed.segments, H, mixed.segment, routing_epsilon_);
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
