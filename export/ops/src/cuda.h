// What the CUDA part gives the library; there only where GMA_CUDA is defined.
#pragma once

#include <vector>

struct OrtCustomOp;

namespace gma {

// Every operator in every type, for the CUDA provider. They live as long as the library.
std::vector<const OrtCustomOp*> cuda_operators();

}  // namespace gma
