// What a kernel does not take.
#pragma once

#include <stdexcept>

namespace gma {

// Its message is for whoever gave the input.
struct Refused : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

inline void require(bool holds, const char* message) {
  if (!holds) throw Refused(message);
}

}  // namespace gma
