"""One-line functions whose graphs are put where a site was: a call, so that the code is there once."""

# No `from __future__ import annotations`: TorchScript reads the annotations.
from functools import cache
from typing import Any, List, Optional

import torch
from torch import Tensor

from styleforge.fuse._calls import conv_instance_norm, ffn, instance_norm


def _conv_instance_norm(
    input: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    norm_weight: Optional[Tensor],
    norm_bias: Optional[Tensor],
    residual: Optional[Tensor],
    stride: List[int],
    padding: List[int],
    padding_mode: str,
    upsample: int,
    eps: float,
    activation: str,
    negative_slope: float,
    unbatched: bool,
    precision: str,
) -> Tensor:
    return conv_instance_norm(
        input,
        weight,
        bias,
        norm_weight,
        norm_bias,
        residual,
        stride,
        padding,
        padding_mode,
        upsample,
        eps,
        activation,
        negative_slope,
        unbatched,
        precision,
    )


def _instance_norm(
    input: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    residual: Optional[Tensor],
    eps: float,
    activation: str,
    negative_slope: float,
    unbatched: bool,
) -> Tensor:
    return instance_norm(input, weight, bias, residual, eps, activation, negative_slope, unbatched)


def _ffn(
    input: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Optional[Tensor],
    fc2_weight: Tensor,
    fc2_bias: Optional[Tensor],
    residual: Optional[Tensor],
    activation: str,
    hidden_dropout: float,
    hidden_training: bool,
    output_dropout: float,
    output_training: bool,
    precision: str,
) -> Tensor:
    return ffn(
        input,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        residual,
        activation,
        hidden_dropout,
        hidden_training,
        output_dropout,
        output_training,
        precision,
    )


_FUNCTIONS = {conv_instance_norm: _conv_instance_norm, instance_norm: _instance_norm, ffn: _ffn}


@cache
def graph_of(function: Any) -> Any:
    """The graph that calls one of the functions of ``styleforge.fuse._calls``."""
    return torch.jit.script(_FUNCTIONS[function]).graph
