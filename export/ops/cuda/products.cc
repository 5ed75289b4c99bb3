#include "products.h"

#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "driver.h"

namespace gma::cuda {
namespace {

// Of cuBLASLt's interface, as it has been since CUDA 11, what is used here.
namespace lt {

using Handle = void*;
using Description = void*;
using Layout = void*;
using Preference = void*;

struct Algorithm {
  uint64_t opaque[8];
};

struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  int status;
  float waves;
  int reserved[4];
};

constexpr int float32 = 0, float16 = 2, bfloat16 = 14;  // cudaDataType
constexpr int compute_float32 = 68;                     // cublasComputeType_t
constexpr int epilogue_attribute = 7;                   // cublasLtMatmulDescAttributes_t
constexpr uint32_t epilogue_gelu = 32;                  // cublasLtEpilogue_t: GELU's tanh form
constexpr int workspace_attribute = 1;                  // cublasLtMatmulPreferenceAttributes_t
constexpr int alignments[] = {5, 6, 7, 8};              // the same, of the four matrices
constexpr int unsupported = 15;                         // cublasStatus_t

}  // namespace lt

class Library {
 public:
  Library() {
    // ONNX Runtime's own, where it has one open.
    for (const int open : {RTLD_NOLOAD, 0}) {
      for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"}) {
        if (library_ == nullptr) library_ = dlopen(name, RTLD_NOW | RTLD_LOCAL | open);
      }
    }
    if (library_ == nullptr) throw std::runtime_error("there is no cuBLASLt: no libcublasLt.so");
    find(create, "cublasLtCreate");
    find(describe, "cublasLtMatmulDescCreate");
    find(set, "cublasLtMatmulDescSetAttribute");
    find(forget, "cublasLtMatmulDescDestroy");
    find(lay_out, "cublasLtMatrixLayoutCreate");
    find(forget_layout, "cublasLtMatrixLayoutDestroy");
    find(prefer, "cublasLtMatmulPreferenceCreate");
    find(set_preference, "cublasLtMatmulPreferenceSetAttribute");
    find(forget_preference, "cublasLtMatmulPreferenceDestroy");
    find(choose, "cublasLtMatmulAlgoGetHeuristic");
    find(multiply, "cublasLtMatmul");
  }

  int (*create)(lt::Handle*);
  int (*describe)(lt::Description*, int compute, int scale);
  int (*set)(lt::Description, int attribute, const void*, size_t);
  int (*forget)(lt::Description);
  int (*lay_out)(lt::Layout*, int type, uint64_t rows, uint64_t columns, int64_t stride);
  int (*forget_layout)(lt::Layout);
  int (*prefer)(lt::Preference*);
  int (*set_preference)(lt::Preference, int attribute, const void*, size_t);
  int (*forget_preference)(lt::Preference);
  int (*choose)(lt::Handle, lt::Description, lt::Layout, lt::Layout, lt::Layout, lt::Layout,
                lt::Preference, int wanted, lt::Heuristic*, int* found);
  int (*multiply)(lt::Handle, lt::Description, const void* alpha, const void* a, lt::Layout,
                  const void* b, lt::Layout, const void* beta, const void* c, lt::Layout, void* d,
                  lt::Layout, const lt::Algorithm*, void* workspace, size_t, CUstream);

 private:
  template <class Symbol>
  void find(Symbol& symbol, const char* name) {
    symbol = reinterpret_cast<Symbol>(dlsym(library_, name));
    if (symbol == nullptr) throw std::runtime_error(std::string("cuBLASLt has no ") + name);
  }

  void* library_ = nullptr;
};

const Library& library() {
  static const Library opened;
  return opened;
}

void check(int status, const char* action) {
  if (status != 0) {
    throw std::runtime_error(std::string("cuBLASLt could not ") + action + ": its status is " +
                             std::to_string(status));
  }
}

// Of the device that is current.
lt::Handle handle() {
  static std::mutex mutex;
  static std::map<CUcontext, lt::Handle> handles;
  const CUcontext context = current();
  const std::lock_guard<std::mutex> lock(mutex);
  lt::Handle& own = handles[context];
  if (own == nullptr) check(library().create(&own), "start");
  return own;
}

constexpr size_t most_workspace = 32 << 20;  // what cuBLAS itself takes on Hopper

// cuBLASLt's matrices are column by column: row-major y = x @ weight is its y' = weight' @ x'.
class Way {
 public:
  Way(const Product& product, int type, uint32_t alignment) {
    const auto& lt = library();
    check(lt.describe(&description_, lt::compute_float32, lt::float32), "describe a product");
    if (product.gelu) {
      check(lt.set(description_, lt::epilogue_attribute, &lt::epilogue_gelu, sizeof(uint32_t)),
            "add GELU");
    }
    check(lt.lay_out(&weight_, type, product.columns, product.inner, product.columns), "lay out");
    check(lt.lay_out(&x_, type, product.inner, product.rows, product.inner), "lay out");
    check(lt.lay_out(&y_, type, product.columns, product.rows, product.columns), "lay out");
    lt::Preference preference;
    check(lt.prefer(&preference), "prefer");
    lt.set_preference(preference, lt::workspace_attribute, &most_workspace, sizeof(size_t));
    for (const int attribute : lt::alignments) {
      lt.set_preference(preference, attribute, &alignment, sizeof(uint32_t));
    }
    int found = 0;
    const int status =
        lt.choose(handle(), description_, weight_, x_, y_, y_, preference, 1, &chosen_, &found);
    lt.forget_preference(preference);
    if (status != lt::unsupported) check(status, "choose an algorithm");
    known_ = found > 0 && chosen_.status == 0;
  }
  Way(const Way&) = delete;
  Way& operator=(const Way&) = delete;
  ~Way() {
    const auto& lt = library();
    lt.forget_layout(y_);
    lt.forget_layout(x_);
    lt.forget_layout(weight_);
    lt.forget(description_);
  }

  bool known() const { return known_; }

  void multiply(const Product& product, const Arena& arena, const Ort::KernelContext& context,
                CUstream stream) const {
    const Scratch workspace(arena, context, {chosen_.workspace});
    const float one = 1.0f, old = product.residual != nullptr ? 1.0f : 0.0f;
    const void* residual = product.residual != nullptr ? product.residual : product.y;
    check(library().multiply(handle(), description_, &one, product.weight, weight_, product.x, x_,
                             &old, residual, y_, product.y, y_, &chosen_.algorithm, workspace[0],
                             chosen_.workspace, stream),
          "multiply");
  }

 private:
  lt::Description description_ = nullptr;
  lt::Layout weight_ = nullptr, x_ = nullptr, y_ = nullptr;
  lt::Heuristic chosen_{};
  bool known_ = false;
};

// Bytes that all of a product's matrices begin at a multiple of, at most 256.
uint32_t alignment_of(const Product& product) {
  const auto bits =
      reinterpret_cast<uintptr_t>(product.x) | reinterpret_cast<uintptr_t>(product.weight) |
      reinterpret_cast<uintptr_t>(product.residual) | reinterpret_cast<uintptr_t>(product.y) | 256u;
  return static_cast<uint32_t>(bits & ~(bits - 1));
}

int type_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return lt::float16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return lt::bfloat16;
    default:
      return lt::float32;
  }
}

}  // namespace

struct Products::Ways {
  using Key = std::tuple<int64_t, int64_t, int64_t, uint32_t, bool>;

  explicit Ways(int type) : type(type) {}

  const Way& of(const Product& product) {
    const uint32_t alignment = alignment_of(product);
    const Key key{product.rows, product.inner, product.columns, alignment, product.gelu};
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(key);
    return (found != known.end() ? found : known.try_emplace(key, product, type, alignment).first)
        ->second;
  }

  const int type;
  std::mutex mutex;
  std::map<Key, Way> known;  // places stay where they are when others come
};

Products::Products(ONNXTensorElementDataType type) : ways_(std::make_unique<Ways>(type_of(type))) {}

Products::~Products() = default;

bool Products::multiply(const Product& product, const Arena& arena,
                        const Ort::KernelContext& context, CUstream stream) {
  // cuBLASLt would put GELU after the sum with the residual.
  if (product.gelu && product.residual != nullptr) return false;
  const Way& way = ways_->of(product);
  if (way.known()) way.multiply(product, arena, context, stream);
  return way.known();
}

}  // namespace gma::cuda
