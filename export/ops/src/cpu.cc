#include "cpu.h"

#include <algorithm>
#include <string>
#include <vector>

#include "causal.h"
#include "documents.h"
#include "kernels.h"
#include "operator.h"
#include "tensors.h"
#include "work.h"

namespace gma {
namespace {

class ShortConvolution {
  static constexpr Index kPart = 128;  // tokens

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
        lengths.of<int64_t>(), document_of_row.of<int64_t>(), rows, chunk, documents);
    void* y = output(context, 0, x.shape());
    void* normal = output(context, 1, x.shape());
    auto* tail_after = static_cast<float*>(output(context, 2, tail.shape()));
    clear(y, type, lengths.of<int64_t>(), rows, chunk, width);
    clear(normal, type, lengths.of<int64_t>(), rows, chunk, width);

    std::vector<Convolution> whole;
    struct Part {
      size_t document;
      Index first, last;
    };
    std::vector<Part> parts;
    for (size_t index = 0; index < found.size(); ++index) {
      const Document& document = found[index];
      const Index first = document.first * width, state = static_cast<Index>(index) * length * width;
      const float* incoming = fresh.of<bool>()[index] ? nullptr : tail.of<float>() + state;
      whole.push_back({type, at(x.data(), type, first), incoming, scale.of<float>(),
                       taps.of<float>(), at(y, type, first), at(normal, type, first),
                       tail_after + state, document.count, width, length, epsilon_});
      Index token = 0;
      do {
        const Index last = std::min(token + kPart, document.count);
        parts.push_back({index, token, last});
        token = last;
      } while (token < document.count);
    }
    in_parallel(context, static_cast<Index>(parts.size()), [&](Index i) {
      const Part& part = parts[static_cast<size_t>(i)];
      const Convolution& convolution = whole[part.document];
      const Floats work = floats(convolution.work_floats());
      kernels().convolve(convolution, part.first, part.last, work.get());
    });
  }

 private:
  float epsilon_;
};

class Normalize {
  static constexpr Index kPart = 64;  // rows

 public:
  explicit Normalize(Ort::ConstKernelInfo info) : epsilon_(info.GetAttribute<float>("epsilon")) {}

  void compute(Ort::KernelContext& context) const {
    const Input x(context, 0, "x");
    require(!x.shape().empty() && x.shape().back() > 0, "x has no width");
    const Type type = x.type();
    const Index width = x.shape().back();
    Index rows = 1;
    for (size_t i = 0; i + 1 < x.shape().size(); ++i) rows *= x.shape()[i];
    void* normal = output(context, 0, x.shape());
    in_parallel(context, (rows + kPart - 1) / kPart, [&](Index part) {
      const Index first = part * kPart, count = std::min(kPart, rows - first);
      const Floats work = floats(width);
      kernels().normalize(type, at(x.data(), type, first * width), at(normal, type, first * width),
                          count, width, epsilon_, work.get());
    });
  }

 private:
  float epsilon_;
};

class Linear {
  static constexpr Index kPart = 256;  // rows

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
    const Product product{x.type(),  x.data(), weight.data(), residual, output(context, 0, shape),
                          rows,      inputs,   outputs,       gelu_};
    const Index panels = (outputs + kPanel - 1) / kPanel, parts = (rows + kPart - 1) / kPart;
    in_parallel(context, panels * parts, [&](Index task) {
      const Index first = task / panels * kPart;
      const Floats work = floats(product.work_floats());
      kernels().product(product, first, std::min(first + kPart, rows), task % panels * kPanel,
                        work.get());
    });
  }

 private:
  bool gelu_ = false;
};

template <class Kernel>
void add(const Signature& signature, std::vector<const OrtCustomOp*>& operators) {
  for (const auto type : {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
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
