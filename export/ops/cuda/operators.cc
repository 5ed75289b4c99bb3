// The operators for CUDA: what is checked, cut and launched, on ONNX Runtime's stream.
//
// Shapes: R rows of C tokens, D documents, W width, T tail, H heads, r routing_dim, K components,
// v value_dim, G segments. Nothing here waits for the device: where documents' rows stand is found
// there, and whatever lengths and document_of_row hold, no kernel leaves its tensors.
#include <algorithm>
#include <string>
#include <vector>

#include "../src/cuda.h"
#include "causal.h"
#include "cuts.h"
#include "driver.h"
#include "operator.h"
#include "products.h"
#include "scratch.h"
#include "step.h"

namespace gma {
namespace cuda {
namespace {

constexpr const char* provider = "CUDAExecutionProvider";

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
    const Scratch scratch(
        arena_, context,
        {R * sizeof(int32_t), of_documents, of_documents,
         static_cast<size_t>((most + 1) * W * size_of(type)), R * T * W * sizeof(float)});
    void *const lengths = scratch[0], *const first_row = scratch[1], *const row_count = scratch[2],
                *const scaled = scratch[3], *const before = scratch[4];
    step.place(lengths, first_row, row_count, stream);
    launch(function(std::string("scale_taps ") + name_of(type), name_widths),
           {most + 1, parts(W, taps_width)}, stream, taps.data, scale.data, scaled, narrow(T),
           narrow(W));
    char* y = output(context, 0, x.shape);
    char* normal = output(context, 1, x.shape);
    char* tail_after = output(context, 2, tail.shape);
    launch(remember, {std::max(R, D)}, stream, x.data, tail.data, tail_after, before, scale.data,
           lengths, step.document_of_row.data, row_count, first_row, first_row, fresh, narrow(R),
           narrow(D), narrow(C), narrow(W), epsilon_, narrow(T * W), narrow(T));
    // The kernel counts taps from the last of `most`; it does not touch those before the first.
    const char* tail_taps = taps.data - (most - T) * W * static_cast<int64_t>(sizeof(float));
    launch(convolve, {R * parts(C, strip)}, stream, x.data, before, scaled, tail_taps, y, normal,
           normal, narrow(C), narrow(W), epsilon_, narrow(T));
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
  cuda::add<cuda::CausalGMA>(all, signatures::causal);
  cuda::add<cuda::ForgettingGMA>(all, signatures::forgetting);
  cuda::add<cuda::ShortConvolution>(all, signatures::short_convolution);
  cuda::add<cuda::Normalize>(all, signatures::normalize);
  cuda::add<cuda::Linear>(all, signatures::linear);
  return all;
}

}  // namespace gma
