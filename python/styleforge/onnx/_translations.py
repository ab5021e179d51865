"""Every operator as a graph of standard ONNX operators: the smallest that computes the same.

One function an operator, in the schema's order of arguments; ``TRANSLATIONS`` is the table. Half precision
keeps the operators' promise: what is between the convolution (or the input) and the result is computed in
float32 and rounded once. Needs version 15 of the operator set (Shape with start and end) or newer; GELU is
one operator from version 20 on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from styleforge.onnx._graph import Graph, Value
from styleforge.ops._common import pair

_PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge"}

LEAST_OPSET = 15


def activate(g: Graph, x: Value, activation: str, negative_slope: float) -> Value:
    """The activations of the norm operators."""
    if activation == "relu":
        return g.op("Relu", x)
    if activation == "leaky_relu":
        return g.op("LeakyRelu", x, alpha=float(negative_slope))
    if activation == "silu":
        return g.op("Mul", x, g.op("Sigmoid", x))
    if activation == "sigmoid":
        return g.op("Sigmoid", x)
    if activation == "tanh":
        return g.op("Tanh", x)
    return x


def _gelu(g: Graph, x: Value, approximate: str, dtype: torch.dtype) -> Value:
    if g.opset >= 20:
        return g.op("Gelu", x, approximate=approximate)

    wide = dtype if dtype == torch.float64 else torch.float32
    x = g.cast(x, dtype, wide)

    def number(value: float) -> Value:
        return g.constant(torch.tensor(value, dtype=wide))

    if approximate == "none":
        inner = g.op("Erf", g.op("Mul", x, number(0.5**0.5)))
    else:
        cube = g.op("Mul", g.op("Mul", x, x), g.op("Mul", x, number(0.044715)))
        inner = g.op("Tanh", g.op("Mul", g.op("Add", x, cube), number(0.7978845608028654)))
    y = g.op("Mul", g.op("Mul", x, number(0.5)), g.op("Add", inner, number(1.0)))
    return g.cast(y, wide, dtype)


def activate_ffn(g: Graph, x: Value, activation: str, dtype: torch.dtype) -> Value:
    """The activations of the feed-forward operators; ``dtype`` is that of ``x``."""
    if activation in ("gelu", "gelu_tanh"):
        return _gelu(g, x, "none" if activation == "gelu" else "tanh", dtype)
    return activate(g, x, activation, 0.0)


def linear(g: Graph, x: Value, rank: int, weight: Value, bias: Value | None) -> Value:
    """``x @ weight.T + bias``, ``weight`` [out, in]; ``rank`` is that of ``x``."""
    if rank == 2:
        return g.op("Gemm", x, weight, bias, transB=1)
    y = g.op("MatMul", x, g.op("Transpose", weight, perm=[1, 0]))
    return y if bias is None else g.op("Add", y, bias)


def pad_upsample(
    g: Graph, input: Value, padding: Sequence[int], padding_mode: str = "zeros", upsample: int = 1
) -> Value:
    """``_pad_upsample``: nearest upsampling, then padding."""
    x = input
    rows, columns = pair(padding)
    if upsample != 1:
        scales = g.constant(torch.tensor([1.0, 1.0, upsample, upsample], dtype=torch.float32))
        x = g.op(
            "Resize",
            x,
            None,
            scales,
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
    if rows or columns:
        pads = g.integers([0, 0, rows, columns, 0, 0, rows, columns])
        x = g.op("Pad", x, pads, mode=_PAD_MODES[padding_mode])
    return x


def _instance_norm(
    g: Graph,
    x: Value,
    dtype: torch.dtype,
    channels: Value | int,
    weight: Value | None,
    bias: Value | None,
    eps: float,
    activation: str,
    negative_slope: float,
    residual: Value | None,
) -> Value:
    """The norm of ``x``, in ``dtype``, and what follows it.

    ``channels`` is their number, or a vector of that one number where it is dynamic.
    """
    wide = dtype if dtype == torch.float64 else torch.float32

    def parameter(value: Value | None, default: float) -> Value:
        if value is not None:
            return g.cast_argument(value, wide)
        if isinstance(channels, int):
            return g.constant(torch.full((channels,), default, dtype=wide))
        return g.op("Expand", g.constant(torch.tensor([default], dtype=wide)), channels)

    # [N, C]: InstanceNormalization only has one scale and shift a channel, those of a sample follow it.
    per_sample = any(p is not None and len(g.sizes(p)) == 2 for p in (weight, bias))
    scale = parameter(None if per_sample else weight, 1.0)
    shift = parameter(None if per_sample else bias, 0.0)
    y = g.op("InstanceNormalization", g.cast(x, dtype, wide), scale, shift, epsilon=float(eps))
    if per_sample:
        for name, param in (("Mul", weight), ("Add", bias)):
            if param is not None:
                y = g.op(name, y, g.op("Unsqueeze", g.cast_argument(param, wide), g.integers([2, 3])))
    if residual is not None:
        y = g.op("Add", y, g.cast_argument(residual, wide))
    return g.cast(activate(g, y, activation, negative_slope), wide, dtype)


def fused_instance_norm(
    g: Graph,
    input: Value,
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Value | None = None,
) -> Value:
    """Instance norm, residual and activation."""
    channels = g.sizes(input)[1]
    if channels is None:
        channels = g.op("Shape", input, start=1, end=2)
    return _instance_norm(
        g, input, g.dtype(input), channels, weight, bias, eps, activation, negative_slope, residual
    )


def fused_conv_instance_norm_relu(
    g: Graph,
    input: Value,
    weight: Value,
    bias: Value | None = None,
    norm_weight: Value | None = None,
    norm_bias: Value | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    padding_mode: str = "zeros",
    upsample: int = 1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.01,
    residual: Value | None = None,
    precision: str = "ieee",
) -> Value:
    """Upsampling, padding, convolution and the norm; the norm cancels the bias, which is left out."""
    rows, columns = pair(padding)
    zeros = padding_mode == "zeros"
    x = pad_upsample(g, input, (0, 0) if zeros else (rows, columns), padding_mode, upsample)
    y = g.op(
        "Conv",
        x,
        weight,
        None,
        strides=list(pair(stride)),
        pads=[rows, columns, rows, columns] if zeros else [0, 0, 0, 0],
    )
    channels = g.sizes(weight)[0]
    if channels is None:
        channels = g.op("Shape", weight, start=0, end=1)
    return _instance_norm(
        g, y, g.dtype(input), channels, norm_weight, norm_bias, eps, activation, negative_slope, residual
    )


def reflect_conv2d(
    g: Graph, input: Value, weight: Value, bias: Value | None = None, precision: str = "ieee"
) -> Value:
    """``_reflect_conv2d``: reflection padding of half the kernel and a convolution."""
    height, width = g.sizes(weight)[2:]
    if height is None or width is None:
        raise RuntimeError("_reflect_conv2d: weight's kernel must have a fixed size for ONNX")
    x = pad_upsample(g, input, (height // 2, width // 2), "reflect", 1)
    return g.op("Conv", x, weight, bias)


def fused_ffn(
    g: Graph,
    input: Value,
    fc1_weight: Value,
    fc1_bias: Value | None,
    fc2_weight: Value,
    fc2_bias: Value | None,
    activation: str = "gelu",
    residual: Value | None = None,
    precision: str = "ieee",
) -> Value:
    """Linear, activation, linear, residual."""
    rank = len(g.sizes(input))
    hidden = activate_ffn(g, linear(g, input, rank, fc1_weight, fc1_bias), activation, g.dtype(input))
    output = linear(g, hidden, rank, fc2_weight, fc2_bias)
    return output if residual is None else g.op("Add", output, residual)


def fused_attention(
    g: Graph,
    input: Value,
    qkv_weight: Value,
    qkv_bias: Value | None,
    out_weight: Value,
    out_bias: Value | None,
    num_heads: int,
    scale: float | None = None,
    is_causal: bool = False,
    key_padding_mask: Value | None = None,
    precision: str = "ieee",
) -> Value:
    """Projection, heads, projection: ``fused_attention`` and both of its versions."""
    dtype = g.dtype(input)
    wide = dtype if dtype == torch.float64 else torch.float32
    embed_dim = g.sizes(qkv_weight)[1]
    if embed_dim is None:
        raise RuntimeError("fused_attention: qkv_weight must have a fixed size for ONNX")
    width = embed_dim // num_heads
    qkv = g.cast(linear(g, input, 3, qkv_weight, qkv_bias), dtype, wide)

    # [N, S, 3, heads, width] to [3, N, heads, S, width]: each part is [1, N, heads, S, width].
    qkv = g.reshape(qkv, [0, 0, 3, num_heads, width])
    q, k, v = g.split(g.op("Transpose", qkv, perm=[2, 0, 3, 1, 4]), 3, 0)
    factor = width**-0.5 if scale is None else scale
    q = g.op("Mul", q, g.constant(torch.tensor(factor, dtype=wide)))
    scores = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 2, 4, 3]))
    hidden = _unseen(g, input, is_causal, key_padding_mask)
    if hidden is not None:
        # The lowest finite number: a row without any key is not 0 / 0.
        lowest = g.constant(torch.tensor(torch.finfo(wide).min, dtype=wide))
        scores = g.op("Where", hidden, lowest, scores)
    weights = g.op("Softmax", scores, axis=-1)
    if key_padding_mask is not None:  # such rows give zero; causal ones always see themselves
        weights = g.op("Where", hidden, g.constant(torch.tensor(0.0, dtype=wide)), weights)
    heads = g.op("Transpose", g.op("MatMul", weights, v), perm=[1, 3, 0, 2, 4])
    merged = g.reshape(heads, [0, 0, embed_dim])
    return linear(g, g.cast(merged, wide, dtype), 3, out_weight, out_bias)


def _unseen(g: Graph, input: Value, is_causal: bool, key_padding_mask: Value | None) -> Value | None:
    """Where a query does not see a key, bool, broadcast to [N, heads, S, S]; None where all see all."""
    padded = later = None
    if key_padding_mask is not None:
        padded = g.op("Unsqueeze", key_padding_mask, g.integers([1, 2]))
    if is_causal:
        length = g.op("Squeeze", g.op("Shape", input, start=1, end=2))
        zero, one = (g.constant(torch.tensor(number, dtype=torch.int64)) for number in (0, 1))
        positions = g.op("Range", zero, length, one)
        later = g.op("Less", g.op("Unsqueeze", positions, g.integers([1])), positions)
    if padded is None or later is None:
        return later if padded is None else padded
    return g.op("Or", padded, later)


TRANSLATIONS: dict[str, Callable[..., Any]] = {
    "fused_instance_norm": fused_instance_norm,
    "fused_conv_instance_norm_relu": fused_conv_instance_norm_relu,
    "fused_ffn": fused_ffn,
    "fused_attention": fused_attention,
    "fused_attention_v1": fused_attention,
    "fused_attention_v2": fused_attention,
    "_pad_upsample": pad_upsample,
    "_reflect_conv2d": reflect_conv2d,
}
"""From an operator's name to its translation, ``f(graph, *arguments of the schema)``."""
