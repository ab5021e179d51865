"""Which arithmetic float32 convolutions take on the GPU when the caller does not say."""

from __future__ import annotations

import torch


def conv_precision(precision: str | None = None) -> str:
    """``precision`` where given; else "tf32" if PyTorch's cuDNN convolutions may use TF32, "ieee" if not.

    Follows ``torch.backends.cudnn.allow_tf32`` or, once somebody has set it, the newer
    ``torch.backends.cudnn.conv.fp32_precision``.
    """
    if precision is not None:
        return precision
    try:
        tf32: bool = torch.backends.cudnn.allow_tf32
    except RuntimeError:
        # The newer flags were set, and convolutions differ from RNNs: the older one has no answer.
        tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if tf32 else "ieee"
