// What the operator layer uses of LibTorch: the stable ABI only (C shims and header-only types), never ATen or c10.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace styleforge {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A `str` argument. The stock conversion to std::string (PyTorch 2.13 headers) leaks one string a call, so operators
// take this type, whose conversion below does not.
struct Text {
  std::string value;
};

// Throws std::runtime_error when a C-shim call failed; `what` names it.
void check_shim(AOTITorchError error, const char* what);

// What checks and launches read of a tensor, asked for once: every question is a call through the shim, and an operator
// has dozens. Borrows the tensor; sizes and strides are its own.
struct TensorFacts {
  AtenTensorHandle handle = nullptr;
  int64_t dim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int32_t dtype = 0;  // as the shim numbers it
  int32_t device_type = 0, device_index = 0;

  TensorFacts() = default;
  explicit TensorFacts(AtenTensorHandle tensor);
  TensorFacts(const Tensor& tensor) : TensorFacts(tensor.get()) {}

  ScalarType scalar_type() const;
  int64_t numel() const;
};

// A handle of one's own, for operators that take their tensors as handles. Tensor puts a shared_ptr around each: a
// block of memory and counting. With that and the questions asked once, a norm with all its arguments costs the
// host 8.4 us in place of 9.6, where torch.relu costs 6.9.
struct HandleDeleter {
  void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
};
using OwnedHandle = std::unique_ptr<AtenTensorOpaque, HandleDeleter>;
using OptionalHandle = std::optional<AtenTensorHandle>;
// What such an operator returns: the caller owns it.
struct ReturnedHandle {
  AtenTensorHandle handle;
};

// Of nothing where there is none.
inline TensorFacts facts_of(const OptionalTensor& tensor) { return tensor ? TensorFacts(*tensor) : TensorFacts(); }
inline TensorFacts facts_of(const OwnedHandle& handle) { return handle ? TensorFacts(handle.get()) : TensorFacts(); }

inline OwnedHandle owned(const OptionalHandle& handle) { return OwnedHandle(handle ? *handle : nullptr); }

size_t element_size(const TensorFacts& tensor);
const void* const_data(const TensorFacts& tensor);
void* mutable_data(const OwnedHandle& handle);

// A new owner of the same tensor.
Tensor tensor_of(AtenTensorHandle handle);
inline OptionalTensor optional_tensor_of(const TensorFacts& tensor) {
  return tensor.handle != nullptr ? OptionalTensor(tensor_of(tensor.handle)) : std::nullopt;
}
ReturnedHandle returned(const Tensor& tensor);
inline OwnedHandle owned(const Tensor& tensor) { return OwnedHandle(returned(tensor).handle); }

// Uninitialised memory of `dim` sizes and strides on the device of `like`, from PyTorch's allocator; dtype as the shim
// numbers it.
OwnedHandle empty_strided(const TensorFacts& like, int64_t dim, const int64_t* sizes, const int64_t* strides,
                          int32_t dtype);

// The same, of up to eight sizes, the last one innermost.
OwnedHandle empty_contiguous(const TensorFacts& like, std::initializer_list<int64_t> sizes, int32_t dtype);

// sizes.size() elements of `dtype` on the device of `like`, uninitialised, from PyTorch's allocator.
Tensor empty_strided(const Tensor& like, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                     ScalarType dtype);

bool grad_mode_enabled();

// The same memory seen with other sizes and strides, `offset` elements further on, without a gradient.
Tensor strided_view(const Tensor& tensor, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                    int64_t offset = 0);

// An ATen operator of one result through the dispatcher, all its arguments given. It knows no Scalar.
template <typename... Args>
Tensor call_aten(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  check_shim(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION), name);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// aten::convolution (no transposition, dilation 1, groups 1). Used where the convolution itself is ATen's.
Tensor aten_convolution(const Tensor& input, const Tensor& weight, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding);

// What a device has for a change of a tensor's memory format in place of ATen's copy; gives nothing where it does not
// take the tensor. One for each library.
using Reformat = std::optional<Tensor> (*)(const Tensor& tensor, bool channels_last);
void install_reformat(Reformat reformat);
std::optional<Tensor> reformatted(const Tensor& tensor, bool channels_last);

// aten::contiguous in the given memory format; returns the same tensor when nothing is to do.
Tensor to_contiguous(const Tensor& input, bool channels_last);

// aten::to(dtype)
Tensor to_dtype(const Tensor& input, ScalarType dtype);

}  // namespace styleforge

HIDDEN_NAMESPACE_BEGIN(torch, stable, detail)
template <>
struct ToImpl<styleforge::Text> {
  static styleforge::Text call(StableIValue val, uint64_t, bool) {
    auto handle = torch::stable::detail::to<StringHandle>(val);
    size_t length = 0;
    const char* data = nullptr;
    styleforge::check_shim(torch_string_length(handle, &length), "torch_string_length");
    styleforge::check_shim(torch_string_c_str(handle, &data), "torch_string_c_str");
    styleforge::Text text{std::string(data, length)};
    styleforge::check_shim(torch_delete_string(handle), "torch_delete_string");
    return text;
  }
};
HIDDEN_NAMESPACE_END(torch, stable, detail)
