#include "driver.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <utility>

// The kernels' code, as it is in the file.
extern "C" __attribute__((visibility("hidden"))) const unsigned char gma_cubins[];
__asm__(
    ".pushsection .rodata\n"
    ".balign 16\n"
    ".global gma_cubins\n"
    ".hidden gma_cubins\n"
    "gma_cubins:\n"
    ".incbin \"" GMA_CUBINS
    "\"\n"
    ".byte 0\n"
    ".popsection\n");

namespace gma::cuda {
namespace {

#include "cubins.inc"

class Driver {
 public:
  Driver() {
    library_ = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library_ == nullptr) throw std::runtime_error("there is no CUDA driver: no libcuda.so.1");
    find(error_string, "cuGetErrorString");
    find(context, "cuCtxGetCurrent");
    find(device, "cuCtxGetDevice");
    find(attribute, "cuDeviceGetAttribute");
    find(load, "cuModuleLoadData");
    find(entry, "cuModuleGetFunction");
    find(set, "cuFuncSetAttribute");
    find(start, "cuLaunchKernel");
  }

  void check(CUresult result, const char* action) const {
    if (result == CUDA_SUCCESS) return;
    const char* words = nullptr;
    error_string(result, &words);
    throw std::runtime_error(std::string(action) + ": " + (words ? words : "an unknown error"));
  }

  decltype(&cuGetErrorString) error_string;
  decltype(&cuCtxGetCurrent) context;
  CUresult (*device)(CUdevice*);
  decltype(&cuDeviceGetAttribute) attribute;
  decltype(&cuModuleLoadData) load;
  decltype(&cuModuleGetFunction) entry;
  decltype(&cuFuncSetAttribute) set;
  decltype(&cuLaunchKernel) start;

 private:
  template <class Symbol>
  void find(Symbol& symbol, const char* name) {
    symbol = reinterpret_cast<Symbol>(dlsym(library_, name));
    if (symbol == nullptr) throw std::runtime_error(std::string("the CUDA driver has no ") + name);
  }

  void* library_;
};

const Driver& driver() {
  static const Driver opened;
  return opened;
}

int architecture() {
  CUdevice device;
  driver().check(driver().device(&device), "the device");
  int major, minor;
  driver().check(driver().attribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device),
                 "the device");
  driver().check(driver().attribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device),
                 "the device");
  return 10 * major + minor;
}

// Code for a device runs on later ones of its generation, but from 9.0 on it may use what they
// lack.
bool runs(const Kernel& kernel, int device) {
  if (kernel.architecture >= 90) return kernel.architecture == device;
  return kernel.architecture / 10 == device / 10 && kernel.architecture <= device;
}

const Kernel& find(const std::string& key, const char* remedy) {
  const int device = architecture();
  const Kernel* found = nullptr;
  for (const Kernel& kernel : kernels) {
    if (key != kernel.key || !runs(kernel, device)) continue;
    if (found == nullptr || kernel.architecture > found->architecture) found = &kernel;
  }
  if (found == nullptr) {
    throw Refused("the library was built without the kernel \"" + key +
                  "\" for compute capability " + std::to_string(device / 10) + "." +
                  std::to_string(device % 10) + ": " + remedy);
  }
  return *found;
}

Function loaded(const Kernel& kernel) {
  CUmodule module;  // stays for as long as its context
  driver().check(driver().load(&module, kernel.cubin), kernel.key);
  CUfunction handle;
  driver().check(driver().entry(&handle, module, kernel.entry), kernel.key);
  constexpr unsigned unasked = 48 * 1024;  // of shared memory; more must be asked for
  if (kernel.shared > unasked) {
    driver().check(driver().set(handle, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                static_cast<int>(kernel.shared)),
                   kernel.key);
  }
  return {handle, &kernel};
}

}  // namespace

CUcontext current() {
  CUcontext context = nullptr;
  driver().check(driver().context(&context), "the current context");
  if (context == nullptr) throw std::runtime_error("no CUDA context is current");
  return context;
}

Function function(const std::string& key, const char* remedy) {
  static std::mutex mutex;
  static std::map<std::pair<CUcontext, std::string>, Function> functions;
  const auto place = std::make_pair(current(), key);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = functions.find(place);
  if (known != functions.end()) return known->second;
  return functions[place] = loaded(find(key, remedy));
}

void launch(const Function& function, Grid grid, CUstream stream, void** parameters) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  constexpr int64_t most = 65535;  // of y and z
  require(grid.y <= most && grid.z <= most, "the step has too many programs");
  const Kernel& kernel = *function.kernel;
  driver().check(driver().start(function.handle, static_cast<unsigned>(narrow(grid.x)),
                                static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z),
                                kernel.threads, 1, 1, kernel.shared, stream, parameters, nullptr),
                 kernel.key);
}

}  // namespace gma::cuda
