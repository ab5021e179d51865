// Who gets a gate (common/grid.cuh): launches that become nodes of a graph, each one of its own for as long as the
// graph or one made of it exists. A node's runs follow each other; two graphs made of one capture would use the same
// memory and must not run at the same time, with a gate or without.
#include "gate.h"

#include <cuda.h>

#include <cstdint>
#include <mutex>
#include <vector>

#include "../common/overrides.h"

namespace styleforge::cuda {
namespace {

// Nanoseconds. About as long as what is left to a single block takes (100 us of 1x64x128x128 to 128 channels, stride
// 2): who waits for blocks that come later loses no more than as much again.
constexpr uint32_t kPatience = 100'000;

// Whether this thread's context has all of the device, which a green context or a client of MPS may not.
bool has_all_multiprocessors([[maybe_unused]] const DeviceFacts& facts) {
#if CUDART_VERSION >= 12050
  using Current = decltype(&cuCtxGetCurrent);
  using Resource = decltype(&cuCtxGetDevResource);
  static const auto find = [](const char* name, unsigned version) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const auto error = cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? function : nullptr;
  };
  static const auto current = reinterpret_cast<Current>(find("cuCtxGetCurrent", 12000));
  static const auto resource = reinterpret_cast<Resource>(find("cuCtxGetDevResource", 12040));
  if (current == nullptr || resource == nullptr) return false;
  CUcontext context = nullptr;
  CUdevResource found = {};
  return current(&context) == CUDA_SUCCESS && context != nullptr &&
         resource(context, &found, CU_DEV_RESOURCE_TYPE_SM) == CUDA_SUCCESS &&
         static_cast<int>(found.sm.smCount) >= facts.multiprocessors;
#else
  return false;
#endif
}

// Places in `gates`, of all devices. Never destroyed: graphs may outlive what is static.
struct Places {
  std::mutex mutex;
  std::vector<uint32_t> free;
  uint32_t next = 1;

  uint32_t take() {
    const std::lock_guard lock(mutex);
    if (free.empty()) return next < kGates ? next++ : 0;
    const uint32_t place = free.back();
    free.pop_back();
    return place;
  }
  void give_back(uint32_t place) {
    const std::lock_guard lock(mutex);
    free.push_back(place);
  }
};
Places& places() {
  static auto* const all = new Places;
  return *all;
}

// A place that the graph keeps, 0 where there is none.
uint32_t place_of(cudaGraph_t graph) {
  const uint32_t place = places().take();
  if (place == 0) return 0;
  const auto give_back = [](void* kept) {
    places().give_back(static_cast<uint32_t>(reinterpret_cast<uintptr_t>(kept)));
  };
  cudaUserObject_t object = nullptr;
  if (cudaUserObjectCreate(&object, reinterpret_cast<void*>(uintptr_t{place}), give_back, 1,
                           cudaUserObjectNoDestructorSync) != cudaSuccess) {
    cudaGetLastError();
    places().give_back(place);
    return 0;
  }
  if (cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove) != cudaSuccess) {
    cudaGetLastError();
    cudaUserObjectRelease(object, 1);  // gives the place back
    return 0;
  }
  return place;
}

}  // namespace

GateOfLaunch gate_of_launch(const DeviceFacts& facts, cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) cudaGetLastError();
  if (status != cudaStreamCaptureStatusActive) return {};
  const Overrides overrides("STYLEFORGE_CONV_TUNE");
  if (!has_all_multiprocessors(facts)) return {};
  unsigned long long id = 0;
  cudaGraph_t graph = nullptr;
  if (cudaStreamGetCaptureInfo(stream, &status, &id, &graph) != cudaSuccess) {
    cudaGetLastError();
    return {};
  }
  const auto patience = overrides.tuned("gate", 2) == 3 ? 0 : overrides.tuned("patience", kPatience);
  return {place_of(graph), static_cast<uint32_t>(patience)};
}

}  // namespace styleforge::cuda
