"""Modules over the operators, drop-in for their PyTorch counterparts."""

from styleforge.nn.fused_attention import FusedAttention
from styleforge.nn.fused_conv_instance_norm_relu import FusedConvInstanceNormReLU
from styleforge.nn.fused_ffn import FusedFFN
from styleforge.nn.fused_instance_norm import FusedInstanceNorm2d
from styleforge.nn.residual_block import ResidualBlock

__all__ = ["FusedAttention", "FusedConvInstanceNormReLU", "FusedFFN", "FusedInstanceNorm2d", "ResidualBlock"]
