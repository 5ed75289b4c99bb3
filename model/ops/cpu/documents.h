// Which tokens of a step are whose.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "refused.h"

namespace gma {

// A document's tokens lie behind each other, for its rows stand together and are full but the last.
struct Document {
  Index first = 0;  // token of the step
  Index count = 0;
  Index row = 0;  // that of the first token
};

// How tokens lie: in a grid of rows, or only those that are there, one behind the other.
enum class Layout { grid, packed };

// lengths (R,) and document_of_row (R,) -> (D,). `there`: tokens, if they are packed. Refuses what
// a caller could not have meant.
inline std::vector<Document> documents_of(const int64_t* lengths, const int64_t* document_of_row,
                                          Index rows, Index chunk, Index documents, Layout layout,
                                          Index there = 0) {
  std::vector<Document> found(static_cast<size_t>(documents));
  require(rows == 0 || chunk > 0, "a row has no tokens");
  Index tokens = 0;
  for (Index row = 0; row < rows; ++row) {
    const int64_t length = lengths[row], index = document_of_row[row];
    require(0 <= length && length <= chunk, "a length is not within 0 and the row's tokens");
    require(0 <= index && index < documents, "document_of_row names no document");
    if (length == 0) continue;
    Document& document = found[static_cast<size_t>(index)];
    if (document.count == 0) {
      document.first = layout == Layout::grid ? row * chunk : tokens;
      document.row = row;
    }
    require(document.row * chunk + document.count == row * chunk,
            "a document's rows do not stand together, or one but the last is not full");
    document.count += static_cast<Index>(length);
    tokens += static_cast<Index>(length);
  }
  require(layout == Layout::grid || tokens == there,
          "there are more or fewer tokens than lengths say");
  return found;
}

}  // namespace gma
