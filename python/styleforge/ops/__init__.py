"""The operators as typed Python functions; ``torch.ops.styleforge.*`` are the same operators by schema.

Importing this package registers their fakes, autograd, autocast and vmap rules.
"""

from __future__ import annotations

from styleforge import _library

_library.load()

from styleforge.ops import _fallback  # noqa: E402
from styleforge.ops._pad_upsample import pad_upsample  # noqa: E402
from styleforge.ops._precision import conv_precision, matmul_precision  # noqa: E402
from styleforge.ops.fused_attention import (  # noqa: E402
    fused_attention,
    fused_attention_v1,
    fused_attention_v2,
)
from styleforge.ops.fused_conv_instance_norm_relu import fused_conv_instance_norm_relu  # noqa: E402
from styleforge.ops.fused_ffn import fused_ffn  # noqa: E402
from styleforge.ops.fused_instance_norm import fused_instance_norm  # noqa: E402

_fallback.register()

__all__ = [
    "conv_precision",
    "fused_attention",
    "fused_attention_v1",
    "fused_attention_v2",
    "fused_conv_instance_norm_relu",
    "fused_ffn",
    "fused_instance_norm",
    "matmul_precision",
    "pad_upsample",
]
