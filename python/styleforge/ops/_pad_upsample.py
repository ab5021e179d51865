"""``styleforge::_pad_upsample``: padding and nearest upsampling in one pass that keeps the memory format.

For inference next to convolutions that are not fused; PyTorch's own padding makes contiguous copies of
channels_last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from styleforge.ops import _common as common
from styleforge.ops import _composite as composite

NAME = "_pad_upsample"
_op = torch.ops.styleforge._pad_upsample.default


def pad_upsample(
    input: Tensor, padding: int | Sequence[int], *, padding_mode: str = "zeros", upsample: int = 1
) -> Tensor:
    """pad(upsample(input)); through PyTorch's operators where a gradient is needed.

    Args:
        input: [N, C, H, W], float32, float16, bfloat16 or float64.
        padding: on each side, one or two integers (rows, columns), in pixels.
        padding_mode: zeros, reflect or replicate.
        upsample: 1 or 2 (nearest neighbour), before the padding.

    Returns:
        [N, C, H * upsample + 2 * rows, W * upsample + 2 * columns], channels_last where the input is.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what was given.
    """
    if torch.is_grad_enabled() and input.requires_grad:
        return composite.pad_upsample(input, common.pair(padding), padding_mode, upsample)
    result: Tensor = _op(input, common.pair(padding), padding_mode, upsample)
    return result


@torch.library.register_fake("styleforge::_pad_upsample")  # type: ignore[untyped-decorator]
def _fake(input: Tensor, padding: Sequence[int], padding_mode: str = "zeros", upsample: int = 1) -> Tensor:
    common.check_input(NAME, input)
    common.check_choice(NAME, "padding_mode", padding_mode, common.PADDING_MODES)
    rows, columns = common.pair(padding)
    sizes: list[Any] = [
        input.shape[0],
        input.shape[1],
        input.shape[2] * upsample + 2 * rows,
        input.shape[3] * upsample + 2 * columns,
    ]
    return common.empty_like_format(input, sizes, common.prefers_channels_last(input))
