"""PyTorch's numerical switches on the GPU, for every contender alike: precision and repeatability."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def precision_flags(precision: str) -> Iterator[None]:
    """What PyTorch's float32 products and convolutions may do on the GPU; the flags come back afterwards."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def repeatable_convolutions() -> Iterator[None]:
    """cuDNN takes algorithms that give the same bits on every run; the flag comes back afterwards.

    Gradients of convolutions are cuDNN's, whose fastest algorithms add in no fixed order.
    """
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before
