#include "stable.h"

#include <stdexcept>

namespace styleforge {

void check_shim(AOTITorchError error, const char* what) {
  if (error != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error(std::string("styleforge: the call to ") + what +
                             " failed; PyTorch's own message is above");
  }
}

TensorFacts::TensorFacts(AtenTensorHandle tensor) : handle(tensor) {
  int64_t* of_sizes = nullptr;
  int64_t* of_strides = nullptr;
  check_shim(aoti_torch_get_dim(handle, &dim), "get_dim");
  check_shim(aoti_torch_get_sizes(handle, &of_sizes), "get_sizes");
  check_shim(aoti_torch_get_strides(handle, &of_strides), "get_strides");
  check_shim(aoti_torch_get_dtype(handle, &dtype), "get_dtype");
  check_shim(aoti_torch_get_device_type(handle, &device_type), "get_device_type");
  check_shim(aoti_torch_get_device_index(handle, &device_index), "get_device_index");
  sizes = of_sizes;
  strides = of_strides;
}

ScalarType TensorFacts::scalar_type() const {
  return torch::stable::detail::to<ScalarType>(torch::stable::detail::from(dtype));
}

int64_t TensorFacts::numel() const {
  int64_t count = 1;
  for (int64_t d = 0; d < dim; ++d) count *= sizes[d];
  return count;
}

size_t element_size(const TensorFacts& tensor) { return aoti_torch_dtype_element_size(tensor.dtype); }

const void* const_data(const TensorFacts& tensor) {
  const void* data = nullptr;
  check_shim(torch_get_const_data_ptr(tensor.handle, &data), "get_const_data_ptr");
  return data;
}

void* mutable_data(const OwnedHandle& handle) {
  void* data = nullptr;
  check_shim(torch_get_mutable_data_ptr(handle.get(), &data), "get_mutable_data_ptr");
  return data;
}

Tensor tensor_of(AtenTensorHandle handle) {
  AtenTensorHandle owned = nullptr;
  check_shim(aoti_torch_new_tensor_handle(handle, &owned), "new_tensor_handle");
  return Tensor(owned);
}

ReturnedHandle returned(const Tensor& tensor) {
  AtenTensorHandle owned = nullptr;
  check_shim(aoti_torch_new_tensor_handle(tensor.get(), &owned), "new_tensor_handle");
  return {owned};
}

OwnedHandle empty_strided(const TensorFacts& like, int64_t dim, const int64_t* sizes, const int64_t* strides,
                          int32_t dtype) {
  AtenTensorHandle handle = nullptr;
  check_shim(aoti_torch_empty_strided(dim, sizes, strides, dtype, like.device_type, like.device_index, &handle),
             "empty_strided");
  return OwnedHandle(handle);
}

OwnedHandle empty_contiguous(const TensorFacts& like, std::initializer_list<int64_t> sizes, int32_t dtype) {
  std::array<int64_t, 8> strides = {};
  int64_t next = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides.at(d) = next;
    next *= sizes.begin()[d] > 0 ? sizes.begin()[d] : 1;
  }
  return empty_strided(like, static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(), dtype);
}

Tensor empty_strided(const Tensor& like, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                     ScalarType dtype) {
  int32_t device_type = 0;
  check_shim(aoti_torch_get_device_type(like.get(), &device_type), "get_device_type");
  AtenTensorHandle handle = nullptr;
  const auto shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  check_shim(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), shim_dtype,
                                      device_type, like.get_device_index(), &handle),
             "empty_strided");
  return Tensor(handle);
}

bool grad_mode_enabled() { return aoti_torch_grad_mode_is_enabled(); }

Tensor strided_view(const Tensor& tensor, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                    int64_t offset) {
  AtenTensorHandle handle = nullptr;
  check_shim(aoti_torch__reinterpret_tensor(tensor.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
                                            strides.data(), offset, &handle),
             "_reinterpret_tensor");
  return Tensor(handle);
}

Tensor aten_convolution(const Tensor& input, const Tensor& weight, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding) {
  const std::vector<int64_t> dilation{1, 1};
  const std::vector<int64_t> output_padding{0, 0};
  return call_aten("aten::convolution", "", input, weight, OptionalTensor(), stride, padding, dilation, false,
                   output_padding, int64_t{1});
}

namespace {
Reformat& own_reformat() {
  static Reformat reformat = nullptr;  // other files install theirs before main
  return reformat;
}
}  // namespace

void install_reformat(Reformat reformat) { own_reformat() = reformat; }

std::optional<Tensor> reformatted(const Tensor& tensor, bool channels_last) {
  const Reformat reformat = own_reformat();
  return reformat == nullptr ? std::nullopt : reformat(tensor, channels_last);
}

Tensor to_contiguous(const Tensor& input, bool channels_last) {
  if (auto result = reformatted(input, channels_last)) return *result;
  return torch::stable::contiguous(input, channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                                        : torch::headeronly::MemoryFormat::Contiguous);
}

Tensor to_dtype(const Tensor& input, ScalarType dtype) { return torch::stable::to(input, dtype); }

}  // namespace styleforge
