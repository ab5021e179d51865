// Argument checks and shape rules that the CPU and the CUDA side share. Every failed check throws one line that names
// the operator, the argument, what was expected and what was given.
#pragma once

#include "../csrc/instance_norm_params.h"
#include "stable.h"

#include <sstream>
#include <stdexcept>
#include <string>

#if defined(__GNUC__)
#define STYLEFORGE_API __attribute__((visibility("default")))
#else
#define STYLEFORGE_API
#endif

namespace styleforge {

template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

// "[2, 64, 32, 32]"
std::string shape_text(const TensorFacts& tensor);
std::string dtype_text(ScalarType dtype);

Activation parse_activation(const char* op, const std::string& name);
// Whether `precision`, ieee or tf32, is the latter.
bool parse_tf32(const char* op, const std::string& precision);

// Floating dtype that the kernels know; throws otherwise.
DType kernel_dtype(const char* op, const char* argument, ScalarType dtype);
DType kernel_dtype(const char* op, const char* argument, const TensorFacts& tensor);
inline bool is_16_bit(ScalarType dtype) { return dtype == ScalarType::Half || dtype == ScalarType::BFloat16; }

// PyTorch's suggest_memory_format for a 4-d tensor (c10/core/MemoryFormat.h, compute strides-like-channels-last):
// whether the result of an operator on this tensor is channels_last.
bool prefers_channels_last(const TensorFacts& tensor);
// Whether the elements lie densely, the last dimension innermost.
bool is_contiguous(const TensorFacts& tensor);
// Whether those of a 4-d tensor lie densely in exactly that format.
bool is_dense(const TensorFacts& tensor, bool channels_last);
// The same, and also the strides of dimensions of size 1 are what the format says: what a result has to have.
bool has_dense_strides(const Tensor& tensor, bool channels_last);
// `tensor` with the strides of exactly that format; copies where it has others.
Tensor in_format(const Tensor& tensor, bool channels_last);
// The strides of a dense 4-d tensor of the sizes of `tensor` in that format.
std::array<int64_t, 4> dense_strides_of(const TensorFacts& tensor, bool channels_last);
std::array<int64_t, 4> dense_strides_of(const int64_t* sizes, bool channels_last);
std::vector<int64_t> dense_strides(const std::vector<int64_t>& sizes, bool channels_last);
Tensor empty_dense(const Tensor& like, const std::vector<int64_t>& sizes, bool channels_last, ScalarType dtype);
Tensor empty_dense(const TensorFacts& like, const std::vector<int64_t>& sizes, bool channels_last, ScalarType dtype);

// What both norm operators accept for weight and bias: [C] or [N, C], of the input's dtype or float32.
void check_norm_params(const char* op, const char* weight_name, const char* bias_name, const Tensor& input,
                       const OptionalTensor& weight, const OptionalTensor& bias, int64_t batch, int64_t channels);
void check_norm_params(const char* op, const char* weight_name, const char* bias_name, const TensorFacts& input,
                       const TensorFacts* weight, const TensorFacts* bias, int64_t batch, int64_t channels);

// A second tensor next to `input`: same device.
void check_device(const char* op, const char* name, const TensorFacts& tensor, const TensorFacts& input);

// A second tensor next to `input`: same device and dtype, and for `sizes` non-null exactly these sizes.
void check_like(const char* op, const char* name, const TensorFacts& tensor, const TensorFacts& input,
                const std::vector<int64_t>* sizes);
void check_like(const char* op, const char* name, const TensorFacts& tensor, const TensorFacts& input,
                std::initializer_list<int64_t> sizes);
// The same of a tensor with a dtype of its own.
void check_with_dtype(const char* op, const char* name, const TensorFacts& tensor, const TensorFacts& input,
                      ScalarType dtype, std::initializer_list<int64_t> sizes);
// The same, of the dtype and the sizes of `input`.
void check_alike(const char* op, const char* name, const TensorFacts& tensor, const TensorFacts& input);

// Records which path the most recent operator call took, and the path of the stage it ends in where that one has a
// choice of its own; literals only. Shown by styleforge.last_path().
STYLEFORGE_API void record_path(const char* path, const char* stage = "");

}  // namespace styleforge
