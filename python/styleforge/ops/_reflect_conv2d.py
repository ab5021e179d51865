"""``styleforge::_reflect_conv2d``: reflection padding and a convolution of stride 1, for inference.

    output = conv2d(reflection_pad(input, kernel // 2), weight, bias)

The last layer of style-transfer networks (Johnson, Alahi, Fei-Fei 2016): few output channels, no norm behind
it. On sm_90 it runs by the columns of the kernel (``csrc/cuda/conv_instance_norm/columns.cu``), else through
cuDNN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from styleforge.ops import _common as common
from styleforge.ops import _composite as composite

NAME = "_reflect_conv2d"


def reflect_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, precision: str = "ieee"
) -> Tensor:
    """The same from PyTorch's operators: the CPU kernel, and CUDA's where the CUDA library is missing.

    Args:
        input: [N, Ci, H, W], float32, float16, bfloat16 or float64; H and W larger than half the kernel.
        weight: [Co, Ci, kh, kw] with odd kh and kw, the input's dtype.
        bias: [Co] or None.
        precision: of float32 convolutions in the CUDA kernels, "ieee" or "tf32"; here PyTorch's flags hold.

    Returns:
        [N, Co, H, W], channels_last where the input is.
    """
    output = composite.reflect_conv2d(input, weight, bias)
    return common.in_format(output, common.prefers_channels_last(input))


@torch.library.register_fake("styleforge::_reflect_conv2d")  # type: ignore[untyped-decorator]
def _fake(input: Tensor, weight: Tensor, bias: Tensor | None = None, precision: str = "ieee") -> Tensor:
    common.check_input(NAME, input)
    common.check_choice(NAME, "precision", precision, common.PRECISIONS)
    common.check_like(NAME, "weight", weight, input, (weight.shape[0], input.shape[1], *weight.shape[2:]))
    common.check_like(NAME, "bias", bias, input, weight.shape[:1])
    sizes = (input.shape[0], weight.shape[0], *input.shape[2:])
    return common.empty_like_format(input, sizes, common.prefers_channels_last(input))


common.register_kernel(NAME, "CPU", reflect_conv2d)
