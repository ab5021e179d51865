"""The plain layers in JAX, for `styleforge bench --against jax`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from styleforge.bench.cases import _SelfAttention, _Shortcut
from styleforge.bench.contenders import Unavailable


def translate(module: nn.Module, device: Any, exact: bool) -> Callable[[Any], Any]:
    """A JAX function that does what the module does, with its parameters put on a JAX device.

    Args:
        module: layers of the cases, NCHW.
        device: a JAX device.
        exact: float32 products in full precision instead of what XLA takes by default (TF32 on GPUs).

    Raises:
        Unavailable: a layer has no translation here.
    """
    jax = importlib.import_module("jax")
    np, lax = jax.numpy, jax.lax
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT

    def array(tensor: Tensor | None) -> Any:
        return None if tensor is None else jax.device_put(tensor.detach().cpu().numpy(), device)

    def linear(x: Any, weight: Any, bias: Any) -> Any:
        y = np.matmul(x, weight.T, precision=precision)
        return y if bias is None else y + bias

    def convolution(conv: nn.Conv2d) -> Callable[[Any], Any]:
        weight, bias = array(conv.weight), array(conv.bias)
        padding = [(int(p), int(p)) for p in conv.padding]

        def call(x: Any) -> Any:
            y = lax.conv_general_dilated(
                x,
                weight,
                conv.stride,
                padding,
                precision=precision,
                dimension_numbers=("NCHW", "OIHW", "NCHW"),
            )
            return y if bias is None else y + bias[:, None, None]

        return call

    def norm(layer: nn.InstanceNorm2d) -> Callable[[Any], Any]:
        weight, bias = array(layer.weight), array(layer.bias)

        def call(x: Any) -> Any:
            y = x.astype(np.float32)
            mean = y.mean((2, 3), keepdims=True)
            variance = np.square(y - mean).mean((2, 3), keepdims=True)
            y = ((y - mean) * lax.rsqrt(variance + layer.eps)).astype(x.dtype)
            return y * weight[:, None, None] + bias[:, None, None]

        return call

    def attention(layer: nn.MultiheadAttention) -> Callable[[Any], Any]:
        weights = [array(t) for t in (layer.in_proj_weight, layer.in_proj_bias)]
        out = [array(t) for t in (layer.out_proj.weight, layer.out_proj.bias)]
        heads = layer.num_heads

        def call(x: Any) -> Any:
            n, length, embed = x.shape
            q, k, v = np.split(linear(x, *weights).reshape(n, length, 3 * heads, embed // heads), 3, axis=2)
            # jax.nn.dot_product_attention takes no precision: it is set for what it calls.
            with jax.default_matmul_precision("highest" if exact else "default"):
                y = jax.nn.dot_product_attention(q, k, v)
            return linear(y.reshape(n, length, embed), *out)

        return call

    def follow(layer: nn.Module) -> Callable[[Any], Any]:
        if isinstance(layer, nn.Sequential):
            parts = [follow(part) for part in layer]

            def chain(x: Any) -> Any:
                for part in parts:
                    x = part(x)
                return x

            return chain
        if isinstance(layer, _Shortcut) and layer.activation in (None, F.relu):
            inner, last = follow(layer.layers), jax.nn.relu if layer.activation else lambda y: y
            return lambda x: last(inner(x) + x)
        if isinstance(layer, _SelfAttention):
            return attention(layer.attention)
        if isinstance(layer, nn.Linear):
            weight, bias = array(layer.weight), array(layer.bias)
            return lambda x: linear(x, weight, bias)
        if isinstance(layer, nn.GELU):
            return lambda x: jax.nn.gelu(x, approximate=layer.approximate == "tanh")
        if isinstance(layer, nn.ReLU):
            relu: Callable[[Any], Any] = jax.nn.relu
            return relu
        if isinstance(layer, nn.Conv2d):
            return convolution(layer)
        if isinstance(layer, nn.InstanceNorm2d):
            return norm(layer)
        raise Unavailable(f"no JAX translation of {type(layer).__name__} here")

    return follow(module)
