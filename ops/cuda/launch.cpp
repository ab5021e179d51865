#include "launch.h"

#include <stdexcept>

// Younger than the oldest PyTorch that the library runs with: null there.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_cuda_caching_allocator_raw_alloc(uint64_t bytes, void** memory);
__attribute__((weak)) AOTITorchError aoti_torch_cuda_caching_allocator_raw_delete(void* memory);
}

namespace styleforge {

CudaScope::CudaScope(int device) {
  int current = 0;
  check_cuda("styleforge", cudaGetDevice(&current));
  if (current != device) {
    check_cuda("styleforge", cudaSetDevice(device));
    previous_ = current;
  }
  void* stream = nullptr;
  check_shim(aoti_torch_get_current_cuda_stream(device, &stream), "get_current_cuda_stream");
  stream_ = static_cast<cudaStream_t>(stream);
}

CudaScope::~CudaScope() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

void check_cuda(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clear it, so that the next call does not report it again
  throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(error));
}

void* workspace(const Tensor& like, size_t bytes, std::optional<Tensor>& holder) {
  if (bytes == 0) return nullptr;
  holder = empty_strided(like, {static_cast<int64_t>(bytes)}, {1}, ScalarType::Byte);
  return holder->mutable_data_ptr();
}

void* Workspace::allocate(const TensorFacts& like, size_t bytes) {
  if (bytes == 0) return nullptr;
  if (aoti_torch_cuda_caching_allocator_raw_alloc != nullptr) {
    check_shim(aoti_torch_cuda_caching_allocator_raw_alloc(bytes, &memory_), "cuda_caching_allocator_raw_alloc");
    return memory_;
  }
  static const int32_t byte = aoti_torch_dtype_uint8();
  tensor_ = empty_contiguous(like, {static_cast<int64_t>(bytes)}, byte);
  return mutable_data(tensor_);
}

Workspace::~Workspace() {
  if (memory_ != nullptr) aoti_torch_cuda_caching_allocator_raw_delete(memory_);
}

}  // namespace styleforge
