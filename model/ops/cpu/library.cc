// The library's door for PyTorch: plain C, so that it is of no version of it.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string>

#include "layers.h"
#include "mixing.h"
#include "refused.h"

#define GMA_DOOR extern "C" __attribute__((visibility("default")))

namespace gma {
namespace {

// PyTorch's own, of its stable interface: torch_parallel_for and torch_get_num_threads.
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain,
                                void (*range)(int64_t begin, int64_t end, void* data), void* data);
using ThreadCount = int32_t (*)(uint32_t* count);
ParallelFor parallel_for = nullptr;
ThreadCount thread_count = nullptr;

class TorchThreads : public Threads {
 public:
  Index count() const override {
    uint32_t count = 0;
    return thread_count(&count) == 0 && count > 0 ? static_cast<Index>(count) : 1;
  }

  // Each thread takes the next task that is left: they are not of one size.
  void run(Index count, void (*task)(void* data, size_t index), void* data) const override {
    struct Tasks {
      std::atomic<Index> next;
      Index count;
      void (*task)(void* data, size_t index);
      void* data;
    } tasks{{0}, count, task, data};
    const auto take = [](int64_t, int64_t, void* of) {
      Tasks& all = *static_cast<Tasks*>(of);
      for (Index index; (index = all.next++) < all.count;) {
        all.task(all.data, static_cast<size_t>(index));
      }
    };
    const Index width = std::min(count, this->count());
    if (width <= 1 || parallel_for(0, width, 1, take, &tasks) != 0) take(0, 1, &tasks);
  }
};

// Null, or what went wrong, until the thread's next call.
template <class Action>
const char* told(Action&& action) {
  thread_local std::string message;
  try {
    action(TorchThreads());
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace
}  // namespace gma

// Tokens that are not there are nowhere: nothing is computed for them.
constexpr auto kLayout = gma::Layout::packed;

GMA_DOOR const char* gma_open(gma::ParallelFor parallel_for, gma::ThreadCount thread_count) {
  gma::parallel_for = parallel_for;
  gma::thread_count = thread_count;
  return gma::told([](const gma::Threads&) { gma::kernels(); });
}

// Of the functions below, as library.py knows them: raised when one takes other arguments.
GMA_DOOR int64_t gma_version() { return 3; }

// Which of the kernels run; after gma_open.
GMA_DOOR const char* gma_instructions() { return gma::kernels().instructions; }

// Rows, of `chunk` tokens, and documents as in documents.h; shapes as in mixing.h. `forgetting`
// heads, the last, forget, and in the paper's form `usage` is null.
GMA_DOOR const char* gma_mix(const float* routed, const float* memory, const float* mass,
                             const float* linear, const float* quadratic, const float* bias,
                             const float* keep_bias, const int64_t* lengths,
                             const int64_t* document_of_row, float* out, float* memory_after,
                             float* mass_after, float* usage, int64_t tokens, int64_t rows,
                             int64_t chunk, int64_t documents, int64_t width, int64_t heads,
                             int64_t routing, int64_t components, int64_t value, int64_t forgetting,
                             int64_t memory_stride, int64_t mass_stride, bool normalize,
                             float routing_epsilon, float epsilon, float most) {
  return gma::told([&](const gma::Threads& threads) {
    gma::require(most <= gma::kMostForgotten, "most_forgotten must be at most 1/4");
    gma::Mixing mixing{};
    mixing.type = gma::Type::float32, mixing.routed = routed;
    mixing.rows = rows, mixing.chunk = chunk, mixing.width = width;
    mixing.heads = heads, mixing.routing = routing, mixing.components = components;
    mixing.value = value, mixing.epsilon = epsilon;
    mixing.memory = memory, mixing.mass = mass;
    mixing.memory_after = memory_after, mixing.mass_after = mass_after;
    mixing.memory_stride = memory_stride, mixing.mass_stride = mass_stride;
    mixing.out = out, mixing.lasting = heads - forgetting, mixing.keep_bias = keep_bias;
    mixing.most = most, mixing.usage = usage;
    const gma::Mixtures mixtures(linear, quadratic, bias, heads, components, routing, normalize,
                                 routing_epsilon);
    gma::mix(threads, mixing, mixtures,
             gma::documents_of(lengths, document_of_row, rows, chunk, documents, kLayout, tokens));
  });
}

// Shapes as in layers.h.
GMA_DOOR const char* gma_convolve(const float* x, const float* tail, const float* scale,
                                  const float* taps, const int64_t* lengths,
                                  const int64_t* document_of_row, float* y, float* normal,
                                  float* tail_after, int64_t tokens, int64_t rows, int64_t chunk,
                                  int64_t documents, int64_t width, int64_t length,
                                  int64_t tail_stride, float epsilon) {
  return gma::told([&](const gma::Threads& threads) {
    gma::convolve(
        threads,
        {gma::Type::float32, x, tail, scale, taps, nullptr, y, normal, tail_after, tail_stride,
         width, length, epsilon},
        gma::documents_of(lengths, document_of_row, rows, chunk, documents, kLayout, tokens));
  });
}

GMA_DOOR const char* gma_normalize(const float* x, float* normal, int64_t rows, int64_t width,
                                   float epsilon) {
  return gma::told([&](const gma::Threads& threads) {
    gma::normalize(threads, gma::Type::float32, x, normal, rows, width, epsilon);
  });
}

// A matrix (inputs, outputs) in `packed`, see kernels.h.
GMA_DOOR const char* gma_pack(const float* weight, float* packed, int64_t inputs, int64_t outputs) {
  return gma::told(
      [&](const gma::Threads&) { gma::kernels().pack(weight, inputs, outputs, packed); });
}

// Rows times a packed matrix, GELU of it if wanted, and plus `residual` if that is not null.
GMA_DOOR const char* gma_multiply(const float* x, const float* packed, const float* residual,
                                  float* y, int64_t rows, int64_t inputs, int64_t outputs,
                                  bool gelu) {
  return gma::told([&](const gma::Threads& threads) {
    gma::multiply(threads, {gma::Type::float32, x, nullptr, residual, y, rows, inputs, outputs,
                            gelu, packed});
  });
}

GMA_DOOR const char* gma_gelu(float* x, int64_t count) {
  return gma::told([&](const gma::Threads& threads) { gma::gelu(threads, x, count); });
}

// `count` tokens, of which each row has `lengths`.
GMA_DOOR const char* gma_score(const float* read, const float* table, const float* bias,
                               const float* factor, const int64_t* tokens, const int64_t* lengths,
                               float* evidence, int64_t count, int64_t rows, int64_t width,
                               int64_t labels) {
  return gma::told([&](const gma::Threads& threads) {
    int64_t sum = 0;
    for (int64_t row = 0; row < rows; ++row) {
      gma::require(lengths[row] >= 0, "a length must be at least 0");
      sum += lengths[row];
    }
    gma::require(sum == count, "the rows have more or fewer tokens than there are");
    gma::score(threads, {read, table, bias, factor, tokens, width, labels}, lengths, evidence,
               rows);
  });
}

GMA_DOOR const char* gma_quantize(const float* x, int8_t* y, float* scale, int64_t rows,
                                  int64_t width) {
  return gma::told(
      [&](const gma::Threads& threads) { gma::quantize(threads, x, y, scale, rows, width); });
}

GMA_DOOR const char* gma_dequantize(const int32_t* sums, const float* of_row,
                                    const float* of_column, float* y, int64_t rows, int64_t width,
                                    bool add) {
  return gma::told([&](const gma::Threads& threads) {
    gma::dequantize(threads, {sums, of_row, of_column, y, rows, width, add});
  });
}
