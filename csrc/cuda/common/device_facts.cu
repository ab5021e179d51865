#include "launch.h"

namespace styleforge::cuda {

namespace {
constexpr int kMaxDevices = 64;

// By its largest block the probe says whether the code that runs was compiled with wgmma, which 90a has and 90 has not:
// its version is that of both.
constexpr int kWithWgmma = 64;
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
__global__ void __launch_bounds__(kWithWgmma) architecture_probe() {}
#else
__global__ void architecture_probe() {}
#endif
}  // namespace

cudaError_t device_facts(DeviceFacts& facts) {
  static DeviceFacts known[kMaxDevices];
  static std::atomic<bool> ready[kMaxDevices];
  int device = 0;
  auto error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  if (!ready[device].load(std::memory_order_acquire)) {
    DeviceFacts fresh;
    fresh.device = device;
    const auto ask = [&](int& value, cudaDeviceAttr attribute) {
      if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
    };
    ask(fresh.major, cudaDevAttrComputeCapabilityMajor);
    ask(fresh.minor, cudaDevAttrComputeCapabilityMinor);
    ask(fresh.multiprocessors, cudaDevAttrMultiProcessorCount);
    ask(fresh.max_shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    ask(fresh.l2_bytes, cudaDevAttrL2CacheSize);
    cudaFuncAttributes probe = {};
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&probe, architecture_probe);
    if (error != cudaSuccess) return error;
    fresh.compiled_for = probe.ptxVersion;
    // On 9.0 schedules hold clusters and wgmma for one; the kernels that need both are empty in code for plain 90.
    const bool whole = fresh.major != 9 || probe.maxThreadsPerBlock == kWithWgmma;
    fresh.clusters = fresh.major >= 9 && probe.ptxVersion >= 90 && whole;
    known[device] = fresh;  // two threads write the same values
    ready[device].store(true, std::memory_order_release);
  }
  facts = known[device];
  return cudaSuccess;
}

// What kernels were allowed, by device: a hash table that only grows; a kernel that finds no place in it is asked for
// again each time.
class Allowed {
 public:
  // Calls `ask` unless it was called for this kernel before.
  template <typename Ask>
  cudaError_t once(const void* kernel, int device, Ask&& ask) {
    auto* places = kernels_[device];
    const size_t first = reinterpret_cast<uintptr_t>(kernel) / 16 % kPlaces;
    size_t place = first;
    for (const void* held; (held = places[place].load(std::memory_order_acquire)) != nullptr;) {
      if (held == kernel) return cudaSuccess;
      place = (place + 1) % kPlaces;
      if (place == first) break;
    }
    if (const cudaError_t error = ask()) return error;
    const void* empty = nullptr;
    places[place].compare_exchange_strong(empty, kernel, std::memory_order_release);  // another's place: next time
    return cudaSuccess;
  }

 private:
  static constexpr size_t kPlaces = 512;
  std::atomic<const void*> kernels_[kMaxDevices][kPlaces] = {};
};

cudaError_t allow_shared_memory(const void* kernel, const DeviceFacts& facts) {
  static Allowed allowed;
  return allowed.once(kernel, facts.device, [&]() -> cudaError_t {
    cudaFuncAttributes attributes = {};
    if (const auto error = cudaFuncGetAttributes(&attributes, kernel)) return error;
    const int bytes = facts.max_shared_per_block - static_cast<int>(attributes.sharedSizeBytes);
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  });
}

cudaError_t allow_large_clusters(const void* kernel, const DeviceFacts& facts) {
  static Allowed allowed;
  return allowed.once(kernel, facts.device,
                      [&] { return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1); });
}

}  // namespace styleforge::cuda
