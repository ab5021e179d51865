#include "launch.h"

#include <stdexcept>

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

void* workspace(const TensorFacts& like, size_t bytes, OwnedHandle& holder) {
  if (bytes == 0) return nullptr;
  static const int32_t byte = aoti_torch_dtype_uint8();
  holder = empty_contiguous(like, {static_cast<int64_t>(bytes)}, byte);
  return mutable_data(holder);
}

}  // namespace styleforge
