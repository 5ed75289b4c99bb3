// What a kernel for the CPU takes and gives: tensors whose shapes are checked.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "kernels.h"
#include "operator.h"

namespace gma {

inline Type type_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return Type::float32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return Type::float16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return Type::bfloat16;
    default:
      throw Refused("activations are float, float16 or bfloat16");
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

  // Both refuse any other shape.
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

inline void* output(Ort::KernelContext& context, size_t index, const Shape& shape) {
  return context.GetOutput(index, shape).GetTensorMutableRawData();
}

// Zeros at the places of (R, C, width) where no token is.
inline void clear(void* data, Type type, const int64_t* lengths, Index rows, Index chunk,
                  Index width) {
  for (Index row = 0; row < rows; ++row) {
    const auto missing = static_cast<size_t>(chunk - lengths[row]);
    if (missing == 0) continue;
    std::memset(at(data, type, (row * chunk + lengths[row]) * width), 0,
                missing * static_cast<size_t>(width * size_of(type)));
  }
}

}  // namespace gma
