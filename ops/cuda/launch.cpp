#include "launch.h"

#include <stdexcept>

// Younger than the oldest PyTorch that the library runs with: null there.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_cuda_caching_allocator_raw_alloc(uint64_t bytes, void** memory);
__attribute__((weak)) AOTITorchError aoti_torch_cuda_caching_allocator_raw_delete(void* memory);
}

namespace styleforge {

namespace {

bool has_several_devices() {
  int count = 0;
  check_cuda("styleforge", cudaGetDeviceCount(&count));
  return count > 1;
}

// By PyTorch and by CUDA, which may differ: PyTorch leaves CUDA's where it is when it goes back to a device that has no
// context yet, and only notes that one. Its allocator goes by the note.
bool is_current(int device) {
  int current = 0, noted = 0;
  check_cuda("styleforge", cudaGetDevice(&current));
  check_shim(aoti_torch_get_current_device_index(&noted), "get_current_device_index");
  return current == device && noted == device;
}

}  // namespace

CudaScope::CudaScope(int device) {
  void* stream = nullptr;
  check_shim(aoti_torch_get_current_cuda_stream(device, &stream), "get_current_cuda_stream");
  stream_ = static_cast<cudaStream_t>(stream);
  static const bool several = has_several_devices();
  if (!several || is_current(device)) return;
  // PyTorch's guard and not cudaSetDevice, which makes a context on a device only to go back to it.
  check_shim(aoti_torch_create_device_guard(device, &guard_), "create_device_guard");
}

CudaScope::~CudaScope() {
  if (guard_ != nullptr) aoti_torch_delete_device_guard(guard_);
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
