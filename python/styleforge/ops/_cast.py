"""Casts under autocast whose gradients come back in float32 by ``styleforge::_widen``.

ATen's conversion of a 16-bit gradient takes twice the time that memory does (csrc/cuda/layout/widen.cu).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from styleforge.ops import _common as common

_widen = torch.ops.styleforge._widen.default


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``."""
    narrows = tensor.is_cuda and tensor.dtype == torch.float32 and dtype in (torch.float16, torch.bfloat16)
    if narrows and tensor.requires_grad and torch.is_grad_enabled():
        result: Tensor = common.apply_function(_Narrow, tensor, dtype)
        return result
    return tensor.to(dtype)


class _Narrow(torch.autograd.Function):
    """float32 to a 16-bit dtype."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, dtype: torch.dtype) -> Tensor:
        return input.to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    @common.first_order("autocast")
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return _widen(grad_output), None


def composite(input: Tensor) -> Tensor:
    """The operator in plain PyTorch."""
    return input.float() if input.dtype != torch.float32 else input.clone()


@torch.library.register_fake("styleforge::_widen")  # type: ignore[untyped-decorator]
def _fake(input: Tensor) -> Tensor:
    return torch.empty_like(input, dtype=torch.float32)


def _vmap(info: Any, in_dims: tuple[int | None, ...], input: Tensor) -> tuple[Tensor, int]:
    result: Tensor = _widen(input)
    return result, in_dims[0] or 0


common.register_kernel("_widen", "CPU", composite)
torch.library.register_vmap("styleforge::_widen", _vmap)
