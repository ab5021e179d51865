"""``FusedInstanceNorm2d``: ``nn.InstanceNorm2d`` with an activation and a residual in the same pass."""

from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from styleforge.nn._checks import check_choice, check_type
from styleforge.nn._symbolic import call_in_graph, is_symbolic
from styleforge.ops._common import ACTIVATIONS, BelowAutograd, autograd_is_idle
from styleforge.ops._composite import activate

_fused_instance_norm = torch.ops.styleforge.fused_instance_norm.default
_without_python = _fused_instance_norm._op


class FusedInstanceNorm2d(nn.InstanceNorm2d):
    """Drop-in for ``nn.InstanceNorm2d`` (same state dict), optionally with the activation that follows it.

    ``output = activation(instance_norm(input) + residual)``, see ``styleforge.ops.fused_instance_norm``.

    Args:
        num_features: channels C.
        eps: added to the variance.
        momentum: of the running statistics.
        affine: learnable scale and shift. True by default (``nn.InstanceNorm2d`` has False).
        track_running_stats: as in ``nn.InstanceNorm2d``: in eval mode the running statistics are used. Both
            modes then run on PyTorch's own operators, since there is no reduction to fuse (eval) or
            statistics to update (train).
        device: of the parameters.
        dtype: of the parameters.
        activation: none, relu, leaky_relu, silu, sigmoid or tanh.
        negative_slope: of leaky_relu.

    Attributes:
        weight: [C], or None where ``affine`` is false.
        bias: [C], or None where ``affine`` is false.

    Shape:
        input [N, C, H, W] or [C, H, W], residual the same; output the same, channels_last where the input is.

    Raises:
        ValueError: unknown activation; input of another rank or number of channels.
    """

    __constants__ = [*nn.InstanceNorm2d.__constants__, "activation", "negative_slope"]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "none",
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        check_choice("activation", activation, ACTIVATIONS)
        self.activation = activation
        self.negative_slope = negative_slope

    @classmethod
    def from_torch(
        cls, norm: nn.InstanceNorm2d, activation: str = "none", negative_slope: float = 0.01
    ) -> "FusedInstanceNorm2d":
        """The same layer, sharing its parameters and buffers.

        Args:
            norm: an existing layer, with or without parameters and running statistics.
            activation: as in the constructor.
            negative_slope: as in the constructor.

        Raises:
            TypeError: the layer is of another class.
        """
        check_type("norm", norm, nn.InstanceNorm2d)
        new = cls(
            norm.num_features,
            norm.eps,
            norm.momentum,  # type: ignore[arg-type]
            norm.affine,
            norm.track_running_stats,
            device="meta",
            activation=activation,
            negative_slope=negative_slope,
        )
        new._parameters = dict(norm._parameters)
        new._buffers = dict(norm._buffers)
        return new.train(norm.training)

    def forward(self, input: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        """Input and residual [N, C, H, W] or [C, H, W] to the same shape."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            if is_symbolic(input):
                node: Tensor = call_in_graph(self, input, residual)
                return node
        if self.track_running_stats:
            return self._forward_with_running_stats(input, residual)
        if input.dim() != 4:
            return self._forward_of_another_rank(input, residual)
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            scripted: Tensor = torch.ops.styleforge.fused_instance_norm(
                input, self.weight, self.bias, self.eps, self.activation, self.negative_slope, residual
            )
            return scripted
        if autograd_is_idle(input):
            return _infer(self, input, residual)
        weight, bias = self._scale_and_shift()
        output: Tensor = _fused_instance_norm(
            input, weight, bias, self.eps, self.activation, self.negative_slope, residual
        )
        return output

    def _scale_and_shift(self) -> tuple[Tensor | None, Tensor | None]:
        # nn.Module finds a parameter only after it has looked everywhere else for an attribute of that name.
        parameters = self._parameters
        try:
            return parameters["weight"], parameters["bias"]
        except KeyError:  # a parametrization or a wrapper keeps them elsewhere
            return self.weight, self.bias

    def _forward_of_another_rank(self, input: Tensor, residual: Optional[Tensor]) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            self._check_input_dim(input)
        batched: Tensor = torch.ops.styleforge.fused_instance_norm(
            input.unsqueeze(0),
            self.weight,
            self.bias,
            self.eps,
            self.activation,
            self.negative_slope,
            residual.unsqueeze(0) if residual is not None else None,
        )
        return batched.squeeze(0)

    def _forward_with_running_stats(self, input: Tensor, residual: Optional[Tensor]) -> Tensor:
        x = input.unsqueeze(0) if input.dim() == 3 else input
        output = F.instance_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum if self.momentum is not None else 0.0,
            self.eps,
        )
        if input.dim() == 3:
            output = output.squeeze(0)
        if residual is not None:
            output = output + residual
        return activate(output, self.activation, self.negative_slope)

    def extra_repr(self) -> str:
        """The arguments of ``nn.InstanceNorm2d``, and the activation where there is one."""
        text: str = super().extra_repr()  # type: ignore[no-untyped-call]
        if self.activation != "none":
            text += f", activation={self.activation}"
        return text


def _infer(module: FusedInstanceNorm2d, input: Tensor, residual: Tensor | None) -> Tensor:
    """The operator without gradients, by the shortest way: on the host a call costs what Python costs."""
    own = module.__dict__  # attributes of an nn.Module take three times as long
    weight, bias = module._scale_and_shift()
    activation = own["activation"]
    guard = BelowAutograd()
    try:
        if residual is None and activation != "leaky_relu":  # arguments that are left out take no conversion
            output: Tensor = _without_python(input, weight, bias, own["eps"], activation)
        else:
            rest = (own["eps"], activation, own["negative_slope"], residual)
            output = _without_python(input, weight, bias, *rest)
        return output
    finally:
        del guard
