// The one part of libc10_cuda.so that cuda_shortage.cpp links to, and an allocator's use of it.
#include <c10/util/Registry.h>

#include <memory>
#include <string>

namespace c10 {

class __attribute__((visibility("default"))) FreeMemoryCallback {
 public:
  virtual ~FreeMemoryCallback() = default;
  virtual bool Execute() = 0;
};

C10_DECLARE_REGISTRY(FreeCudaMemoryCallbacksRegistry, FreeMemoryCallback);
C10_DEFINE_REGISTRY(FreeCudaMemoryCallbacksRegistry, FreeMemoryCallback)

}  // namespace c10

extern "C" {

size_t fake_free_bytes = 0;

int cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  *free_bytes = fake_free_bytes;
  *total_bytes = size_t{1} << 34;
  return 0;
}

// What the caching allocator does where its cache has no block: whether any callback released memory.
int fake_cache_miss() {
  bool released = false;
  for (const std::string& name : c10::FreeCudaMemoryCallbacksRegistry()->Keys())
    released |= c10::FreeCudaMemoryCallbacksRegistry()->Create(name)->Execute();
  return released;
}
}
