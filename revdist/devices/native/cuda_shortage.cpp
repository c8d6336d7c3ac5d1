// Calls back into Python where a CUDA allocation is about to fail. See cuda_shortage.py for when that is safe.
//
// The few declarations of c10_cuda that it takes are repeated here: its own header includes CUDA's, which a
// machine that only runs torch does not have.

#include <c10/util/Registry.h>

#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <memory>

namespace c10 {

class C10_IMPORT FreeMemoryCallback {
 public:
  virtual ~FreeMemoryCallback() = default;
  virtual bool Execute() = 0;
};

C10_DECLARE_REGISTRY(FreeCudaMemoryCallbacksRegistry, FreeMemoryCallback);

}  // namespace c10

namespace {

using ShortageCallback = int64_t (*)(int64_t missing_bytes);
using MemGetInfo = int (*)(size_t* free_bytes, size_t* total_bytes);

// The allocator does not say what it is after. Below this much the driver is taken to be unable to serve it.
constexpr int64_t kScarceBytes = 64 << 20;

std::atomic<ShortageCallback> shortage_callback{nullptr};
thread_local bool inside_callback = false;

int64_t missing_bytes() {
  static const auto mem_get_info = reinterpret_cast<MemGetInfo>(dlsym(RTLD_DEFAULT, "cudaMemGetInfo"));
  size_t free_bytes = 0, total_bytes = 0;
  if (mem_get_info == nullptr || mem_get_info(&free_bytes, &total_bytes) != 0) return 0;
  return kScarceBytes - static_cast<int64_t>(free_bytes);
}

class ShortageRelay final : public c10::FreeMemoryCallback {
 public:
  bool Execute() override {
    ShortageCallback callback = shortage_callback.load();
    if (callback == nullptr || inside_callback) return false;
    int64_t missing = missing_bytes();
    if (missing <= 0) return false;
    inside_callback = true;
    int64_t released = callback(missing);
    inside_callback = false;
    return released > 0;
  }
};

}  // namespace

namespace c10 {
C10_REGISTER_CLASS(FreeCudaMemoryCallbacksRegistry, revdist_shortage, ShortageRelay)
}

extern "C" __attribute__((visibility("default"))) void revdist_cuda_on_shortage(ShortageCallback callback) {
  shortage_callback.store(callback);
}
