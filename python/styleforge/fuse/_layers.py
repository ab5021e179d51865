"""Descriptions of PyTorch's layers (``nn.Module`` instances)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.nn as nn
import torch.nn.utils.parametrize as parametrize

from styleforge.fuse import _operations as ops
from styleforge.fuse._operations import Attribute, Operation, Ref

_PADS: dict[type, str] = {
    nn.ReflectionPad2d: "reflect",
    nn.ReplicationPad2d: "replicate",
    nn.ZeroPad2d: "constant",
    nn.ConstantPad2d: "constant",
    nn.CircularPad2d: "circular",
}
_ACTIVATIONS: dict[type, str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh"}
# Not `models.torch_transformer_net`, which is plain PyTorch.
_OURS = ("styleforge.nn.", "styleforge.fuse.", "styleforge.models.transformer_net", "styleforge.models._")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def layer_type(module: nn.Module) -> type[nn.Module]:
    """The module's class; of a parametrized one, the class that it had before.

    Parametrizations live in the attributes (``weight`` is worked out when it is read), so such a layer
    computes what its class says. A subclass computes what it likes, and is not looked through.
    """
    kind = type(module)
    if parametrize.is_parametrized(module) and len(kind.__mro__) > 1:
        return kind.__mro__[1]
    return kind


def is_torch(module: nn.Module) -> bool:
    """Whether it is one of PyTorch's own layers."""
    return type(module).__module__.startswith(("torch.nn.", "torch.ao.nn."))


def is_ours(module: nn.Module) -> bool:
    """Whether it is a module of this package, which has its operators already."""
    return type(module).__module__.startswith(_OURS)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run around the module's forward, which a fused operator would not run."""
    return any(getattr(module, name, None) for name in _HOOKS) or "forward" in vars(module)


def describe(module: nn.Module, path: str, input: Ref) -> Operation | None:
    """What the layer at ``path`` computes from ``input``; None where that is nothing known here."""
    kind = layer_type(module)
    operation = _describe(kind, module, path, input)
    if operation is not None and has_hooks(module):
        return ops.Other(input, f"{kind.__name__} with hooks")
    return operation


def _describe(kind: type, m: Any, path: str, input: Ref) -> Operation | None:
    def attribute(name: str) -> Ref:
        return None if getattr(m, name) is None else Attribute(f"{path}.{name}" if path else name)

    if kind is nn.Conv2d:
        weight, bias = attribute("weight"), attribute("bias")
        found = ops.conv(
            input, weight, bias, m.stride, m.padding, m.dilation, m.groups, m.padding_mode, m.kernel_size
        )
        return replace(found, sizes=(m.out_channels, *m.kernel_size))
    if kind is nn.InstanceNorm2d:
        problem = "track_running_stats=True" if m.track_running_stats else None
        return ops.Norm(input, attribute("weight"), attribute("bias"), m.eps, True, problem)
    if kind in _PADS:
        return ops.pad(input, m.padding, _PADS[kind], getattr(m, "value", None))
    if kind in (nn.Upsample, nn.UpsamplingNearest2d):
        recompute = getattr(m, "recompute_scale_factor", None)
        return ops.upsample(input, m.size, m.scale_factor, m.mode, m.align_corners, recompute, False)
    if kind in _ACTIVATIONS:
        return ops.Activation(input, _ACTIVATIONS[kind])
    if kind is nn.LeakyReLU:
        return ops.Activation(input, "leaky_relu", float(m.negative_slope))
    if kind is nn.GELU:
        return ops.gelu(input, m.approximate)
    if kind is nn.Linear:
        return ops.Linear(input, attribute("weight"), attribute("bias"))
    if kind is nn.Identity:
        return ops.Identity(input)
    if kind is nn.Dropout:
        return ops.Identity(input) if m.p == 0 else ops.Dropout(input, attribute("p"), attribute("training"))
    if kind in (nn.ConvTranspose2d, nn.InstanceNorm1d, nn.InstanceNorm3d, nn.Dropout2d):
        return ops.Other(input, kind.__name__)
    return None
