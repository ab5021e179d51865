"""``styleforge::_column_gradient``: the gradient of the weights of a convolution kernel of one column.

    result[k, a, b] = sum over n, y, x of grad[n, a, y, x] * input[n, b, y + k, x]

in float32 (float64 for float64), for the convolutions that ``_few_channels`` makes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from styleforge.ops import _common as common

NAME = "_column_gradient"
CHANNELS = 32
"""Of grad and input, on CUDA."""
MOST_ROWS = 9
MOST_SAMPLES = 65535
_op = torch.ops.styleforge._column_gradient.default


def composite(grad: Tensor, input: Tensor) -> Tensor:
    """The operator in plain PyTorch: for the CPU, and for CUDA without the CUDA library."""
    dtype = common.statistics_dtype(grad)
    wide = grad.to(dtype)
    height = grad.shape[2]
    found = [
        torch.einsum("nayx,nbyx->ab", wide, input.narrow(2, k, height).to(dtype))
        for k in range(input.shape[2] - height + 1)
    ]
    return torch.stack(found)


@torch.library.register_fake("styleforge::_column_gradient")  # type: ignore[untyped-decorator]
def _fake(grad: Tensor, input: Tensor) -> Tensor:
    sizes = (input.shape[2] - grad.shape[2] + 1, grad.shape[1], input.shape[1])
    return torch.empty(sizes, dtype=common.statistics_dtype(grad), device=grad.device)


def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    """A call for each slice: the sums go over the batch."""
    return common.loop_over_slices(_as_tuple, info.batch_size, in_dims, args)[0], 0


def _as_tuple(*args: Any) -> tuple[Tensor]:
    return (_op(*args),)


common.register_kernel(NAME, "CPU", composite)
torch.library.register_vmap("styleforge::_column_gradient", _vmap)
