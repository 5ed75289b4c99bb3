// Which of the kernels this processor runs.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace gma {

namespace baseline {
extern const Kernels kernels;
}
#ifdef GMA_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#ifdef GMA_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f")) found.push_back(&avx512::kernels);
  if (avx2) found.push_back(&avx2::kernels);
#endif
  found.push_back(&baseline::kernels);
  return found;
}

const Kernels& chosen() {
  const std::vector<const Kernels*> found = available();
  const char* wanted = std::getenv("GMA_OPS_INSTRUCTIONS");
  if (wanted == nullptr) return *found.front();
  for (const Kernels* kernels : found) {
    if (std::string(wanted) == kernels->instructions) return *kernels;
  }
  throw std::runtime_error("no instructions for GMA_OPS_INSTRUCTIONS=" + std::string(wanted));
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& best = chosen();
  return best;
}

}  // namespace gma
