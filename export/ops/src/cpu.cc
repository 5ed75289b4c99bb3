#include "cpu.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "documents.h"
#include "kernels.h"
#include "operator.h"

namespace gma {
namespace {

struct Release {
  void operator()(float* memory) const { std::free(memory); }
};
using Floats = std::unique_ptr<float, Release>;

Floats floats(Index count) {
  const size_t bytes = static_cast<size_t>(rounded(std::max<Index>(count, 1), 16)) * sizeof(float);
  Floats memory(static_cast<float*>(std::aligned_alloc(64, bytes)));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

// task(index) for 0 <= index < count on the session's threads; what one throws is thrown here.
template <class Task>
void in_parallel(const Ort::KernelContext& context, Index count, const Task& task) {
  if (count <= 0) return;
  struct Shared {
    const Task& task;
    std::exception_ptr error;
    std::once_flag once;
  } shared{task, nullptr, {}};
  const auto run = [](void* data, size_t index) {
    Shared& all = *static_cast<Shared*>(data);
    try {
      all.task(static_cast<Index>(index));
    } catch (...) {
      std::call_once(all.once, [&] { all.error = std::current_exception(); });
    }
  };
  const auto total = static_cast<size_t>(count);
  context.ParallelFor(run, total, total, &shared);
  if (shared.error) std::rethrow_exception(shared.error);
}

Type type_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return Type::float32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return Type::float16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return Type::bfloat16;
    default: throw Refused("activations are float, float16 or bfloat16");
  }
}

using Shape = std::vector<int64_t>;

class Input {
 public:
  Input(const Ort::KernelContext& context, size_t index, const char* name)
      : value_(context.GetInput(index)), name_(name) {
    const auto info = value_.GetTensorTypeAndShapeInfo();
    shape_ = info.GetShape();
    element_ = info.GetElementType();
  }

  const Shape& shape() const { return shape_; }
  Type type() const { return type_of(element_); }
  const void* data() const { return value_.GetTensorRawData(); }
  template <class T>
  const T* of() const {
    return value_.GetTensorData<T>();
  }

  // The two refuse any other shape.
  const Input& has(size_t dimensions) const {
    if (shape_.size() != dimensions) refuse("has " + std::to_string(dimensions) + " dimensions");
    return *this;
  }
  const Input& is(const Shape& expected) const {
    if (shape_ != expected) refuse("is " + text(expected));
    return *this;
  }

 private:
  [[noreturn]] void refuse(const std::string& rule) const {
    throw Refused(std::string(name_) + " " + rule + ", not " + text(shape_));
  }
  static std::string text(const Shape& shape) {
    std::string all = "(";
    for (size_t i = 0; i < shape.size(); ++i) all += (i ? ", " : "") + std::to_string(shape[i]);
    return all + ")";
  }

  Ort::ConstValue value_;
  const char* name_;
  Shape shape_;
  ONNXTensorElementDataType element_;
};

void* output(Ort::KernelContext& context, size_t index, const Shape& shape) {
  return context.GetOutput(index, shape).GetTensorMutableRawData();
}

// Where the element is that so many lie before.
const void* at(const void* data, Type type, Index elements) {
  return static_cast<const char*>(data) + elements * size_of(type);
}
void* at(void* data, Type type, Index elements) {
  return static_cast<char*>(data) + elements * size_of(type);
}

// Zeros at the places of (R, C, width) where no token is.
void clear(void* data, Type type, const int64_t* lengths, Index rows, Index chunk, Index width) {
  for (Index row = 0; row < rows; ++row) {
    const auto missing = static_cast<size_t>(chunk - lengths[row]);
    if (missing == 0) continue;
    std::memset(at(data, type, (row * chunk + lengths[row]) * width), 0,
                missing * static_cast<size_t>(width * size_of(type)));
  }
}

// Of the machine: how many the session has, ONNX Runtime does not say.
Index threads() { return std::max<Index>(1, std::thread::hardware_concurrency()); }

// The mixture of every head, packed.
class Mixtures {
 public:
  Mixtures(const float* linear, const float* quadratic, const float* bias, const Shape& shape,
           bool normalize, float epsilon)
      : heads_(shape[0]),
        one_{shape[1], shape[2], nullptr, nullptr, normalize, epsilon},
        padded_(one_.padded()) {
    const Index components = one_.components, routing = one_.routing;
    packed_ = floats(heads_ * (2 * routing + 1) * padded_);
    float* to = packed_.get();
    std::memset(to, 0, sizeof(float) * static_cast<size_t>(heads_ * (2 * routing + 1) * padded_));
    for (Index head = 0; head < heads_; ++head) {
      for (const float* from : {linear, quadratic}) {
        from += head * components * routing;
        for (Index c = 0; c < components; ++c) {
          for (Index m = 0; m < routing; ++m) to[m * padded_ + c] = from[c * routing + m];
        }
        to += routing * padded_;
      }
      std::memcpy(to, bias + head * components, sizeof(float) * static_cast<size_t>(components));
      to += padded_;
    }
  }

  Mixture operator[](Index head) const {
    Mixture mixture = one_;
    mixture.weights = packed_.get() + head * (2 * one_.routing + 1) * padded_;
    mixture.bias = mixture.weights + 2 * one_.routing * padded_;
    return mixture;
  }

 private:
  Index heads_;
  Mixture one_;
  Index padded_;
  Floats packed_;
};

enum class Form { causal, write, read };

// The three operators of Gaussian Mixture Attention: one scan over every head of every document.
template <Form form>
class Attention {
  static constexpr bool writes = form != Form::read, reads = form != Form::write;
  static constexpr Index kShortestPart = 1024;

  // A run of one head's tokens of one document that one thread goes through.
  struct Part {
    Index document, head;
    Index first, count;
    Index before;  // parts of the same head and document before it; they precede it in the list
    bool last;
  };

 public:
  explicit Attention(Ort::ConstKernelInfo info)
      : normalize_(info.GetAttribute<int64_t>("normalize") != 0),
        routing_epsilon_(info.GetAttribute<float>("routing_epsilon")),
        epsilon_(reads ? info.GetAttribute<float>("epsilon") : 0.0f) {}

  void compute(Ort::KernelContext& context) const {
    const Input routed(context, 0, "routed"), memory(context, 1, "memory"),
        mass(context, 2, "mass"), linear(context, 3, "linear"), quadratic(context, 4, "quadratic"),
        bias(context, 5, "bias"), lengths(context, 6, "lengths"),
        document_of_row(context, 7, "document_of_row");
    const int64_t rows = routed.has(3).shape()[0], chunk = routed.shape()[1];
    const int64_t heads = linear.has(3).shape()[0], components = linear.shape()[1];
    const int64_t routing = linear.shape()[2];
    const int64_t documents = memory.has(4).shape()[0], value = memory.shape()[3];
    const int64_t width = heads * (2 * routing + value);
    require(heads > 0 && components > 0 && routing > 0 && value > 0, "a mixture without a size");
    routed.is({rows, chunk, width});
    memory.is({documents, heads, components, value});
    mass.is({documents, heads, components});
    quadratic.is(linear.shape());
    bias.is({heads, components});
    lengths.is({rows});
    document_of_row.is({rows});
    const bool* fresh = nullptr;
    if constexpr (writes) fresh = Input(context, 8, "fresh").is({documents}).template of<bool>();

    const Type type = routed.type();
    const Mixtures mixtures(linear.of<float>(), quadratic.of<float>(), bias.of<float>(),
                            linear.shape(), normalize_, routing_epsilon_);
    const std::vector<Document> found = documents_of(
        lengths.of<int64_t>(), document_of_row.of<int64_t>(), rows, chunk, documents);

    Step step{};
    step.routed = routed.data(), step.type = type, step.width = width;
    step.heads = heads, step.routing = routing, step.value = value;
    step.memory = memory.of<float>(), step.mass = mass.of<float>(), step.fresh = fresh;
    step.size = components * value, step.components = components;
    size_t index = 0;
    if constexpr (reads) {
      step.out = output(context, index++, {rows, chunk, heads * value});
      clear(step.out, type, lengths.of<int64_t>(), rows, chunk, heads * value);
    }
    if constexpr (writes) {
      step.memory_after = static_cast<float*>(output(context, index++, memory.shape()));
      step.mass_after = static_cast<float*>(output(context, index++, mass.shape()));
    }
    run(context, step, mixtures, parts_of(found, heads));
  }

 private:
  struct Step {
    const void* routed;
    Type type;
    Index width, heads, routing, value, components;
    Index size;  // of one head's memory
    const float *memory, *mass;
    const bool* fresh;
    void* out;
    float *memory_after, *mass_after;
  };

  // A document is cut only where its heads alone would leave threads idle: what a part adds has to
  // be known before the next can read, and is computed once more for it.
  static std::vector<Part> parts_of(const std::vector<Document>& documents, Index heads) {
    Index tokens = 0;
    for (const Document& document : documents) tokens += document.count;
    const Index share = std::max(kShortestPart, tokens * heads / threads());
    std::vector<Part> parts;
    for (size_t index = 0; index < documents.size(); ++index) {
      const Document& document = documents[index];
      if (!writes && document.count == 0) continue;
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

  void run(Ort::KernelContext& context, const Step& step, const Mixtures& mixtures,
           const std::vector<Part>& parts) const {
    const Index size = step.size + step.components;
    std::vector<std::vector<double>> sums(parts.size());
    if constexpr (writes) {
      std::vector<Index> leading;
      for (size_t i = 0; i < parts.size(); ++i) {
        if (!parts[i].last) leading.push_back(static_cast<Index>(i));
      }
      in_parallel(context, static_cast<Index>(leading.size()), [&](Index i) {
        const auto index = static_cast<size_t>(leading[static_cast<size_t>(i)]);
        sums[index].assign(static_cast<size_t>(size), 0.0);
        scan(kernels().write, step, mixtures, parts[index], sums[index].data());
      });
    }
    in_parallel(context, static_cast<Index>(parts.size()), [&](Index i) {
      const auto index = static_cast<size_t>(i);
      const Part& part = parts[index];
      if (form == Form::write && !part.last) return;
      const Index row = part.document * step.heads + part.head;
      const float* memory = step.memory + row * step.size;
      const float* mass = step.mass + row * step.components;
      const bool fresh = writes && step.fresh[part.document];
      if (part.count == 0) {  // what most of a pool's states are in a step: left as they are
        carry(memory, fresh, step.size, step.memory_after + row * step.size);
        carry(mass, fresh, step.components, step.mass_after + row * step.components);
        return;
      }
      std::vector<double> state(static_cast<size_t>(size), 0.0);
      if (!fresh) {
        std::copy(mass, mass + step.components,
                  std::copy(memory, memory + step.size, state.begin()));
      }
      if constexpr (writes) {
        for (size_t earlier = index - static_cast<size_t>(part.before); earlier < index; ++earlier) {
          for (size_t j = 0; j < state.size(); ++j) state[j] += sums[earlier][j];
        }
      }
      scan(form == Form::causal  ? kernels().causal
           : form == Form::write ? kernels().write
                                 : kernels().read,
           step, mixtures, part, state.data());
      if (writes && part.last) {
        const auto narrow = [](double x) { return static_cast<float>(x); };
        const auto masses = state.begin() + step.size;
        std::transform(state.begin(), masses, step.memory_after + row * step.size, narrow);
        std::transform(masses, state.end(), step.mass_after + row * step.components, narrow);
      }
    });
  }

  static void carry(const float* from, bool fresh, Index count, float* to) {
    if (fresh) {
      std::fill(to, to + count, 0.0f);
    } else {
      std::copy(from, from + count, to);
    }
  }

  template <class Kernel>
  void scan(Kernel kernel, const Step& step, const Mixtures& mixtures, const Part& part,
            double* state) const {
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
    tokens.out = reads ? at(step.out, step.type, out) : nullptr;
    tokens.stride = step.width;
    tokens.out_stride = step.heads * step.value;
    tokens.count = part.count;
    tokens.value = step.value;
    tokens.epsilon = epsilon_;
    const Scratch scratch(step.components, step.routing, step.value);
    const Floats work = floats(scratch.size);
    kernel(mixtures[part.head], tokens, state, work.get());
  }

  bool normalize_;
  float routing_epsilon_, epsilon_;
};

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
  kernels();  // that there are any is known from the start
  std::vector<const OrtCustomOp*> operators;
  add<Attention<Form::causal>>(signatures::causal, operators);
  add<Attention<Form::write>>(signatures::write, operators);
  add<Attention<Form::read>>(signatures::read, operators);
  add<ShortConvolution>(signatures::short_convolution, operators);
  add<Normalize>(signatures::normalize, operators);
  add<Linear>(signatures::linear, operators);
  return operators;
}

}  // namespace gma
