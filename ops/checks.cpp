#include "checks.h"

namespace styleforge {

std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  const auto sizes = tensor.sizes();
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}

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

bool prefers_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4) return false;
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
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

std::vector<int64_t> dense_strides(const std::vector<int64_t>& sizes, bool channels_last) {
  std::vector<int64_t> strides(sizes.size());
  int64_t next = 1;
  const auto place = [&](size_t d) {
    strides[d] = next;
    next *= sizes[d] > 0 ? sizes[d] : 1;
  };
  if (channels_last) {
    for (size_t d : {1, 3, 2, 0}) place(d);
  } else {
    for (size_t d = sizes.size(); d-- > 0;) place(d);
  }
  return strides;
}

bool is_dense(const Tensor& tensor, bool channels_last) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  int64_t next = 1;
  for (int d : channels_last ? std::array<int, 4>{1, 3, 2, 0} : std::array<int, 4>{3, 2, 1, 0}) {
    if (sizes[d] != 1 && strides[d] != next) return false;
    next *= sizes[d];
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

namespace {

std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "another device";
}

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

}  // namespace

void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& input) {
  if (!same_device(tensor, input)) {
    fail(op, name, " must be on the device of input, ", device_text(input), ", got ", device_text(tensor));
  }
}

void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& input,
                const std::vector<int64_t>* sizes) {
  check_device(op, name, tensor, input);
  if (tensor.scalar_type() != input.scalar_type()) {
    fail(op, name, " must have the dtype of input, ", dtype_text(input.scalar_type()), ", got ",
         dtype_text(tensor.scalar_type()));
  }
  if (sizes == nullptr) return;
  const auto given = tensor.sizes();
  bool same = given.size() == sizes->size();
  for (size_t i = 0; same && i < sizes->size(); ++i) same = given[i] == (*sizes)[i];
  if (!same) {
    std::ostringstream expected;
    for (size_t i = 0; i < sizes->size(); ++i) expected << (i ? ", " : "") << (*sizes)[i];
    fail(op, name, " must have shape [", expected.str(), "], got ", shape_text(tensor));
  }
}

void check_norm_params(const char* op, const char* weight_name, const char* bias_name, const Tensor& input,
                       const OptionalTensor& weight, const OptionalTensor& bias, int64_t batch, int64_t channels) {
  const auto check = [&](const char* name, const Tensor& param) {
    check_device(op, name, param, input);
    const auto dtype = param.scalar_type();
    if (dtype != input.scalar_type() && dtype != ScalarType::Float) {
      fail(op, name, " must be ", dtype_text(input.scalar_type()), " (the dtype of input) or float32, got ",
           dtype_text(dtype));
    }
    const bool per_channel = param.dim() == 1 && param.size(0) == channels;
    const bool per_sample = param.dim() == 2 && param.size(0) == batch && param.size(1) == channels;
    if (!per_channel && !per_sample) {
      fail(op, name, " must have shape [", channels, "] or [", batch, ", ", channels, "], got ", shape_text(param));
    }
  };
  if (weight) check(weight_name, *weight);
  if (bias) check(bias_name, *bias);
  if (weight && bias) {
    if (weight->dim() != bias->dim()) {
      fail(op, weight_name, " and ", bias_name, " must have the same shape, got ", shape_text(*weight), " and ",
           shape_text(*bias));
    }
    if (weight->scalar_type() != bias->scalar_type()) {
      fail(op, weight_name, " and ", bias_name, " must have the same dtype, got ", dtype_text(weight->scalar_type()),
           " and ", dtype_text(bias->scalar_type()));
    }
  }
}

}  // namespace styleforge
