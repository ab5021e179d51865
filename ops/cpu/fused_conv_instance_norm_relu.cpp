// fused_conv_instance_norm_relu on the CPU: the convolution is ATen's (oneDNN), the rest is ours. A 3x3 convolution of
// the upsampled input runs as four 2x2 convolutions of the input itself (csrc/cpu/upsample_phases.h).
#include "../fused_conv_instance_norm_relu_operators.h"

#include "../../csrc/cpu/huge_pages.h"
#include "../../csrc/cpu/instance_norm.h"
#include "../../csrc/cpu/pad.h"
#include "../../csrc/cpu/upsample_phases.h"
#include "parallel.h"

namespace styleforge {
namespace {

void advise_huge_pages(const Tensor& fresh) {
  cpu::advise_huge_pages(fresh.mutable_data_ptr(), fresh.numel() * static_cast<int64_t>(fresh.element_size()));
}

void pad_upsample(const PadParams& params, const Tensor&) {
  cpu::advise_huge_pages(
      params.output, params.batch * params.out_channels * params.out_height * params.out_width * params.element_size);
  cpu::pad_upsample(params, parallel_for);
}

const ConvInstanceNormBackend kBackend{
    pad_upsample,
    [](const Tensor& input, const Tensor& weight, const std::vector<int64_t>& stride,
       const std::vector<int64_t>& padding, bool) { return aten_convolution(input, weight, stride, padding); },
    [](const InstanceNormCall& call) { cpu::instance_norm_forward(call.params, parallel_for); }, true};

// weight [Co, Ci, 3, 3] -> the [Co, Ci, 2, 2] of phase (a, b), summed in double.
template <typename Scalar>
void phase_weight(const Scalar* weight, Scalar* phase, int64_t count, int a, int b) {
  const auto first = [](int tap, int odd) { return tap == 0 ? 0 : odd + 1; };  // taps first..last of the 3
  const auto last = [](int tap, int odd) { return tap == 0 ? odd : 2; };
  for (int64_t i = 0; i < count; ++i, weight += 9, phase += 4) {
    for (int y = 0; y < 2; ++y) {
      for (int x = 0; x < 2; ++x) {
        double sum = 0;
        for (int ky = first(y, a); ky <= last(y, a); ++ky) {
          for (int kx = first(x, b); kx <= last(x, b); ++kx) sum += static_cast<double>(weight[ky * 3 + kx]);
        }
        phase[y * 2 + x] = static_cast<Scalar>(sum);
      }
    }
  }
}

Tensor phase_weight(const Tensor& weight, int a, int b) {
  const int64_t count = weight.size(0) * weight.size(1);
  Tensor phase = empty_dense(weight, {weight.size(0), weight.size(1), 2, 2}, false, weight.scalar_type());
  if (weight.scalar_type() == ScalarType::Double) {
    phase_weight(static_cast<const double*>(weight.const_data_ptr()), static_cast<double*>(phase.mutable_data_ptr()),
                 count, a, b);
  } else {
    phase_weight(static_cast<const float*>(weight.const_data_ptr()), static_cast<float*>(phase.mutable_data_ptr()),
                 count, a, b);
  }
  return phase;
}

// The float32/float64 3x3 convolution with stride 1 and padding 1 after an upsampling; nothing for any other. (In half
// precision the summed weights would have to be rounded once more.)
std::optional<Tensor> run_upsample_phases(const ConvInstanceNormArgs& args, const ConvInstanceNormPlan& plan) {
  if (args.upsample != 2 || args.weight.size(2) != 3 || args.weight.size(3) != 3) return {};
  const auto dtype = args.input.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) return {};
  const std::vector<int64_t> one{1, 1}, none{0, 0};
  if (plan.empty() || plan.stride != one || plan.padding != one) return {};

  const PaddingMode mode = plan.mode == PaddingMode::kZeros ? PaddingMode::kZeros : PaddingMode::kReplicate;
  const Tensor padded = pad_upsample(kBackend, args.input, 1, mode, one, true);
  const Tensor weight = args.weight.is_contiguous() ? args.weight : to_contiguous(args.weight, false);
  cpu::UpsamplePhasesParams params;
  std::vector<Tensor> held;
  for (int phase = 0; phase < 4; ++phase) {
    Tensor conv = aten_convolution(padded, phase_weight(weight, phase / 2, phase % 2), one, none);
    held.push_back(is_dense(conv, true) ? conv : to_contiguous(conv, true));
    params.phases[phase] = held.back().const_data_ptr();
  }

  InstanceNormRequest request = norm_request(args, plan);
  request.output_channels_last = true;
  request.in_place = true;  // only for the params: the kernel reads the phases
  const Tensor output = empty_dense(args.input, plan.output_sizes, true, dtype);
  advise_huge_pages(output);
  const auto call = prepare_instance_norm(request, output, args.norm_weight, args.norm_bias, args.residual);
  params.norm = call.params;
  params.height = args.input.size(2);
  params.width = args.input.size(3);
  cpu::instance_norm_phases(params, parallel_for);
  return in_format(output, plan.channels_last);
}

OwnedHandle run(const ConvInstanceNormOptions& options, const ConvInstanceNormFacts& tensors) {
  const ConvInstanceNormPlan plan = plan_conv_instance_norm(options, tensors);
  const Tensor input = tensor_of(tensors.input.handle), weight = tensor_of(tensors.weight.handle);
  const OptionalTensor bias = optional_tensor_of(tensors.bias), residual = optional_tensor_of(tensors.residual);
  const OptionalTensor norm_weight = optional_tensor_of(tensors.norm_weight);
  const OptionalTensor norm_bias = optional_tensor_of(tensors.norm_bias);
  const ConvInstanceNormArgs args{options, input, weight, bias, norm_weight, norm_bias, residual};
  if (auto output = run_upsample_phases(args, plan)) {
    record_path("conv_instance_norm_relu:cpu:upsample_phases");
    return owned(*output);
  }
  record_path("conv_instance_norm_relu:cpu:aten_conv");
  return owned(run_conv_instance_norm(kBackend, args, plan));
}

Tensor pad_upsample_operator(const Tensor& input, const std::vector<int64_t>& padding, const Text& padding_mode,
                             int64_t upsample) {
  return checked_pad_upsample(kBackend, input, padding, padding_mode, upsample);
}

}  // namespace
}  // namespace styleforge

STABLE_TORCH_LIBRARY_IMPL(styleforge, CPU, m) {
  m.impl("fused_conv_instance_norm_relu", TORCH_BOX(&styleforge::conv_instance_norm_operator<styleforge::run>));
  m.impl("_pad_upsample", TORCH_BOX(&styleforge::pad_upsample_operator));
}
