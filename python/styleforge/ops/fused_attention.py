"""``styleforge::fused_attention``, ``_v1`` and ``_v2``: fake, autograd, autocast, vmap, functions.

    q, k, v = (input @ qkv_weight.T + qkv_bias).chunk(3, -1), each split into num_heads heads
    output = concat(softmax(scale * q @ k.T) @ v over the heads) @ out_weight.T + out_bias

Multi-head self-attention of transformer blocks (Vaswani et al.: Attention Is All You Need, 2017,
arXiv:1706.03762) with its projections. The three operators compute the same; v1 is meant for short sequences,
v2 for any length, and ``fused_attention`` chooses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from styleforge.ops import _common as common
from styleforge.ops._precision import matmul_precision, matmuls_of

# Operator and the `version` that the pair underneath takes.
VERSIONS = {"fused_attention": 0, "fused_attention_v1": 1, "fused_attention_v2": 2}
MAX_HEAD_DIM = 256
_forward_op = torch.ops.styleforge._fused_attention_forward.default
_backward_op = torch.ops.styleforge._fused_attention_backward.default
_below_autograd = common.below_autograd
_any_requires_grad = torch._C._any_requires_grad
_is_grad_enabled = torch.is_grad_enabled


def fused_attention(
    input: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """Multi-head self-attention with its projections as one operator.

        q, k, v = (input @ qkv_weight.T + qkv_bias).chunk(3, -1), each split into num_heads heads
        output = concat(softmax(scale * q @ k.T) @ v over the heads) @ out_weight.T + out_bias

    By schema ``torch.ops.styleforge.fused_attention``. Differentiable once; autocast, vmap and CUDA graphs
    work.

    Args:
        input: [N, S, embed_dim], float32, float16, bfloat16 or float64, any strides.
        qkv_weight: [3 * embed_dim, embed_dim], the input's dtype: the weights of queries, keys and values,
            one below the other, as ``nn.MultiheadAttention.in_proj_weight`` has them; within each, those of a
            head are embed_dim / num_heads rows in succession.
        qkv_bias: [3 * embed_dim], the input's dtype, or None.
        out_weight: [embed_dim, embed_dim], the input's dtype.
        out_bias: [embed_dim], the input's dtype, or None.
        num_heads: divides embed_dim; a head is at most 256 wide.
        scale: of the scores before the softmax; None: 1 / sqrt(embed_dim / num_heads).
        is_causal: no token sees a later one.
        key_padding_mask: [N, S] of bool, true where a token is not to be seen. A token that sees none at all
            gets zero from every head, and ``out_bias`` from the operator.
        precision: of float32 on the GPU, of the projections and wherever attention itself is made of matrix
            products: "ieee", "tf32", or None for what ``torch.backends.cuda.matmul``
            (``torch.set_float32_matmul_precision``) says.

    Returns:
        [N, S, embed_dim] in the input's dtype, contiguous.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what was given.

    Source:
        Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762; the running softmax of version 2:
        Dao et al., "FlashAttention", 2022, arXiv:2205.14135.
    """
    op = torch.ops.styleforge.fused_attention.default
    weights = (qkv_weight, qkv_bias, out_weight, out_bias)
    return _call(op, input, weights, num_heads, scale, is_causal, key_padding_mask, precision)


def fused_attention_v1(
    input: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """``fused_attention`` in the design for short sequences.

    Arguments, result and errors are those of ``fused_attention``.
    """
    op = torch.ops.styleforge.fused_attention_v1.default
    weights = (qkv_weight, qkv_bias, out_weight, out_bias)
    return _call(op, input, weights, num_heads, scale, is_causal, key_padding_mask, precision)


def fused_attention_v2(
    input: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """``fused_attention`` in the design for any length: tiles with a running softmax.

    Arguments, result and errors are those of ``fused_attention``.
    """
    op = torch.ops.styleforge.fused_attention_v2.default
    weights = (qkv_weight, qkv_bias, out_weight, out_bias)
    return _call(op, input, weights, num_heads, scale, is_causal, key_padding_mask, precision)


def _call(
    op: Any,
    input: Tensor,
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    num_heads: int,
    scale: float | None,
    is_causal: bool,
    key_padding_mask: Tensor | None,
    precision: str | None,
) -> Tensor:
    given = matmul_precision(precision)
    with matmuls_of(input, given):
        result: Tensor = op(input, *weights, num_heads, scale, is_causal, key_padding_mask, given)
    return result


def _check(
    name: str,
    input: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    key_padding_mask: Tensor | None,
    precision: str,
) -> None:
    common.check(
        name,
        input.dim() == 3 and input.shape[2] > 0,
        lambda: f"input must have shape [N, S, embed_dim], embed_dim > 0, got {list(input.shape)}",
    )
    common.check_dtype(name, "input", input)
    common.check_choice(name, "precision", precision, common.PRECISIONS)
    embed = input.shape[2]
    common.check(
        name,
        num_heads >= 1 and embed % num_heads == 0,
        lambda: f"num_heads must divide embed_dim, {embed}, got {num_heads}",
    )
    head_dim = embed // num_heads
    common.check(
        name,
        head_dim <= MAX_HEAD_DIM,
        lambda: (
            f"embed_dim / num_heads must be at most {MAX_HEAD_DIM}, got {embed} / {num_heads} = {head_dim}; "
            "take more heads"
        ),
    )
    common.check_like(name, "qkv_weight", qkv_weight, input, (3 * embed, embed))
    common.check_like(name, "qkv_bias", qkv_bias, input, (3 * embed,))
    common.check_like(name, "out_weight", out_weight, input, (embed, embed))
    common.check_like(name, "out_bias", out_bias, input, (embed,))
    if key_padding_mask is None:
        return
    mask = key_padding_mask
    common.check_device(name, "key_padding_mask", mask, input)
    common.check(
        name,
        mask.dtype == torch.bool,
        lambda: (
            "key_padding_mask must be bool (true: the key takes no part), got "
            f"{str(mask.dtype).removeprefix('torch.')}"
        ),
    )
    common.check(
        name,
        mask.dim() == 2 and mask.shape[0] == input.shape[0] and mask.shape[1] == input.shape[1],
        lambda: f"key_padding_mask must have shape {list(input.shape[:2])}, got {list(mask.shape)}",
    )


@torch.library.register_fake("styleforge::_fused_attention_forward")  # type: ignore[untyped-decorator]
def _fake_forward(
    input: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    scale: float | None,
    is_causal: bool,
    key_padding_mask: Tensor | None,
    precision: str,
    version: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    name = list(VERSIONS)[version]
    given = (input, qkv_weight, qkv_bias, out_weight, out_bias, num_heads, key_padding_mask, precision)
    _check(name, *given)
    batch, length, embed = input.shape
    return (
        input.new_empty((batch, length, embed)),
        input.new_empty((batch, length, 3 * embed)),
        input.new_empty((batch, length, embed)),
        input.new_empty((batch, num_heads, length), dtype=common.statistics_dtype(input)),
    )


@torch.library.register_fake("styleforge::_fused_attention_backward")  # type: ignore[untyped-decorator]
def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    qkv: Tensor,
    attention: Tensor,
    logsumexp: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor,
    num_heads: int,
    scale: float | None,
    is_causal: bool,
    key_padding_mask: Tensor | None,
    precision: str,
    needs_input: bool,
    needs_qkv_weight: bool,
    needs_qkv_bias: bool,
    needs_out_weight: bool,
    needs_out_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def gradient(needed: bool, *sizes: Any) -> Tensor:
        return input.new_empty(sizes if needed else (0,))

    return (
        gradient(needs_input, *input.shape),
        gradient(needs_qkv_weight, *qkv_weight.shape),
        gradient(needs_qkv_bias, qkv_weight.shape[0]),
        gradient(needs_out_weight, *out_weight.shape),
        gradient(needs_out_bias, out_weight.shape[0]),
    )


class _Attention(torch.autograd.Function):
    """Saves the input, the first product, the heads' results and the logsumexp of every row of scores.

    That is 5 embed_dim + num_heads numbers a token; the backward computes the scores again, block by block.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        qkv_weight: Tensor,
        qkv_bias: Tensor | None,
        out_weight: Tensor,
        out_bias: Tensor | None,
        *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        precision = rest[4]
        with matmuls_of(input, precision):
            result: tuple[Tensor, Tensor, Tensor, Tensor] = _forward_op(
                input, qkv_weight, qkv_bias, out_weight, out_bias, *rest
            )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, qkv_weight, _, out_weight, _, num_heads, scale, is_causal, mask, precision, version = inputs
        _, qkv, attention, logsumexp = output
        ctx.mark_non_differentiable(qkv, attention, logsumexp)
        ctx.set_materialize_grads(False)
        ctx.rest = (num_heads, scale, is_causal)
        ctx.precision = precision
        ctx.name = list(VERSIONS)[version]
        ctx.save_for_backward(input, qkv, attention, logsumexp, qkv_weight, out_weight, mask)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 11
        needs = [ctx.needs_input_grad[i] for i in range(5)]
        *saved, mask = ctx.saved_tensors
        gradients = _AttentionBackward.apply(  # type: ignore[no-untyped-call]
            ctx.name, grad_output, *saved, *ctx.rest, mask, ctx.precision, *needs
        )
        return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), *(None,) * 6)


class _AttentionBackward(common.FirstOrderFunction):
    @staticmethod
    def forward(name: str, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        with matmuls_of(args[1], args[11]):
            result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _backward_op(*args)
        return result


def _vmap_forward(
    info: Any, in_dims: tuple[int | None, ...], *args: Any, op: Any = _forward_op
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """A vmapped input or mask joins the batch; vmapped parameters are one call for each slice."""
    size = info.batch_size
    dims = (*in_dims, *(None,) * (len(args) - len(in_dims)))
    if any(d is not None for d in dims[1:5]):
        results = common.loop_over_slices(op, size, dims, args)
        return results, (0,) * len(results)
    input, mask = common.to_front(args[0], dims[0], size), args[8]
    assert input is not None
    batch = input.shape[1]
    folded = op(
        input.reshape(size * batch, *input.shape[2:]),
        *args[1:8],
        common.fold(mask, dims[8], size, batch),
        *args[9:],
    )
    results = tuple(r.reshape(size, batch, *r.shape[1:]) for r in folded)
    return results, (0,) * len(results)


def _vmap_backward(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Gradients of parameters are one for each slice, which one product over all of them cannot give."""
    size = info.batch_size
    if any(args[13:]) or any(d is not None for d in in_dims[5:7]):
        gradients = common.loop_over_slices(_backward_op, size, in_dims, args)
        return gradients, (0,) * len(gradients)
    front = common.to_front(args[1], in_dims[1], size)
    assert front is not None
    batch = front.shape[1]

    def fold(index: int) -> Tensor | None:
        return common.fold(args[index], in_dims[index], size, batch)

    grad_input, *absent = _backward_op(*(fold(i) for i in range(5)), *args[5:10], fold(10), *args[11:])
    if args[12]:
        grad_input = grad_input.reshape(size, batch, *grad_input.shape[1:])
    else:
        grad_input = grad_input.expand(size, 0)
    gradients = (grad_input, *(a.expand(size, 0) for a in absent))
    return gradients, (0,) * len(gradients)


def _register(name: str, version: int) -> None:
    """Fake, autograd, autocast and vmap of one of the three operators."""
    op = getattr(torch.ops.styleforge, name).default
    redispatch = op._handle.redispatch_boxed

    def fake(
        input: Tensor,
        qkv_weight: Tensor,
        qkv_bias: Tensor | None,
        out_weight: Tensor,
        out_bias: Tensor | None,
        num_heads: int,
        scale: float | None = None,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
        precision: str = "ieee",
    ) -> Tensor:
        given = (input, qkv_weight, qkv_bias, out_weight, out_bias, num_heads, key_padding_mask, precision)
        _check(name, *given)
        return input.new_empty(input.shape)

    def autograd(
        keyset: Any,
        input: Tensor,
        qkv_weight: Tensor,
        qkv_bias: Tensor | None,
        out_weight: Tensor,
        out_bias: Tensor | None,
        num_heads: int,
        scale: float | None = None,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
        precision: str = "ieee",
    ) -> Tensor:
        # As in fused_instance_norm, the first lines are what a call under no_grad costs on top.
        tensors = (input, qkv_weight, qkv_bias, out_weight, out_bias)
        rest = (num_heads, scale, is_causal, key_padding_mask, precision)
        if forward_ad._current_level >= 0:
            common.refuse_tangents(name, tensors)
        if not _is_grad_enabled() or not _any_requires_grad(*tensors):
            below = _below_autograd[keyset.raw_repr()]
            if not input.is_cuda:
                direct: Tensor = redispatch(below, *tensors, *rest)
                return direct
            with matmuls_of(input, precision):
                result: Tensor = redispatch(below, *tensors, *rest)
            return result
        outputs: tuple[Tensor, ...] = common.apply_function(_Attention, *tensors, *rest, version)
        return outputs[0]

    def autocast(
        input: Tensor,
        qkv_weight: Tensor,
        qkv_bias: Tensor | None,
        out_weight: Tensor,
        out_bias: Tensor | None,
        *rest: Any,
    ) -> Tensor:
        """As PyTorch's own linear and attention: everything that enters them is cast."""
        with common.no_autocast(input):
            dtype = common.autocast_dtype(input)

            def cast(tensor: Tensor | None) -> Tensor | None:
                return None if tensor is None else tensor.to(dtype)

            result: Tensor = op(
                input.to(dtype),
                qkv_weight.to(dtype),
                cast(qkv_bias),
                out_weight.to(dtype),
                cast(out_bias),
                *rest,
            )
            return result

    def as_tuple(*args: Any) -> tuple[Tensor, ...]:
        return (op(*args),)

    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        if len(args) < 9:  # the mask was left out
            args, in_dims = (
                (*args, *(None, False, None)[len(args) - 6 :]),
                (*in_dims, *(None,) * (9 - len(args))),
            )
        outputs, _ = _vmap_forward(info, in_dims, *args, op=as_tuple)
        return outputs[0], 0

    torch.library.register_fake(f"styleforge::{name}", fake)
    common.register_kernel(name, "Autograd", autograd, with_keyset=True)
    common.register_autocast(name, autocast)
    torch.library.register_vmap(f"styleforge::{name}", vmap)


for _name, _version in VERSIONS.items():
    _register(_name, _version)
torch.library.register_vmap("styleforge::_fused_attention_forward", _vmap_forward)
torch.library.register_vmap("styleforge::_fused_attention_backward", _vmap_backward)
