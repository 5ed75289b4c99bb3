// Matrix products by cuBLASLt, which is opened when the first is asked for.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <memory>

#include "scratch.h"

namespace gma::cuda {

// One product of a node of the graph: y (M, O) = gelu(x (M, I) @ weight (I, O)) + residual (M, O).
struct Product {
  int64_t rows, inner, columns;  // M, I, O
  const void* x;
  const void* weight;
  const void* residual;  // or null
  void* y;
  bool gelu;
};

// Products in one type, accumulated in float32, float32's own without TF32.
class Products {
 public:
  explicit Products(ONNXTensorElementDataType type);
  ~Products();

  // Whether it was done; if not, cuBLASLt has no way to do it in one pass. Throws
  // std::runtime_error with what cuBLASLt says.
  bool multiply(const Product& product, const Arena& arena, const Ort::KernelContext& context,
                CUstream stream);

 private:
  struct Ways;
  std::unique_ptr<Ways> ways_;
};

}  // namespace gma::cuda
