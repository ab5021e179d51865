"""``styleforge::fused_instance_norm``: fake, autograd, autocast, vmap and the typed functional form.

    output = activation((input - mean) * rstd * weight + bias + residual)

with mean and (biased) variance over the pixels of each sample and channel, ``rstd = 1 / sqrt(variance +
eps)`` (Ulyanov, Vedaldi, Lempitsky: Instance Normalization, 2016, arXiv:1607.08022).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from styleforge.ops import _common as common

NAME = "fused_instance_norm"
_op = torch.ops.styleforge.fused_instance_norm.default
_forward_op = torch.ops.styleforge._fused_instance_norm_forward.default
_backward_op = torch.ops.styleforge._fused_instance_norm_backward.default
_redispatch = _op._handle.redispatch_boxed
_below_autograd = common.below_autograd
_any_requires_grad = torch._C._any_requires_grad
_is_grad_enabled = torch.is_grad_enabled

# Activations whose derivative follows from the result: the backward pass needs no residual for them.
_FROM_OUTPUT = ("relu", "leaky_relu", "sigmoid", "tanh")


def fused_instance_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """Instance norm, residual and activation in one pass.

        output = activation((input - mean) / sqrt(variance + eps) * weight + bias + residual)

    with mean and (biased) variance over the pixels of each sample and channel, in float32 or better. By
    schema ``torch.ops.styleforge.fused_instance_norm``. Differentiable once; autocast, vmap and CUDA
    graphs work.

    Args:
        input: [N, C, H, W], float32, float16, bfloat16 or float64, any strides.
        weight: scale, [C] or [N, C] (per sample), of the input's dtype or float32.
        bias: shift, shaped and typed as ``weight``.
        eps: added to the variance.
        activation: none, relu, leaky_relu, silu, sigmoid or tanh.
        negative_slope: of leaky_relu.
        residual: added before the activation; shape and dtype of ``input``.

    Returns:
        [N, C, H, W] in the input's dtype; channels_last where the input is, else contiguous.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what was given.

    Source:
        Ulyanov, Vedaldi, Lempitsky, "Instance Normalization", 2016, arXiv:1607.08022.
    """
    result: Tensor = _op(input, weight, bias, eps, activation, negative_slope, residual)
    return result


def _check(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, activation: str, residual: Tensor | None
) -> None:
    common.check_input(NAME, input)
    common.check_choice(NAME, "activation", activation, common.ACTIVATIONS)
    common.check_norm_params(NAME, ("weight", weight), ("bias", bias), input, input.shape[1])
    common.check_like(NAME, "residual", residual, input, input.shape)


@torch.library.register_fake("styleforge::fused_instance_norm")  # type: ignore[untyped-decorator]
def _fake(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    _check(input, weight, bias, activation, residual)
    return common.empty_like_format(input, input.shape, common.prefers_channels_last(input))


@torch.library.register_fake("styleforge::_fused_instance_norm_forward")  # type: ignore[untyped-decorator]
def _fake_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    output = _fake(input, weight, bias, eps, activation, negative_slope, residual)
    dtype = common.statistics_dtype(input)
    mean = torch.empty(input.shape[:2], dtype=dtype, device=input.device)
    return output, mean, torch.empty_like(mean)


@torch.library.register_fake("styleforge::_fused_instance_norm_backward")  # type: ignore[untyped-decorator]
def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    negative_slope: float,
    residual: Tensor | None,
    output: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_input = common.empty_like_format(input, input.shape, common.prefers_channels_last(input))
    param = weight if weight is not None else bias
    dtype = param.dtype if param is not None else torch.float32

    def gradient_of(given: Tensor | None) -> Tensor:
        sizes = given.shape if given is not None else (0,)
        return torch.empty(sizes, dtype=dtype, device=input.device)

    if (residual is not None or output is not None) and activation != "none":
        grad_residual = torch.empty_like(grad_input)
    else:
        grad_residual = torch.empty((0,), dtype=input.dtype, device=input.device)
    return grad_input, gradient_of(weight), gradient_of(bias), grad_residual


class _InstanceNorm(torch.autograd.Function):
    """Saves input, mean and rstd, and with a residual also the result (the residual itself for silu)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        activation: str,
        negative_slope: float,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = _forward_op(
            input, weight, bias, eps, activation, negative_slope, residual
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        input, weight, bias, _, activation, negative_slope, residual = inputs
        result, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.activation = activation
        ctx.negative_slope = negative_slope
        ctx.has_residual = residual is not None
        from_output = activation in _FROM_OUTPUT and (activation != "leaky_relu" or negative_slope > 0)
        keeps_output = residual is not None and from_output
        keeps_residual = residual is not None and activation != "none" and not from_output
        ctx.save_for_backward(
            input,
            weight,
            bias,
            mean,
            rstd,
            residual if keeps_residual else None,
            result if keeps_output else None,
        )

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 7
        input, weight, bias, mean, rstd, residual, output = ctx.saved_tensors
        grad_input, grad_weight, grad_bias, grad_residual = _InstanceNormBackward.apply(  # type: ignore[no-untyped-call]
            NAME,
            grad_output,
            input,
            mean,
            rstd,
            weight,
            bias,
            ctx.activation,
            ctx.negative_slope,
            residual,
            output,
        )
        if ctx.activation == "none":
            grad_residual = grad_output
        return (
            grad_input,
            grad_weight if weight is not None else None,
            grad_bias if bias is not None else None,
            None,
            None,
            None,
            grad_residual if ctx.has_residual else None,
        )


class _InstanceNormBackward(common.FirstOrderFunction):
    @staticmethod
    def forward(name: str, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor, Tensor] = _backward_op(*args)
        return result


def _autograd(
    keyset: Any,
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    # These first lines are what a call under no_grad costs on top of the operator: named arguments (no tuple
    # is packed and unpacked), a table in place of keyset arithmetic, the redispatch on the handle itself.
    if forward_ad._current_level >= 0:
        common.refuse_tangents(NAME, (input, weight, bias, residual))
    if not _is_grad_enabled() or not _any_requires_grad(input, weight, bias, residual):
        result: Tensor = _redispatch(
            _below_autograd[keyset.raw_repr()],
            input,
            weight,
            bias,
            eps,
            activation,
            negative_slope,
            residual,
        )
        return result
    return _differentiable(input, weight, bias, eps, activation, negative_slope, residual)


def _differentiable(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    outputs: tuple[Tensor, Tensor, Tensor] = common.apply_function(
        _InstanceNorm, input, weight, bias, eps, activation, negative_slope, residual
    )
    return outputs[0]


def _autocast(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """Instance norm runs in its input's dtype under autocast; a residual of another one is brought to it."""
    with common.no_autocast(input):
        if residual is not None and residual.dtype != input.dtype:
            residual = residual.to(input.dtype)
        weight, bias = common.norm_params_for(input.dtype, weight, bias)
        return fused_instance_norm(
            input,
            weight,
            bias,
            eps=eps,
            activation=activation,
            negative_slope=negative_slope,
            residual=residual,
        )


def _vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> tuple[Tensor, int]:
    outputs, _ = _vmap_forward(
        info, in_dims, input, weight, bias, eps, activation, negative_slope, residual, op=_op_as_tuple
    )
    return outputs[0], 0


def _op_as_tuple(*args: Any) -> tuple[Tensor, ...]:
    return (_op(*args),)


def _vmap_forward(
    info: Any,
    in_dims: tuple[int | None, ...],
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    residual: Tensor | None,
    op: Any = _forward_op,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    size = info.batch_size
    dims = tuple(in_dims) + (None,) * (7 - len(in_dims))
    batch = input.shape[0] if dims[0] is None else input.movedim(dims[0], 0).shape[1]
    folded = common.fold(input, dims[0], size, batch)
    assert folded is not None
    if dims[1] is None and dims[2] is None and all(p is None or p.dim() == 1 for p in (weight, bias)):
        folded_weight, folded_bias = weight, bias  # [C] for all of them
    else:
        folded_weight = common.fold_param(weight, dims[1], size, batch)
        folded_bias = common.fold_param(bias, dims[2], size, batch)
    results = op(
        folded,
        folded_weight,
        folded_bias,
        eps,
        activation,
        negative_slope,
        common.fold(residual, dims[6], size, batch),
    )
    outputs = tuple(r.reshape(size, batch, *r.shape[1:]) for r in results)
    return outputs, (0,) * len(outputs)


def _vmap_backward(
    info: Any,
    in_dims: tuple[int | None, ...],
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    negative_slope: float,
    residual: Tensor | None,
    output: Tensor | None,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    size = info.batch_size
    sample = input if in_dims[1] is None else input.movedim(in_dims[1], 0)[0]
    batch = sample.shape[0]

    def fold(tensor: Tensor | None, position: int) -> Tensor | None:
        return common.fold(tensor, in_dims[position], size, batch)

    folded_weight = common.fold_param(weight, in_dims[4], size, batch)
    folded_bias = common.fold_param(bias, in_dims[5], size, batch)
    grad_input, grad_weight, grad_bias, grad_residual = _backward_op(
        fold(grad_output, 0),
        fold(input, 1),
        fold(mean, 2),
        fold(rstd, 3),
        folded_weight,
        folded_bias,
        activation,
        negative_slope,
        fold(residual, 8),
        fold(output, 9),
    )

    def unfold_param(grad: Tensor, param: Tensor | None, dim: int | None) -> Tensor:
        if param is None:
            return grad.expand(size, 0)
        grad = grad.reshape(size, batch, -1)
        own_dims = param.dim() - (dim is not None)
        return grad.sum(1) if own_dims == 1 else grad

    def unfold(tensor: Tensor) -> Tensor:
        if tensor.dim() == 1:  # the [0] of "no residual"
            return tensor.expand(size, 0)
        return tensor.reshape(size, batch, *tensor.shape[1:])

    return (
        unfold(grad_input),
        unfold_param(grad_weight, weight, in_dims[4]),
        unfold_param(grad_bias, bias, in_dims[5]),
        unfold(grad_residual),
    ), (0, 0, 0, 0)


common.register_kernel(NAME, "Autograd", _autograd, with_keyset=True)
common.register_autocast(NAME, _autocast)
torch.library.register_vmap("styleforge::fused_instance_norm", _vmap)
torch.library.register_vmap("styleforge::_fused_instance_norm_forward", _vmap_forward)
torch.library.register_vmap("styleforge::_fused_instance_norm_backward", _vmap_backward)
