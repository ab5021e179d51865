"""``styleforge::fused_ffn``: fake, autograd, autocast, vmap and the typed functional form.

    output = activation(input @ fc1_weight.T + fc1_bias) @ fc2_weight.T + fc2_bias + residual

The feed-forward network of transformer blocks (Vaswani et al.: Attention Is All You Need, 2017,
arXiv:1706.03762), with the GELU of Hendrycks, Gimpel (2016, arXiv:1606.08415) and others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from styleforge.ops import _common as common
from styleforge.ops._precision import matmul_precision, matmuls_of

NAME = "fused_ffn"
_op = torch.ops.styleforge.fused_ffn.default
_forward_op = torch.ops.styleforge._fused_ffn_forward.default
_backward_op = torch.ops.styleforge._fused_ffn_backward.default
_redispatch = _op._handle.redispatch_boxed
_below_autograd = common.below_autograd
_any_requires_grad = torch._C._any_requires_grad
_is_grad_enabled = torch.is_grad_enabled


def fused_ffn(
    input: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str = "gelu",
    residual: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """Linear, activation, linear and residual as one operator.

        output = activation(input @ fc1_weight.T + fc1_bias) @ fc2_weight.T + fc2_bias + residual

    By schema ``torch.ops.styleforge.fused_ffn``. Differentiable once; autocast, vmap and CUDA graphs work.

    Args:
        input: [..., embed_dim], at least one dimension, float32, float16, bfloat16 or float64, any strides.
        fc1_weight: [hidden_dim, embed_dim], the input's dtype, as ``nn.Linear`` has it.
        fc1_bias: [hidden_dim], the input's dtype, or None.
        fc2_weight: [out_dim, hidden_dim], the input's dtype.
        fc2_bias: [out_dim], the input's dtype, or None.
        activation: gelu (erf), gelu_tanh, relu or silu.
        residual: added at the end; [..., out_dim], the input's dtype.
        precision: of float32 on the GPU: "ieee", "tf32", or None for what ``torch.backends.cuda.matmul``
            (``torch.set_float32_matmul_precision``) says.

    Returns:
        [..., out_dim] in the input's dtype, contiguous.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what was given.

    Source:
        Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762; GELU: Hendrycks, Gimpel, 2016,
        arXiv:1606.08415.
    """
    given = matmul_precision(precision)
    with matmuls_of(input, given):
        result: Tensor = _op(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual, given)
    return result


def _check(
    input: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    precision: str,
) -> None:
    common.check(
        NAME,
        input.dim() > 0,
        lambda: f"input must have shape [..., embed_dim], got {list(input.shape)}",
    )
    common.check_dtype(NAME, "input", input)
    common.check_choice(NAME, "activation", activation, common.FFN_ACTIVATIONS)
    common.check_choice(NAME, "precision", precision, common.PRECISIONS)
    _check_weight("fc1_weight", "hidden", fc1_weight, input, input.shape[-1])
    common.check_like(NAME, "fc1_bias", fc1_bias, input, fc1_weight.shape[:1])
    _check_weight("fc2_weight", "out", fc2_weight, input, fc1_weight.shape[0])
    common.check_like(NAME, "fc2_bias", fc2_bias, input, fc2_weight.shape[:1])
    common.check_like(NAME, "residual", residual, input, (*input.shape[:-1], fc2_weight.shape[0]))


def _check_weight(argument: str, rows: str, weight: Tensor, input: Tensor, columns: Any) -> None:
    common.check(
        NAME,
        weight.dim() == 2 and weight.shape[1] == columns,
        lambda: f"{argument} must have shape [{rows}, {columns}], got {list(weight.shape)}",
    )
    common.check_like(NAME, argument, weight, input, weight.shape)


@torch.library.register_fake("styleforge::fused_ffn")  # type: ignore[untyped-decorator]
def _fake(
    input: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str = "gelu",
    residual: Tensor | None = None,
    precision: str = "ieee",
) -> Tensor:
    _check(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual, precision)
    return input.new_empty((*input.shape[:-1], fc2_weight.shape[0]))


@torch.library.register_fake("styleforge::_fused_ffn_forward")  # type: ignore[untyped-decorator]
def _fake_forward(
    input: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor]:
    output = _fake(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual, precision)
    return output, input.new_empty((*input.shape[:-1], fc1_weight.shape[0]))


@torch.library.register_fake("styleforge::_fused_ffn_backward")  # type: ignore[untyped-decorator]
def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    hidden: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    activation: str,
    precision: str,
    needs_input: bool,
    needs_fc1_weight: bool,
    needs_fc1_bias: bool,
    needs_fc2_weight: bool,
    needs_fc2_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def gradient(needed: bool, *sizes: Any) -> Tensor:
        return input.new_empty(sizes if needed else (0,))

    return (
        gradient(needs_input, *input.shape),
        gradient(needs_fc1_weight, *fc1_weight.shape),
        gradient(needs_fc1_bias, fc1_weight.shape[0]),
        gradient(needs_fc2_weight, *fc2_weight.shape),
        gradient(needs_fc2_bias, fc2_weight.shape[0]),
    )


class _FFN(torch.autograd.Function):
    """Saves the input and the first product before its bias; the backward activates that again.

    The pass that it needs for the derivative gives the activation's result as well, so one tensor of the
    hidden width is held from forward to backward, where ``nn.Linear`` and ``nn.GELU`` hold two.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor | None,
        fc2_weight: Tensor,
        fc2_bias: Tensor | None,
        activation: str,
        residual: Tensor | None,
        precision: str,
    ) -> tuple[Tensor, Tensor]:
        with matmuls_of(input, precision):
            result: tuple[Tensor, Tensor] = _forward_op(
                input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual, precision
            )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, fc1_weight, fc1_bias, fc2_weight, _, activation, _, precision = inputs
        hidden = output[1]
        ctx.mark_non_differentiable(hidden)
        ctx.set_materialize_grads(False)
        ctx.activation = activation
        ctx.precision = precision
        ctx.save_for_backward(input, hidden, fc1_weight, fc1_bias, fc2_weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 8
        needs = [ctx.needs_input_grad[i] for i in range(5)]
        gradients = _FFNBackward.apply(  # type: ignore[no-untyped-call]
            NAME, grad_output, *ctx.saved_tensors, ctx.activation, ctx.precision, *needs
        )
        wanted = [g if need else None for g, need in zip(gradients, needs, strict=True)]
        return (*wanted, None, grad_output if ctx.needs_input_grad[6] else None, None)


class _FFNBackward(common.FirstOrderFunction):
    @staticmethod
    def forward(name: str, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        with matmuls_of(args[1], args[7]):
            result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _backward_op(*args)
        return result


def _autograd(
    keyset: Any,
    input: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str = "gelu",
    residual: Tensor | None = None,
    precision: str = "ieee",
) -> Tensor:
    # As in fused_instance_norm, the first lines are what a call under no_grad costs on top of the operator.
    if forward_ad._current_level >= 0:
        common.refuse_tangents(NAME, (input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual))
    if not _is_grad_enabled() or not _any_requires_grad(
        input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual
    ):
        below = _below_autograd[keyset.raw_repr()]
        args = (input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual, precision)
        if not input.is_cuda:
            direct: Tensor = _redispatch(below, *args)
            return direct
        with matmuls_of(input, precision):
            result: Tensor = _redispatch(below, *args)
        return result
    outputs: tuple[Tensor, Tensor] = common.apply_function(
        _FFN, input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual, precision
    )
    return outputs[0]


def _autocast(
    input: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str = "gelu",
    residual: Tensor | None = None,
    precision: str = "ieee",
) -> Tensor:
    """As PyTorch's own linear: everything that enters it is cast."""
    with common.no_autocast(input):
        dtype = common.autocast_dtype(input)

        def cast(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(dtype)

        result: Tensor = _op(
            input.to(dtype),
            fc1_weight.to(dtype),
            cast(fc1_bias),
            fc2_weight.to(dtype),
            cast(fc2_bias),
            activation,
            cast(residual),
            precision,
        )
        return result


def _vmap_forward(
    info: Any, in_dims: tuple[int | None, ...], *args: Any, op: Any = _forward_op
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """A vmapped input has one more leading dimension; vmapped parameters are one call for each slice."""
    size = info.batch_size
    dims = (*in_dims, *(None,) * (len(args) - len(in_dims)))
    if any(d is not None for d in dims[1:5]):
        results = common.loop_over_slices(op, size, dims, args)
    else:
        input, residual = common.to_front(args[0], dims[0], size), common.to_front(args[6], dims[6], size)
        results = op(input, *args[1:6], residual, *args[7:])
    return results, (0,) * len(results)


def _op_as_tuple(*args: Any) -> tuple[Tensor, ...]:
    return (_op(*args),)


def _vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    input: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str = "gelu",
    residual: Tensor | None = None,
    precision: str = "ieee",
) -> tuple[Tensor, int]:
    args = (input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual, precision)
    outputs, _ = _vmap_forward(info, in_dims, *args, op=_op_as_tuple)
    return outputs[0], 0


def _vmap_backward(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Gradients of parameters are one for each slice, which one product over all of them cannot give."""
    size = info.batch_size
    if any(args[9:]) or any(d is not None for d in in_dims[3:6]):
        gradients = common.loop_over_slices(_backward_op, size, in_dims, args)
    else:
        rows = [common.to_front(a, d, size) for a, d in zip(args[:3], in_dims[:3], strict=True)]
        grad_input, *absent = _backward_op(*rows, *args[3:])
        if not args[8]:
            grad_input = grad_input.expand(size, 0)
        gradients = (grad_input, *(a.expand(size, 0) for a in absent))
    return gradients, (0,) * len(gradients)


common.register_kernel(NAME, "Autograd", _autograd, with_keyset=True)
common.register_autocast(NAME, _autocast)
torch.library.register_vmap("styleforge::fused_ffn", _vmap)
torch.library.register_vmap("styleforge::_fused_ffn_forward", _vmap_forward)
torch.library.register_vmap("styleforge::_fused_ffn_backward", _vmap_backward)
