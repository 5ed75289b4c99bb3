// The library's door: ONNX Runtime calls RegisterCustomOps for each session's options.
#include "cpu.h"
#include "operator.h"
#ifdef GMA_CUDA
#include "cuda.h"
#endif

namespace {

// Made once and never released: at the process's end the runtime may be gone before.
OrtCustomOpDomain* domain() {
  static OrtCustomOpDomain* const made = [] {
    Ort::CustomOpDomain domain("ai.gma");
    for (const OrtCustomOp* op : gma::cpu_operators()) domain.Add(op);
#ifdef GMA_CUDA
    for (const OrtCustomOp* op : gma::cuda_operators()) domain.Add(op);
#endif
    return domain.release();
  }();
  return made;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(
    OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    return base->GetApi(1)->CreateStatus(
        ORT_FAIL, "gma_ops was built against a newer ONNX Runtime than this one");
  }
  Ort::InitApi(api);
  return gma::status_of("RegisterCustomOps", [&] {
    Ort::ThrowOnError(Ort::GetApi().AddCustomOpDomain(options, domain()));
  });
}
