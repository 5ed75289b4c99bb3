// An operator of domain ai.gma as ONNX Runtime sees it: its signature, its type, its provider.
#pragma once

#include <string>
#include <vector>

#ifndef ORT_API_MANUAL_INIT
#define ORT_API_MANUAL_INIT
#endif
#include <onnxruntime_cxx_api.h>

#include "refused.h"

namespace gma {

enum class Element { activation, real, integer, truth };  // T0, float32, int64, bool

struct Signature {
  const char* name;
  std::vector<Element> inputs;
  std::vector<Element> outputs;
  size_t optional = 0;  // so many inputs, at the end, may be left out
};

namespace signatures {

inline const Signature causal{
    "CausalGMA",
    {Element::activation, Element::real, Element::real, Element::real, Element::real, Element::real,
     Element::integer, Element::integer, Element::truth},
    {Element::activation, Element::real, Element::real}};
inline const Signature forgetting{
    "ForgettingGMA",
    {Element::activation, Element::real, Element::real, Element::real, Element::real, Element::real,
     Element::integer, Element::integer, Element::truth, Element::real},
    {Element::activation, Element::real, Element::real, Element::real}};
inline const Signature short_convolution{
    "ShortConvolution",
    {Element::activation, Element::real, Element::real, Element::real, Element::integer,
     Element::integer, Element::truth},
    {Element::activation, Element::activation, Element::real}};
inline const Signature normalize{"Normalize", {Element::activation}, {Element::activation}};
inline const Signature linear{"Linear",
                              {Element::activation, Element::activation, Element::activation},
                              {Element::activation},
                              1};

}  // namespace signatures

// No exception crosses the C interface: what is thrown becomes a status.
template <class Action>
OrtStatusPtr status_of(const char* name, Action&& action) {
  try {
    action();
    return nullptr;
  } catch (const Refused& refused) {
    const std::string message = std::string(name) + ": " + refused.what();
    return Ort::GetApi().CreateStatus(ORT_INVALID_ARGUMENT, message.c_str());
  } catch (const std::exception& error) {
    const std::string message = std::string(name) + ": " + error.what();
    return Ort::GetApi().CreateStatus(ORT_RUNTIME_EXCEPTION, message.c_str());
  }
}

// Kernel(Ort::ConstKernelInfo) reads the attributes; compute(Ort::KernelContext&) may throw.
template <class Kernel>
struct Guarded {
  const char* name;
  Kernel kernel;

  OrtStatusPtr ComputeV2(OrtKernelContext* context) {
    return status_of(name, [&] {
      Ort::KernelContext wrapped(context);
      kernel.compute(wrapped);
    });
  }
};

// One operator, for one type of its activations, on one provider.
template <class Kernel>
class Operator : public Ort::CustomOpBase<Operator<Kernel>, Guarded<Kernel>, true> {
 public:
  Operator(const Signature& signature, ONNXTensorElementDataType activation, const char* provider)
      : signature_(signature), activation_(activation), provider_(provider) {}

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return status_of(signature_.name, [&] {
      *kernel = new Guarded<Kernel>{signature_.name, Kernel(Ort::ConstKernelInfo(info))};
    });
  }

  const char* GetName() const { return signature_.name; }
  const char* GetExecutionProviderType() const { return provider_; }
  size_t GetInputTypeCount() const { return signature_.inputs.size(); }
  size_t GetOutputTypeCount() const { return signature_.outputs.size(); }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    return type(signature_.inputs[index]);
  }
  ONNXTensorElementDataType GetOutputType(size_t index) const {
    return type(signature_.outputs[index]);
  }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
    return index + signature_.optional < signature_.inputs.size() ? INPUT_OUTPUT_REQUIRED
                                                                  : INPUT_OUTPUT_OPTIONAL;
  }

 private:
  ONNXTensorElementDataType type(Element element) const {
    switch (element) {
      case Element::activation:
        return activation_;
      case Element::integer:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
      case Element::truth:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
      default:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }
  }

  const Signature& signature_;
  ONNXTensorElementDataType activation_;
  const char* provider_;
};

}  // namespace gma
