// What every CUDA operator needs around a launch: the tensor's device, PyTorch's current stream, errors, workspace.
#pragma once

#include "../stable.h"

#include <cuda_runtime.h>

#include <optional>

namespace styleforge {

// Makes the tensor's device current for its lifetime and holds PyTorch's current stream of it.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& tensor) : CudaScope(tensor.get_device_index()) {}
  explicit CudaScope(const TensorFacts& tensor) : CudaScope(tensor.device_index) {}
  explicit CudaScope(int device);
  ~CudaScope();
  CudaScope(const CudaScope&) = delete;
  CudaScope& operator=(const CudaScope&) = delete;

  cudaStream_t stream() const { return stream_; }

 private:
  DeviceGuardHandle guard_ = nullptr;  // PyTorch's, null where the device is the current one
  cudaStream_t stream_ = nullptr;
};

// The kernels' sizes have 32 bits: of a size of a tensor in memory, or one that was checked.
inline int as_int(int64_t value) { return static_cast<int>(value); }

// Throws "<op>: <what CUDA says>" on an error.
void check_cuda(const char* op, cudaError_t error);

// Device memory from PyTorch's allocator; null for 0 bytes. Kept by `holder`.
void* workspace(const Tensor& like, size_t bytes, std::optional<Tensor>& holder);

// The same, for its own lifetime, without a tensor around it, which takes the host half a microsecond more. The device
// is current.
class Workspace {
 public:
  Workspace() = default;
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // Null for 0 bytes. Once.
  void* allocate(const TensorFacts& like, size_t bytes);

 private:
  void* memory_ = nullptr;
  OwnedHandle tensor_;  // of a PyTorch that does not give memory alone
};

}  // namespace styleforge
