// Host side of a launch: device facts (asked once a device), dtype switch, cluster and dependent-launch attributes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "../../activation.h"

namespace styleforge::cuda {

struct DeviceFacts {
  int device = 0;
  // Compute capability; `major` is less where the code that runs there was compiled for less, 8 for plain sm_90 and not
  // sm_90a: what is chosen by it has its instructions.
  int major = 0, minor = 0;
  int multiprocessors = 0;
  int max_shared_per_block = 0;  // with opt-in
  int l2_bytes = 0;
  int compiled_for = 0;  // the architecture of the code that runs there: 80, 90
  // The device has clusters and dependent launch, and the code that runs on it was compiled for them (PTX of an older
  // architecture, brought to a new device by the driver, was not).
  bool clusters = false;
  bool has_cluster() const { return clusters; }
};

// Of the current device.
cudaError_t device_facts(DeviceFacts& facts);

// Lets `kernel` have as much dynamic shared memory as the device has. It is asked for once: to ask costs the host a
// third of a microsecond. (Always the same amount, so that it does not matter which of two threads comes last.)
cudaError_t allow_shared_memory(const void* kernel, const DeviceFacts& facts);
// The same of clusters of 16 blocks, which not every device has.
cudaError_t allow_large_clusters(const void* kernel, const DeviceFacts& facts);

// How the blocks of a launch stand to each other. Of a cluster: needs sm_90. Cooperative: all blocks are resident at
// the same time, so that the grid can wait for itself (cudaErrorCooperativeLaunchTooLarge where they can not).
struct Together {
  int cluster = 1;
  bool cooperative = false;
};

// One kernel<<<>>> with the attributes this library uses; dependent launch where the device has it.
template <typename... KernelArgs, typename... Args>
cudaError_t launch(void (*kernel)(KernelArgs...), dim3 grid, dim3 block, size_t shared_bytes, Together together,
                   const DeviceFacts& facts, cudaStream_t stream, const Args&... args) {
  const int cluster = together.cluster;
  if (shared_bytes > 32 * 1024) {  // 48 KB with what the kernel declares statically need no opt-in
    const auto error = allow_shared_memory(reinterpret_cast<const void*>(kernel), facts);
    if (error != cudaSuccess) return error;
  }
  if (cluster > 8) {
    const auto error = allow_large_clusters(reinterpret_cast<const void*>(kernel), facts);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[3] = {};
  unsigned count = 0;
  if (together.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  if (facts.has_cluster()) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    if (cluster > 1) {
      attributes[count].id = cudaLaunchAttributeClusterDimension;
      attributes[count].val.clusterDim.x = static_cast<unsigned>(cluster);
      attributes[count].val.clusterDim.y = 1;
      attributes[count++].val.clusterDim.z = 1;
    }
  }
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, KernelArgs(args)...);
}

template <typename... KernelArgs, typename... Args>
cudaError_t launch(void (*kernel)(KernelArgs...), dim3 grid, dim3 block, size_t shared_bytes, int cluster,
                   const DeviceFacts& facts, cudaStream_t stream, const Args&... args) {
  return launch(kernel, grid, block, shared_bytes, Together{cluster, false}, facts, stream, args...);
}

// Calls body.template operator()<T>() with the CUDA type of `dtype`.
template <typename Body>
cudaError_t switch_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body.template operator()<float>();
    case DType::kFloat16:
      return body.template operator()<__half>();
    case DType::kBFloat16:
      return body.template operator()<__nv_bfloat16>();
    case DType::kFloat64:
      return body.template operator()<double>();
  }
  return cudaErrorInvalidValue;
}

inline size_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }  // null counts

}  // namespace styleforge::cuda
