#include "cpu.h"

#include <string>
#include <vector>

#include "layers.h"
#include "mixing.h"
#include "operator.h"
#include "session.h"
#include "tensors.h"

namespace gma {
namespace {

class Mixer {
 public:
  Mixer(Ort::ConstKernelInfo info, bool forgets)
      : normalize_(info.GetAttribute<int64_t>("normalize") != 0),
        forgets_(forgets),
        routing_epsilon_(info.GetAttribute<float>("routing_epsilon")),
        epsilon_(info.GetAttribute<float>("epsilon")),
        most_(forgets ? info.GetAttribute<float>("most_forgotten") : 0.0f) {
    require(0.0f <= most_ && most_ <= kMostForgotten, "most_forgotten must be from 0 to 1/4");
  }

  void compute(Ort::KernelContext& context) const {
    const Input routed(context, 0, "routed"), memory(context, 1, "memory"),
        mass(context, 2, "mass"), linear(context, 3, "linear"), quadratic(context, 4, "quadratic"),
        bias(context, 5, "bias"), lengths(context, 6, "lengths"),
        document_of_row(context, 7, "document_of_row"), fresh(context, 8, "fresh");
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

    Mixing mixing{};
    int64_t width = heads * (2 * routing + value);
    if (forgets_) {
      const Input keep_bias(context, 9, "keep_bias");
      const int64_t forgetting = keep_bias.has(1).shape()[0];
      require(forgetting <= heads, "keep_bias has more than heads");
      width += heads * value + forgetting;
      require(routed.shape()[2] >= width, "routed has less than its parts");
      width = routed.shape()[2];
      mixing.lasting = heads - forgetting;
      mixing.keep_bias = keep_bias.of<float>(), mixing.most = most_;
      mixing.usage = static_cast<float*>(output(context, 3, {rows, heads, components}));
    }
    routed.is({rows, chunk, width});

    const Mixtures mixtures(linear.of<float>(), quadratic.of<float>(), bias.of<float>(), heads,
                            components, routing, normalize_, routing_epsilon_);
    const std::vector<Document> found = documents_of(
        lengths.of<int64_t>(), document_of_row.of<int64_t>(), rows, chunk, documents, Layout::grid);

    mixing.routed = routed.data(), mixing.type = routed.type();
    mixing.rows = rows, mixing.chunk = chunk, mixing.width = width;
    mixing.heads = heads, mixing.routing = routing, mixing.value = value;
    mixing.components = components, mixing.epsilon = epsilon_;
    mixing.memory = memory.of<float>(), mixing.mass = mass.of<float>();
    mixing.memory_stride = heads * components * value, mixing.mass_stride = heads * components;
    mixing.fresh = fresh.of<bool>();
    mixing.out = output(context, 0, {rows, chunk, heads * value});
    clear(mixing.out, mixing.type, lengths.of<int64_t>(), rows, chunk, heads * value);
    mixing.memory_after = static_cast<float*>(output(context, 1, memory.shape()));
    mixing.mass_after = static_cast<float*>(output(context, 2, mass.shape()));
    mix(SessionThreads(context), mixing, mixtures, found);
  }

 private:
  bool normalize_, forgets_;
  float routing_epsilon_, epsilon_, most_;
};

struct CausalGMA : Mixer {
  explicit CausalGMA(Ort::ConstKernelInfo info) : Mixer(info, false) {}
};

struct ForgettingGMA : Mixer {
  explicit ForgettingGMA(Ort::ConstKernelInfo info) : Mixer(info, true) {}
};

class ShortConvolution {
 public:
  explicit ShortConvolution(Ort::ConstKernelInfo info)
      : epsilon_(info.GetAttribute<float>("epsilon")) {}

  void compute(Ort::KernelContext& context) const {
    const Input x(context, 0, "x"), tail(context, 1, "tail"), scale(context, 2, "scale"),
        taps(context, 3, "taps"), lengths(context, 4, "lengths"),
        document_of_row(context, 5, "document_of_row"), fresh(context, 6, "fresh");
    const int64_t rows = x.has(3).shape()[0], chunk = x.shape()[1], width = x.shape()[2];
    const int64_t documents = tail.has(3).shape()[0], length = tail.shape()[1];
    require(width > 0, "x has no width");
    tail.is({documents, length, width});
    scale.is({width});
    taps.is({length + 1, width});
    lengths.is({rows});
    document_of_row.is({rows});
    fresh.is({documents});

    const Type type = x.type();
    const std::vector<Document> found = documents_of(
        lengths.of<int64_t>(), document_of_row.of<int64_t>(), rows, chunk, documents, Layout::grid);
    void* y = output(context, 0, x.shape());
    void* normal = output(context, 1, x.shape());
    auto* tail_after = static_cast<float*>(output(context, 2, tail.shape()));
    clear(y, type, lengths.of<int64_t>(), rows, chunk, width);
    clear(normal, type, lengths.of<int64_t>(), rows, chunk, width);
    convolve(SessionThreads(context),
             {type, x.data(), tail.of<float>(), scale.of<float>(), taps.of<float>(),
              fresh.of<bool>(), y, normal, tail_after, length * width, width, length, epsilon_},
             found);
  }

 private:
  float epsilon_;
};

class Normalize {
 public:
  explicit Normalize(Ort::ConstKernelInfo info) : epsilon_(info.GetAttribute<float>("epsilon")) {}

  void compute(Ort::KernelContext& context) const {
    const Input x(context, 0, "x");
    require(!x.shape().empty() && x.shape().back() > 0, "x has no width");
    const Index width = x.shape().back();
    Index rows = 1;
    for (size_t i = 0; i + 1 < x.shape().size(); ++i) rows *= x.shape()[i];
    void* normal = output(context, 0, x.shape());
    normalize(SessionThreads(context), x.type(), x.data(), normal, rows, width, epsilon_);
  }

 private:
  float epsilon_;
};

class Linear {
 public:
  explicit Linear(Ort::ConstKernelInfo info) {
    const auto activation = info.GetAttribute<std::string>("activation");
    require(activation == "none" || activation == "gelu", "activation is none or gelu");
    gelu_ = activation == "gelu";
  }

  void compute(Ort::KernelContext& context) const {
    const Input x(context, 0, "x"), weight(context, 1, "weight");
    require(!x.shape().empty(), "x has no width");
    const int64_t inputs = x.shape().back(), outputs = weight.has(2).shape()[1];
    weight.is({inputs, outputs});
    Shape shape = x.shape();
    shape.back() = outputs;
    const bool adds = context.GetInputCount() > 2 && context.GetInput(2);
    const void* residual = adds ? Input(context, 2, "residual").is(shape).data() : nullptr;
    Index rows = 1;
    for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
    multiply(SessionThreads(context), {x.type(), x.data(), weight.data(), residual,
                                       output(context, 0, shape), rows, inputs, outputs, gelu_});
  }

 private:
  bool gelu_ = false;
};

template <class Kernel>
void add(const Signature& signature, std::vector<const OrtCustomOp*>& operators) {
  for (const auto type :
       {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
        ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16}) {
    operators.push_back(new Operator<Kernel>(signature, type, "CPUExecutionProvider"));
  }
}

}  // namespace

std::vector<const OrtCustomOp*> cpu_operators() {
  kernels();  // throws here, at the start, if there are none
  std::vector<const OrtCustomOp*> operators;
  add<CausalGMA>(signatures::causal, operators);
  add<ForgettingGMA>(signatures::forgetting, operators);
  add<ShortConvolution>(signatures::short_convolution, operators);
  add<Normalize>(signatures::normalize, operators);
  add<Linear>(signatures::linear, operators);
  return operators;
}

}  // namespace gma
