"""Networks built on the fused operators, their checkpoints, and the styles that ship with the package."""

from __future__ import annotations

from .checkpoints import CheckpointError, load_checkpoint, read_metadata, read_state_dict, save_checkpoint
from .styles import StyleInfo, UnknownStyleError, available_styles, load_style
from .torch_transformer_net import TorchTransformerNet
from .transformer_net import TransformerNet

__all__ = [
    "CheckpointError",
    "StyleInfo",
    "TorchTransformerNet",
    "TransformerNet",
    "UnknownStyleError",
    "available_styles",
    "load_checkpoint",
    "load_style",
    "read_metadata",
    "read_state_dict",
    "save_checkpoint",
]
