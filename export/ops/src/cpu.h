// The operators for the CPU.
#pragma once

#include <vector>

struct OrtCustomOp;

namespace gma {

// Every operator in every type, for the CPU provider. They live as long as the library.
std::vector<const OrtCustomOp*> cpu_operators();

}  // namespace gma
