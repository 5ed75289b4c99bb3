#include "layers.h"

#include <algorithm>

namespace gma {

void convolve(const Threads& threads, const Convolving& step,
              const std::vector<Document>& documents) {
  constexpr Index kPart = 128;  // tokens
  struct Part {
    size_t document;
    Index first, last;
  };
  std::vector<Convolution> whole;
  std::vector<Part> parts;
  for (size_t index = 0; index < documents.size(); ++index) {
    const Document& document = documents[index];
    const Index first = document.first * step.width;
    const Index state = static_cast<Index>(index) * step.tail_stride;
    const bool fresh = step.fresh != nullptr && step.fresh[index];
    whole.push_back({step.type, at(step.x, step.type, first), fresh ? nullptr : step.tail + state,
                     step.scale, step.taps, at(step.y, step.type, first),
                     at(step.normal, step.type, first), step.tail_after + state, document.count,
                     step.width, step.length, step.epsilon});
    Index token = 0;
    do {
      const Index last = std::min(token + kPart, document.count);
      parts.push_back({index, token, last});
      token = last;
    } while (token < document.count);
  }
  in_parallel(threads, static_cast<Index>(parts.size()), [&](Index i) {
    const Part& part = parts[static_cast<size_t>(i)];
    const Convolution& convolution = whole[part.document];
    const Floats work = floats(convolution.work_floats());
    kernels().convolve(convolution, part.first, part.last, work.get());
  });
}

void normalize(const Threads& threads, Type type, const void* x, void* normal, Index rows,
               Index width, float epsilon) {
  constexpr Index kPart = 64;  // rows
  in_parallel(threads, (rows + kPart - 1) / kPart, [&](Index part) {
    const Index first = part * kPart, count = std::min(kPart, rows - first);
    const Floats work = floats(width);
    kernels().normalize(type, at(x, type, first * width), at(normal, type, first * width), count,
                        width, epsilon, work.get());
  });
}

void multiply(const Threads& threads, const Product& product) {
  constexpr Index kPart = 4 * kRowsAtOnce;
  const Index panels = (product.outputs + kPanel - 1) / kPanel;
  const Index parts = (product.rows + kPart - 1) / kPart;
  // Who has rows takes them through all of the matrix, unless there are too few for all threads.
  const Index each = parts < 2 * threads.count() ? 1 : panels;
  const Index shares = panels / each;
  in_parallel(threads, parts * shares, [&](Index task) {
    const Index first = task / shares * kPart, last = std::min(first + kPart, product.rows);
    const Floats work = floats(product.work_floats());
    for (Index panel = task % shares * each, end = panel + each; panel < end; ++panel) {
      kernels().product(product, first, last, panel * kPanel, work.get());
    }
  });
}

void gelu(const Threads& threads, float* x, Index count) {
  constexpr Index kPart = 16 * 1024;
  in_parallel(threads, (count + kPart - 1) / kPart, [&](Index part) {
    const Index first = part * kPart;
    kernels().gelu(x + first, std::min(kPart, count - first));
  });
}

void score(const Threads& threads, const Scoring& scoring, const int64_t* lengths, float* evidence,
           Index rows) {
  std::vector<Index> first(static_cast<size_t>(rows) + 1);
  for (size_t row = 0; row + 1 < first.size(); ++row) first[row + 1] = first[row] + lengths[row];
  in_parallel(threads, rows, [&](Index row) {
    const Index* own = first.data() + row;
    std::vector<double> work(static_cast<size_t>(scoring.work_doubles()));
    kernels().score(scoring, own[0], own[1], work.data(), evidence + row * scoring.labels);
  });
}

void quantize(const Threads& threads, const float* x, int8_t* y, float* scale, Index rows,
              Index width) {
  constexpr Index kPart = 64;  // rows
  in_parallel(threads, (rows + kPart - 1) / kPart, [&](Index part) {
    const Index first = part * kPart, count = std::min(kPart, rows - first);
    kernels().quantize(x + first * width, y + first * width, scale + first, count, width);
  });
}

void dequantize(const Threads& threads, const Sums& sums) {
  constexpr Index kPart = 64;  // rows
  in_parallel(threads, (sums.rows + kPart - 1) / kPart, [&](Index part) {
    const Index first = part * kPart;
    kernels().dequantize(sums, first, std::min(first + kPart, sums.rows));
  });
}

}  // namespace gma
