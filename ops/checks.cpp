#include "checks.h"

namespace styleforge {

namespace {

std::string list_text(const int64_t* values, int64_t count) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < count; ++i) text << (i ? ", " : "") << values[i];
  text << ']';
  return text.str();
}

}  // namespace

std::string shape_text(const TensorFacts& tensor) { return list_text(tensor.sizes, tensor.dim); }

std::string dtype_text(ScalarType dtype) {
  switch (dtype) {  // as Python writes them
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexHalf:
      return "complex32";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return torch::headeronly::toString(dtype);
  }
}

Activation parse_activation(const char* op, const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "leaky_relu") return Activation::kLeakyRelu;
  if (name == "silu") return Activation::kSilu;
  if (name == "sigmoid") return Activation::kSigmoid;
  if (name == "tanh") return Activation::kTanh;
  fail(op, "activation must be one of none, relu, leaky_relu, silu, sigmoid, tanh, got \"", name, "\"");
}

bool parse_tf32(const char* op, const std::string& precision) {
  if (precision == "tf32") return true;
  if (precision == "ieee") return false;
  fail(op, "precision must be one of ieee, tf32, got \"", precision, "\"");
}

DType kernel_dtype(const char* op, const char* argument, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      fail(op, argument, " must be float32, float16, bfloat16 or float64, got ", dtype_text(dtype));
  }
}

DType kernel_dtype(const char* op, const char* argument, const TensorFacts& tensor) {
  // The shim's numbers do not change: a call for each would be most of what a check costs.
  static const int32_t float32 = aoti_torch_dtype_float32(), float16 = aoti_torch_dtype_float16(),
                       bfloat16 = aoti_torch_dtype_bfloat16();
  if (tensor.dtype == float32) return DType::kFloat32;
  if (tensor.dtype == float16) return DType::kFloat16;
  if (tensor.dtype == bfloat16) return DType::kBFloat16;
  return kernel_dtype(op, argument, tensor.scalar_type());
}

bool prefers_channels_last(const TensorFacts& tensor) {
  if (tensor.dim != 4) return false;
  const auto* sizes = tensor.sizes;
  const auto* strides = tensor.strides;
  int64_t least = 0;
  if (strides[1] == 0) return false;
  for (int d : {1, 3, 2, 0}) {
    if (sizes[d] == 0 || strides[d] < least) return false;
    if (d == 0 && least == strides[1]) return false;
    least = strides[d];
    if (sizes[d] > 1) least *= sizes[d];
  }
  return true;
}

namespace {

void fill_dense_strides(const int64_t* sizes, int64_t dim, bool channels_last, int64_t* strides) {
  int64_t next = 1;
  const auto place = [&](int64_t d) {
    strides[d] = next;
    next *= sizes[d] > 0 ? sizes[d] : 1;
  };
  if (channels_last) {
    for (int64_t d : {1, 3, 2, 0}) place(d);
  } else {
    for (int64_t d = dim; d-- > 0;) place(d);
  }
}

}  // namespace

std::vector<int64_t> dense_strides(const std::vector<int64_t>& sizes, bool channels_last) {
  std::vector<int64_t> strides(sizes.size());
  fill_dense_strides(sizes.data(), static_cast<int64_t>(sizes.size()), channels_last, strides.data());
  return strides;
}

std::array<int64_t, 4> dense_strides_of(const int64_t* sizes, bool channels_last) {
  std::array<int64_t, 4> strides = {};
  fill_dense_strides(sizes, 4, channels_last, strides.data());
  return strides;
}

std::array<int64_t, 4> dense_strides_of(const TensorFacts& tensor, bool channels_last) {
  return dense_strides_of(tensor.sizes, channels_last);
}

bool is_dense(const TensorFacts& tensor, bool channels_last) {
  const auto* sizes = tensor.sizes;
  const auto* strides = tensor.strides;
  int64_t next = 1;
  for (int d : channels_last ? std::array<int, 4>{1, 3, 2, 0} : std::array<int, 4>{3, 2, 1, 0}) {
    if (sizes[d] != 1 && strides[d] != next) return false;
    next *= sizes[d];
  }
  return true;
}

bool is_contiguous(const TensorFacts& tensor) {
  int64_t next = 1;
  for (int64_t d = tensor.dim; d-- > 0;) {
    if (tensor.sizes[d] != 1 && tensor.strides[d] != next) return false;
    next *= tensor.sizes[d];
  }
  return true;
}

bool has_dense_strides(const Tensor& tensor, bool channels_last) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const auto expected = dense_strides(std::vector<int64_t>(sizes.begin(), sizes.end()), channels_last);
  for (size_t d = 0; d < expected.size(); ++d) {
    if (strides[d] != expected[d]) return false;
  }
  return true;
}

Tensor in_format(const Tensor& tensor, bool channels_last) {
  if (has_dense_strides(tensor, channels_last)) return tensor;
  if (auto result = reformatted(tensor, channels_last)) return *result;
  const auto sizes = tensor.sizes();
  Tensor result =
      empty_dense(tensor, std::vector<int64_t>(sizes.begin(), sizes.end()), channels_last, tensor.scalar_type());
  return torch::stable::copy_(result, tensor);
}

Tensor empty_dense(const Tensor& like, const std::vector<int64_t>& sizes, bool channels_last, ScalarType dtype) {
  return empty_strided(like, sizes, dense_strides(sizes, channels_last), dtype);
}

Tensor empty_dense(const TensorFacts& like, const std::vector<int64_t>& sizes, bool channels_last, ScalarType dtype) {
  const auto of = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const auto strides = dense_strides(sizes, channels_last);
  return Tensor(empty_strided(like, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), of).release());
}

namespace {

std::string device_text(const TensorFacts& tensor) {
  if (tensor.device_type == aoti_torch_device_type_cpu()) return "cpu";
  if (tensor.device_type == aoti_torch_device_type_cuda()) return "cuda:" + std::to_string(tensor.device_index);
  return "another device";
}

bool same_sizes(const TensorFacts& tensor, const int64_t* sizes, int64_t dim) {
  if (tensor.dim != dim) return false;
  for (int64_t i = 0; i < dim; ++i) {
    if (tensor.sizes[i] != sizes[i]) return false;
  }
  return true;
}

void check_sizes(const char* op, const char* name, const TensorFacts& tensor, const int64_t* sizes, int64_t dim) {
  if (same_sizes(tensor, sizes, dim)) return;
  fail(op, name, " must have shape ", list_text(sizes, dim), ", got ", shape_text(tensor));
}

void check_norm_param(const char* op, const char* name, const TensorFacts& param, const TensorFacts& input,
                      int64_t batch, int64_t channels) {
  static const int32_t float32 = aoti_torch_dtype_float32();
  check_device(op, name, param, input);
  if (param.dtype != input.dtype && param.dtype != float32) {
    fail(op, name, " must be ", dtype_text(input.scalar_type()),
         input.dtype == float32 ? ", got " : " (the dtype of input) or float32, got ", dtype_text(param.scalar_type()));
  }
  const bool per_channel = param.dim == 1 && param.sizes[0] == channels;
  const bool per_sample = param.dim == 2 && param.sizes[0] == batch && param.sizes[1] == channels;
  if (!per_channel && !per_sample) {
    fail(op, name, " must have shape [", channels, "] or [", batch, ", ", channels, "], got ", shape_text(param));
  }
}

}  // namespace

void check_device(const char* op, const char* name, const TensorFacts& tensor, const TensorFacts& input) {
  if (tensor.device_type != input.device_type || tensor.device_index != input.device_index) {
    fail(op, name, " must be on the device of input, ", device_text(input), ", got ", device_text(tensor));
  }
}

void check_like(const char* op, const char* name, const TensorFacts& tensor, const TensorFacts& input,
                const std::vector<int64_t>* sizes) {
  check_device(op, name, tensor, input);
  if (tensor.dtype != input.dtype) {
    fail(op, name, " must have the dtype of input, ", dtype_text(input.scalar_type()), ", got ",
         dtype_text(tensor.scalar_type()));
  }
  if (sizes != nullptr) check_sizes(op, name, tensor, sizes->data(), static_cast<int64_t>(sizes->size()));
}

void check_like(const char* op, const char* name, const TensorFacts& tensor, const TensorFacts& input,
                std::initializer_list<int64_t> sizes) {
  check_like(op, name, tensor, input, nullptr);
  check_sizes(op, name, tensor, sizes.begin(), static_cast<int64_t>(sizes.size()));
}

void check_with_dtype(const char* op, const char* name, const TensorFacts& tensor, const TensorFacts& input,
                      ScalarType dtype, std::initializer_list<int64_t> sizes) {
  check_device(op, name, tensor, input);
  if (tensor.scalar_type() != dtype) {
    fail(op, name, " must be ", dtype_text(dtype), ", got ", dtype_text(tensor.scalar_type()));
  }
  check_sizes(op, name, tensor, sizes.begin(), static_cast<int64_t>(sizes.size()));
}

void check_alike(const char* op, const char* name, const TensorFacts& tensor, const TensorFacts& input) {
  check_like(op, name, tensor, input, nullptr);
  check_sizes(op, name, tensor, input.sizes, input.dim);
}

void check_norm_params(const char* op, const char* weight_name, const char* bias_name, const TensorFacts& input,
                       const TensorFacts* weight, const TensorFacts* bias, int64_t batch, int64_t channels) {
  if (weight != nullptr) check_norm_param(op, weight_name, *weight, input, batch, channels);
  if (bias != nullptr) check_norm_param(op, bias_name, *bias, input, batch, channels);
  if (weight == nullptr || bias == nullptr) return;
  if (weight->dim != bias->dim) {
    fail(op, weight_name, " and ", bias_name, " must have the same shape, got ", shape_text(*weight), " and ",
         shape_text(*bias));
  }
  if (weight->dtype != bias->dtype) {
    fail(op, weight_name, " and ", bias_name, " must have the same dtype, got ", dtype_text(weight->scalar_type()),
         " and ", dtype_text(bias->scalar_type()));
  }
}

void check_norm_params(const char* op, const char* weight_name, const char* bias_name, const Tensor& input,
                       const OptionalTensor& weight, const OptionalTensor& bias, int64_t batch, int64_t channels) {
  const TensorFacts of_weight = facts_of(weight), of_bias = facts_of(bias);
  check_norm_params(op, weight_name, bias_name, input, weight ? &of_weight : nullptr, bias ? &of_bias : nullptr, batch,
                    channels);
}

}  // namespace styleforge
