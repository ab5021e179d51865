"""``styleforge::_unfold_columns``: the columns of a convolution's kernel as channels of its padded input.

    result[n, j * C + c, y, x] = pad(input)[n, c, y, x + j],   j < kernel_width

in channels_last, with zeros in the channels that make a pixel a multiple of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from styleforge.ops import _common as common

NAME = "_unfold_columns"
MOST_CHANNELS = 4
"""Of the input, on CUDA."""
_op = torch.ops.styleforge._unfold_columns.default


def _channels(input: Tensor, kernel_width: int) -> int:
    full = max(16 // input.dtype.itemsize, 1)
    return -(-kernel_width * input.shape[1] // full) * full


def composite(
    input: Tensor, kernel_width: int, padding: Sequence[int], padding_mode: str = "zeros"
) -> Tensor:
    """The operator in plain PyTorch: for the CPU, and for CUDA without the CUDA library."""
    rows, columns = common.pair(padding)
    mode = "constant" if padding_mode == "zeros" else padding_mode
    padded = F.pad(input, (columns, columns, rows, rows), mode=mode)
    width = padded.shape[3] - kernel_width + 1
    found = torch.cat([padded.narrow(3, j, width) for j in range(kernel_width)], 1)
    missing = _channels(input, kernel_width) - found.shape[1]
    return F.pad(found, (0, 0, 0, 0, 0, missing)).clone(memory_format=torch.channels_last)


@torch.library.register_fake("styleforge::_unfold_columns")  # type: ignore[untyped-decorator]
def _fake(input: Tensor, kernel_width: int, padding: Sequence[int], padding_mode: str = "zeros") -> Tensor:
    rows, columns = common.pair(padding)
    n, _, height, width = input.shape
    sizes = [n, _channels(input, kernel_width), height + 2 * rows, width + 2 * columns - kernel_width + 1]
    return common.empty_like_format(input, sizes, True)


def _vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    input: Tensor,
    kernel_width: int,
    padding: Sequence[int],
    padding_mode: str = "zeros",
) -> tuple[Tensor, int]:
    """Folds the vmapped dimension into the batch."""
    batch = input.movedim(in_dims[0] or 0, 0).shape[1]
    folded = common.fold(input, in_dims[0], info.batch_size, batch)
    result: Tensor = _op(folded, kernel_width, padding, padding_mode)
    return result.unflatten(0, (info.batch_size, batch)), 0


common.register_kernel(NAME, "CPU", composite)
torch.library.register_vmap("styleforge::_unfold_columns", _vmap)
