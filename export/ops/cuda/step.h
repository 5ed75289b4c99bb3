// What the operators for CUDA take: tensors on the device, and where the rows of a step are.
#pragma once

#include <algorithm>
#include <vector>

#include "cuts.h"
#include "driver.h"
#include "operator.h"

namespace gma::cuda {

inline constexpr const char* name_shapes =
    "name routing_dim x num_components x value_dim in GMA_SHAPES, or the device in "
    "GMA_ARCHITECTURES, when it is built";
inline constexpr const char* name_widths =
    "name the width, or a power of two that is no less, in GMA_WIDTHS, or the device in "
    "GMA_ARCHITECTURES, when it is built";

using Type = ONNXTensorElementDataType;

inline const char* name_of(Type type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return "float16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return "bfloat16";
    default:
      return "float";
  }
}

constexpr int64_t size_of(Type type) { return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 2; }

inline int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

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

inline char* output(const Ort::KernelContext& context, size_t index,
                    const std::vector<int64_t>& shape) {
  return static_cast<char*>(context.GetOutput(index, shape).GetTensorMutableRawData());
}

inline CUstream stream_of(const Ort::KernelContext& context) {
  return static_cast<CUstream>(context.GetGPUComputeStream());
}

// Where the rows of a step are: its inputs lengths and document_of_row.
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

inline const char* fresh_of(const Ort::KernelContext& context, size_t index, int64_t documents) {
  const Tensor fresh(context, index);
  require(fresh.is({documents}), "fresh must be (D,)");
  return fresh.data;
}

}  // namespace gma::cuda
