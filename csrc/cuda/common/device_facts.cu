#include "launch.h"

namespace styleforge::cuda {

namespace {
__global__ void architecture_probe() {}
}  // namespace

cudaError_t device_facts(DeviceFacts& facts) {
  constexpr int kMaxDevices = 64;
  static DeviceFacts known[kMaxDevices];
  static std::atomic<bool> ready[kMaxDevices];
  int device = 0;
  auto error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  if (!ready[device].load(std::memory_order_acquire)) {
    DeviceFacts fresh;
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
    fresh.clusters = fresh.major >= 9 && probe.ptxVersion >= 90;
    known[device] = fresh;  // two threads write the same values
    ready[device].store(true, std::memory_order_release);
  }
  facts = known[device];
  return cudaSuccess;
}

}  // namespace styleforge::cuda
