"""Which arithmetic float32 convolutions take on the GPU when the caller does not say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_get_cudnn_allow_tf32 = torch._C._get_cudnn_allow_tf32


def conv_precision(precision: str | None = None) -> str:
    """``precision`` where given; else "tf32" if PyTorch's cuDNN convolutions may use TF32, "ieee" if not.

    Follows ``torch.backends.cudnn.allow_tf32`` or, once somebody has set it, the newer
    ``torch.backends.cudnn.conv.fp32_precision``.
    """
    if precision is not None:
        return precision
    try:
        # Both read the same flag: the property is what torch.compile knows, the function takes no time.
        compiling = torch.compiler.is_dynamo_compiling()
        tf32: bool = torch.backends.cudnn.allow_tf32 if compiling else _get_cudnn_allow_tf32()
    except RuntimeError:
        # The newer flags were set, and convolutions differ from RNNs: the older one has no answer.
        tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if tf32 else "ieee"


@contextmanager
def convolutions_in(precision: str) -> Iterator[None]:
    """PyTorch's own convolutions take this precision inside; the user's flags come back afterwards."""
    flags = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = flags.fp32_precision
    flags.fp32_precision = precision
    try:
        yield
    finally:
        flags.fp32_precision = before
