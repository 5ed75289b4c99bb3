// The operators for CUDA: what is checked, cut and launched, on ONNX Runtime's stream.
//
// Shapes: R rows of C tokens, D documents, W width, T tail, H heads, r routing_dim, K components,
// v value_dim, G segments. Nothing here waits for the device: where documents' rows stand is found
// there, and whatever lengths and document_of_row hold, no kernel leaves its tensors.
#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "../src/cuda.h"
#include "cuts.h"
#include "driver.h"
#include "scratch.h"
#include "operator.h"
#include "products.h"

namespace gma {
namespace cuda {
namespace {

constexpr const char* provider = "CUDAExecutionProvider";
constexpr const char* name_shapes =
    "name routing_dim x num_components x value_dim in GMA_SHAPES, or the device in "
    "GMA_ARCHITECTURES, when it is built";
constexpr const char* name_widths =
    "name the width, or a power of two that is no less, in GMA_WIDTHS, or the device in "
    "GMA_ARCHITECTURES, when it is built";

using Type = ONNXTensorElementDataType;

const char* name_of(Type type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return "float16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return "bfloat16";
    default: return "float";
  }
}

constexpr int64_t size_of(Type type) { return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 2; }

int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// An input: where it is on the device, and its shape.
struct Tensor {
  const char* data;
  std::vector<int64_t> shape;

  Tensor(const Ort::KernelContext& context, size_t index) {
    const Ort::ConstValue value = context.GetInput(index);
    data = static_cast<const char*>(value.GetTensorRawData());
    shape = value.GetTensorTypeAndShapeInfo().GetShape();
  }

  bool is(std::initializer_list<int64_t> sizes) const {
    return std::equal(shape.begin(), shape.end(), sizes.begin(), sizes.end());
  }
};

char* output(const Ort::KernelContext& context, size_t index, const std::vector<int64_t>& shape) {
  return static_cast<char*>(context.GetOutput(index, shape).GetTensorMutableRawData());
}

CUstream stream_of(const Ort::KernelContext& context) {
  return static_cast<CUstream>(context.GetGPUComputeStream());
}

// Where the rows of a step are: its inputs lengths, document_of_row and, unless it is -1, fresh.
struct Step {
  Tensor lengths, document_of_row;
  int64_t R, C, D;

  Step(const Ort::KernelContext& context, size_t first, int64_t rows, int64_t chunk,
       int64_t documents)
      : lengths(context, first),
        document_of_row(context, first + 1),
        R(rows),
        C(chunk),
        D(documents) {
    require(lengths.is({R}), "lengths must be (R,)");
    require(document_of_row.is({R}), "document_of_row must be (R,)");
  }

  // known_lengths (R,), first_row and row_count (D,), see kernels.place.
  void place(void* known_lengths, void* first_row, void* row_count, CUstream stream) const {
    launch(function("place", name_shapes), {std::max(D, parts(R, rows_at_once))}, stream,
           lengths.data, document_of_row.data, known_lengths, first_row, row_count, narrow(R),
           narrow(D), narrow(C));
  }
};

const char* fresh_of(const Ort::KernelContext& context, size_t index, int64_t documents) {
  const Tensor fresh(context, index);
  require(fresh.is({documents}), "fresh must be (D,)");
  return fresh.data;
}

// What the three forms of the mixer take: routed, memory, mass, linear, quadratic, bias, lengths,
// document_of_row.
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

  // Tokens of a segment, as model.ops.triton.Plan: long ones save memory traffic, many keep the
  // device busy.
  int32_t cut() const {
    int32_t tokens = 64;
    while (tokens < 1024 && tokens < step.C) tokens *= 2;
    while (tokens > 64 && step.R * H * parts(step.C, tokens) < enough) tokens /= 2;
    return tokens;
  }
};

template <Type type>
class Mixer {
 public:
  explicit Mixer(Ort::ConstKernelInfo info)
      : arena_(info),
        normalize_(info.GetAttribute<int64_t>("normalize")),
        routing_epsilon_(info.GetAttribute<float>("routing_epsilon")) {
    require(normalize_ == 0 || normalize_ == 1, "normalize must be 0 or 1");
  }

 protected:
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
              const void* first_row, const void* row_count, const char* fresh, size_t first_output,
              CUstream stream) const {
    const int64_t D = mixed.step.D, H = mixed.H, K = mixed.K, v = mixed.v;
    char* memory_after = output(context, first_output, {D, H, K, v});
    char* mass_after = output(context, first_output + 1, {D, H, K});
    const int32_t document = narrow(H * K * v), head = narrow(K * v), component = narrow(v);
    const int32_t mass_document = narrow(H * K), mass_head = narrow(K);
    const Grid grid{parts((v + 1) * K, tile), H, std::min<int64_t>(D, documents_at_once)};
    launch(function("prefix " + mixed.state(), name_shapes), grid, stream, sums, mixed.memory.data,
           mixed.mass.data, memory_after, mass_after, first_row, row_count, first_row, fresh,
           narrow(D), document, head, component, mass_document, mass_head, document, head,
           component, mass_document, mass_head, mixed.segments, narrow(H));
  }

  static size_t sums_size(const Mixed& mixed) {
    return mixed.programs() * (mixed.v + 1) * mixed.K * sizeof(float);
  }

  const Arena arena_;
  const int64_t normalize_;
  const float routing_epsilon_;
};

template <Type type>
class Causal : Mixer<type> {
 public:
  explicit Causal(Ort::ConstKernelInfo info)
      : Mixer<type>(info), epsilon_(info.GetAttribute<float>("epsilon")) {}

  void compute(Ort::KernelContext& context) const {
    const Mixed mixed(context);
    const Step& step = mixed.step;
    const char* fresh = fresh_of(context, 8, step.D);
    const CUstream stream = stream_of(context);
    const Function sum = this->kernel("sum", mixed), read = this->kernel("read", mixed);
    const size_t of_documents = step.D * sizeof(int32_t);
    const Scratch scratch(
        this->arena_, context,
        {step.R * sizeof(int32_t), of_documents, of_documents, this->sums_size(mixed),
         static_cast<size_t>(step.R * mixed.H * step.C * mixed.K * size_of(type)),
         mixed.programs() * (mixed.segment / block) * mixed.K * sizeof(float)});
    void *const lengths = scratch[0], *const first_row = scratch[1], *const row_count = scratch[2],
                *const sums = scratch[3], *const gammas = scratch[4], *const masses = scratch[5];
    step.place(lengths, first_row, row_count, stream);
    this->sum(sum, mixed, lengths, sums, gammas, masses, stream);
    this->prefix(context, mixed, sums, first_row, row_count, fresh, 1, stream);
    char* out = output(context, 0, {step.R, step.C, mixed.H * mixed.v});
    const int32_t token = narrow(mixed.token()), row = narrow(mixed.row());
    const char* val = mixed.routed.data + 2 * mixed.H * mixed.r * size_of(type);
    launch(read, {mixed.programs()}, stream, mixed.routed.data, gammas, masses, val,
           mixed.linear.data, mixed.quadratic.data, mixed.bias.data, lengths, sums, out, row, token,
           narrow(mixed.r), row, token, narrow(mixed.v), narrow(step.C), mixed.segments, epsilon_,
           narrow(mixed.H), mixed.segment, this->routing_epsilon_);
  }

 private:
  const float epsilon_;
};

template <Type type>
class Write : Mixer<type> {
 public:
  explicit Write(Ort::ConstKernelInfo info) : Mixer<type>(info) {}

  void compute(Ort::KernelContext& context) const {
    const Mixed mixed(context);
    const Step& step = mixed.step;
    const char* fresh = fresh_of(context, 8, step.D);
    const CUstream stream = stream_of(context);
    const Function sum = this->kernel("write", mixed);
    const size_t of_documents = step.D * sizeof(int32_t);
    const Scratch scratch(this->arena_, context,
                          {step.R * sizeof(int32_t), of_documents, of_documents,
                           this->sums_size(mixed)});
    void *const lengths = scratch[0], *const first_row = scratch[1], *const row_count = scratch[2],
                *const sums = scratch[3];
    step.place(lengths, first_row, row_count, stream);
    this->sum(sum, mixed, lengths, sums, sums, sums, stream);
    this->prefix(context, mixed, sums, first_row, row_count, fresh, 0, stream);
  }
};

template <Type type>
class Read : Mixer<type> {
 public:
  explicit Read(Ort::ConstKernelInfo info)
      : Mixer<type>(info), epsilon_(info.GetAttribute<float>("epsilon")) {}

  void compute(Ort::KernelContext& context) const {
    const Mixed mixed(context);
    const Step& step = mixed.step;
    const CUstream stream = stream_of(context);
    const Function recall = this->kernel("recall", mixed);
    const size_t of_documents = step.D * sizeof(int32_t);
    const Scratch scratch(
        this->arena_, context,
        {step.R * sizeof(int32_t), of_documents, of_documents,
         step.D * mixed.H * (mixed.v + 1) * mixed.K * sizeof(float)});
    void *const lengths = scratch[0], *const states = scratch[3];
    step.place(lengths, scratch[1], scratch[2], stream);
    launch(function("pack " + mixed.state(), name_shapes), {step.D * mixed.H}, stream,
           mixed.memory.data, mixed.mass.data, states);
    char* out = output(context, 0, {step.R, step.C, mixed.H * mixed.v});
    launch(recall, {mixed.programs()}, stream, mixed.routed.data, mixed.linear.data,
           mixed.quadratic.data, mixed.bias.data, lengths, step.document_of_row.data, states, out,
           narrow(mixed.row()), narrow(mixed.token()), narrow(mixed.r), narrow(step.C),
           mixed.segments, epsilon_, narrow(mixed.H), mixed.segment, this->routing_epsilon_);
  }

 private:
  const float epsilon_;
};

// The kernel for rows of this width: for it alone, or for all up to a power of two. Loads are wide
// where each row begins at a multiple of 16.
Function of_rows(const char* name, Type type, int64_t width) {
  const std::string named = std::string(name) + " " + name_of(type) + " ";
  if (std::find(std::begin(exact), std::end(exact), width) != std::end(exact)) {
    return function(named + std::to_string(width) + " exact", name_widths);
  }
  const auto padded = std::find_if(std::begin(widths), std::end(widths),
                                   [&](int64_t padded) { return padded >= width; });
  const std::string least = std::to_string(padded != std::end(widths) ? *padded : width);
  return function(named + least + (width % 16 == 0 ? " aligned" : " any"), name_widths);
}

template <Type type>
class ShortConvolution {
 public:
  explicit ShortConvolution(Ort::ConstKernelInfo info)
      : arena_(info), epsilon_(info.GetAttribute<float>("epsilon")) {}

  void compute(Ort::KernelContext& context) const {
    const Tensor x(context, 0), tail(context, 1), scale(context, 2), taps(context, 3);
    require(x.shape.size() == 3, "x must be (R, C, W)");
    require(tail.shape.size() == 3, "tail must be (D, T, W)");
    const int64_t R = x.shape[0], C = x.shape[1], W = x.shape[2];
    const int64_t D = tail.shape[0], T = tail.shape[1];
    require(tail.is({D, T, W}), "tail must be (D, T, W)");
    require(scale.is({W}), "scale must be (W,)");
    require(taps.is({T + 1, W}), "taps must be (T + 1, W)");
    require(1 <= T && T <= most, "the kernels for CUDA take 2 to 4 taps");
    const Step step(context, 4, R, C, D);
    const char* fresh = fresh_of(context, 6, D);
    const CUstream stream = stream_of(context);
    const Function convolve = of_rows("convolve", type, W), remember = of_rows("remember", type, W);
    const size_t of_documents = D * sizeof(int32_t);
    const Scratch scratch(arena_, context,
                          {R * sizeof(int32_t), of_documents, of_documents,
                           static_cast<size_t>((most + 1) * W * size_of(type))});
    void *const lengths = scratch[0], *const first_row = scratch[1], *const row_count = scratch[2],
                *const scaled = scratch[3];
    step.place(lengths, first_row, row_count, stream);
    launch(function(std::string("scale_taps ") + name_of(type), name_widths),
           {most + 1, parts(W, taps_width)}, stream, taps.data, scale.data, scaled, narrow(T),
           narrow(W));
    char* y = output(context, 0, x.shape);
    char* normal = output(context, 1, x.shape);
    char* tail_after = output(context, 2, tail.shape);
    const int32_t document = narrow(T * W);
    // The kernel counts taps from the last of `most`; it does not touch those before the first.
    const char* tail_taps = taps.data - (most - T) * W * static_cast<int64_t>(sizeof(float));
    launch(convolve, {R * parts(C, strip)}, stream, x.data, tail.data, scaled, tail_taps, lengths,
           step.document_of_row.data, first_row, first_row, fresh, y, normal, normal, narrow(C),
           narrow(W), epsilon_, document, narrow(T));
    launch(remember, {D}, stream, x.data, tail.data, tail_after, scale.data, lengths, row_count,
           first_row, first_row, fresh, narrow(C), narrow(W), epsilon_, document, narrow(T));
  }

 private:
  static constexpr int64_t most = 3;  // tokens of the past

  const Arena arena_;
  const float epsilon_;
};

template <Type type>
class Normalize {
 public:
  explicit Normalize(Ort::ConstKernelInfo info) : epsilon_(info.GetAttribute<float>("epsilon")) {}

  void compute(Ort::KernelContext& context) const {
    const Tensor x(context, 0);
    require(!x.shape.empty(), "x must have a dimension");
    const int64_t width = x.shape.back();
    int64_t count = 1;
    for (size_t axis = 0; axis + 1 < x.shape.size(); ++axis) count *= x.shape[axis];
    char* normal = output(context, 0, x.shape);
    if (width == 0) return;
    launch(of_rows("normalize", type, width), {parts(count, strip)}, stream_of(context), x.data,
           normal, normal, narrow(width), epsilon_, narrow(count));
  }

 private:
  const float epsilon_;
};

template <Type type>
class Linear {
 public:
  explicit Linear(Ort::ConstKernelInfo info) : arena_(info), products_(type) {
    const auto activation = info.GetAttribute<std::string>("activation");
    require(activation == "none" || activation == "gelu", "activation must be none or gelu");
    gelu_ = activation == "gelu";
  }

  void compute(Ort::KernelContext& context) {
    const Tensor x(context, 0), weight(context, 1);
    require(!x.shape.empty() && weight.shape.size() == 2, "x must be (..., I), weight (I, O)");
    const int64_t I = weight.shape[0], O = weight.shape[1];
    require(x.shape.back() == I, "x must be (..., I), weight (I, O)");
    std::vector<int64_t> shape = x.shape;
    shape.back() = O;
    int64_t M = 1;
    for (size_t axis = 0; axis + 1 < x.shape.size(); ++axis) M *= x.shape[axis];
    const bool adds = context.GetInputCount() > 2 && context.GetInput(2) != nullptr;
    const char* residual = nullptr;
    if (adds) {
      const Tensor added(context, 2);
      require(added.shape == shape, "residual must be (..., O), as the product");
      residual = added.data;
    }
    char* y = output(context, 0, shape);
    if (M * O == 0) return;
    require(I > 0, "x must not be empty");
    const CUstream stream = stream_of(context);
    const Product whole{M, I, O, x.data, weight.data, residual, y, gelu_};
    if (products_.multiply(whole, arena_, context, stream)) return;
    const Product plain{M, I, O, x.data, weight.data, nullptr, y, false};
    const bool more = gelu_ || adds;
    if (!(more && products_.multiply(plain, arena_, context, stream))) {
      throw std::runtime_error("cuBLASLt has no algorithm for these sizes");
    }
    const std::string key =
        std::string("finish ") + name_of(type) + (gelu_ ? " gelu" : "") + (adds ? " add" : "");
    launch(function(key, name_shapes), {parts(M * O, elements)}, stream, y, adds ? residual : y,
           narrow(M * O));
  }

 private:
  const Arena arena_;
  Products products_;
  bool gelu_;
};

template <template <Type> class Kernel>
void add(std::vector<const OrtCustomOp*>& all, const Signature& signature) {
  constexpr Type single = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  constexpr Type half = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  constexpr Type brain = ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
  static const Operator<Kernel<single>> of_single(signature, single, provider);
  static const Operator<Kernel<half>> of_half(signature, half, provider);
  static const Operator<Kernel<brain>> of_brain(signature, brain, provider);
  all.insert(all.end(), {&of_single, &of_half, &of_brain});
}

}  // namespace
}  // namespace cuda

std::vector<const OrtCustomOp*> cuda_operators() {
  std::vector<const OrtCustomOp*> all;
  cuda::add<cuda::Causal>(all, signatures::causal);
  cuda::add<cuda::Write>(all, signatures::write);
  cuda::add<cuda::Read>(all, signatures::read);
  cuda::add<cuda::ShortConvolution>(all, signatures::short_convolution);
  cuda::add<cuda::Normalize>(all, signatures::normalize);
  cuda::add<cuda::Linear>(all, signatures::linear);
  return all;
}

}  // namespace gma
