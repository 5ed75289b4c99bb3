// CausalGMA for CUDA: the sums of segments, the states before them, what their tokens read.
#pragma once

#include <algorithm>
#include <string>

#include "cuts.h"
#include "driver.h"
#include "scratch.h"
#include "step.h"

namespace gma::cuda {

// The operator's inputs but the last, fresh, and how they are cut.
struct Mixed {
  Tensor routed, memory, mass, linear, quadratic, bias;
  int64_t H, K, r, v;
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
        step(context, 6, dimension(routed, 3, 0, "routed must be (R, C, H * (2r + v))"),
             routed.shape[1], memory.shape[0]) {
    require(routed.shape[2] == token(), "routed must be (R, C, H * (2r + v))");
    require(memory.is({step.D, H, K, v}), "memory must be (D, H, K, v)");
    require(mass.is({step.D, H, K}), "mass must be (D, H, K)");
    require(quadratic.is({H, K, r}), "quadratic must be (H, K, r)");
    require(bias.is({H, K}), "bias must be (H, K)");
    segment = cut();
    segments = narrow(parts(step.C, segment));
    shape = std::to_string(r) + "x" + std::to_string(K) + "x" + std::to_string(v);
  }

  int64_t token() const { return H * (2 * r + v); }
  int64_t row() const { return step.C * token(); }
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

template <Type type>
class CausalGMA {
 public:
  explicit CausalGMA(Ort::ConstKernelInfo info)
      : arena_(info),
        normalize_(info.GetAttribute<int64_t>("normalize")),
        epsilon_(info.GetAttribute<float>("epsilon")),
        routing_epsilon_(info.GetAttribute<float>("routing_epsilon")) {
    require(normalize_ == 0 || normalize_ == 1, "normalize must be 0 or 1");
  }

  void compute(Ort::KernelContext& context) const {
    const Mixed mixed(context);
    const Step& step = mixed.step;
    const char* fresh = fresh_of(context, 8, step.D);
    const CUstream stream = stream_of(context);
    const Function sum = kernel("sum", mixed), read = kernel("read", mixed);
    const size_t of_documents = step.D * sizeof(int32_t);
    const Scratch scratch(
        arena_, context,
        {step.R * sizeof(int32_t), of_documents, of_documents,
         mixed.programs() * (mixed.v + 1) * mixed.K * sizeof(float),
         static_cast<size_t>(step.R * mixed.H * step.C * mixed.K * size_of(type)),
         mixed.programs() * (mixed.segment / block) * mixed.K * sizeof(float)});
    void *const lengths = scratch[0], *const first_row = scratch[1], *const row_count = scratch[2],
                *const sums = scratch[3], *const gammas = scratch[4], *const masses = scratch[5];
    step.place(lengths, first_row, row_count, stream);
    this->sum(sum, mixed, lengths, sums, gammas, masses, stream);
    prefix(context, mixed, sums, first_row, row_count, fresh, stream);
    char* out = output(context, 0, {step.R, step.C, mixed.H * mixed.v});
    const int32_t token = narrow(mixed.token()), row = narrow(mixed.row());
    const char* val = mixed.routed.data + 2 * mixed.H * mixed.r * size_of(type);
    launch(read, {mixed.programs()}, stream, mixed.routed.data, gammas, masses, val,
           mixed.linear.data, mixed.quadratic.data, mixed.bias.data, lengths, sums, out, row, token,
           narrow(mixed.r), row, token, narrow(mixed.v), narrow(step.C), mixed.segments, epsilon_,
           narrow(mixed.H), mixed.segment, routing_epsilon_);
  }

 private:
  Function kernel(const char* name, const Mixed& mixed) const {
    return function(std::string(name) + " " + name_of(type) + " " + mixed.shape +
                        (normalize_ ? " normalized" : " plain"),
                    name_shapes);
  }

  // sums (G, H, v + 1, K) of the segments; gammas and masses are what `read` goes on from.
  void sum(const Function& kernel, const Mixed& mixed, const void* lengths, void* sums,
           void* gammas, void* masses, CUstream stream) const {
    const int32_t token = narrow(mixed.token()), row = narrow(mixed.row());
    const int32_t r = narrow(mixed.r), v = narrow(mixed.v);
    const char* k = mixed.routed.data + mixed.H * mixed.r * size_of(type);
    const char* val = k + mixed.H * mixed.r * size_of(type);
    launch(kernel, {mixed.programs()}, stream, k, val, mixed.linear.data, mixed.quadratic.data,
           mixed.bias.data, lengths, sums, gammas, masses, row, token, r, row, token, v,
           narrow(mixed.step.C), mixed.segments, narrow(mixed.H), mixed.segment, routing_epsilon_);
  }

  // The sums become the states before the segments; memory_after and mass_after are written.
  void prefix(const Ort::KernelContext& context, const Mixed& mixed, void* sums,
              const void* first_row, const void* row_count, const char* fresh,
              CUstream stream) const {
    const int64_t D = mixed.step.D, H = mixed.H, K = mixed.K, v = mixed.v;
    char* memory_after = output(context, 1, {D, H, K, v});
    char* mass_after = output(context, 2, {D, H, K});
    const int32_t document = narrow(H * K * v), head = narrow(K * v), component = narrow(v);
    const int32_t mass_document = narrow(H * K), mass_head = narrow(K);
    const Grid grid{parts((v + 1) * K, tile), H, std::min<int64_t>(D, documents_at_once)};
    launch(function("prefix " + mixed.state(), name_shapes), grid, stream, sums, mixed.memory.data,
           mixed.mass.data, memory_after, mass_after, first_row, row_count, first_row, fresh,
           narrow(D), document, head, component, mass_document, mass_head, document, head,
           component, mass_document, mass_head, mixed.segments, narrow(H));
  }

  const Arena arena_;
  const int64_t normalize_;
  const float epsilon_, routing_epsilon_;
};

}  // namespace gma::cuda
