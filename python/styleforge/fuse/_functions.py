"""Descriptions of function and method calls in an fx graph, the functional forms of PyTorch's layers."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from styleforge.fuse import _in_place
from styleforge.fuse import _operations as ops
from styleforge.fuse._operations import Operation
from styleforge.ops.fused_attention import MAX_HEAD_DIM

# Parameter names, in order, of functions that are written in C and have no signature of their own.
_CONV2D = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_TRANSPOSE2D = (
    *("input", "weight", "bias", "stride", "padding"),
    *("output_padding", "groups", "dilation"),
)
_PAD = ("input", "pad", "mode", "value")
_DEFAULTS: dict[str, Any] = {
    "bias": None,
    "stride": 1,
    "padding": 0,
    "output_padding": 0,
    "dilation": 1,
    "groups": 1,
    "mode": "constant",
    "value": None,
    "alpha": 1,
    "approximate": "none",
    "negative_slope": 0.01,
}

_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
_LEAKY = {F.leaky_relu, F.leaky_relu_, torch._C._nn.leaky_relu}
_SILUS = {F.silu, torch._C._nn.silu}
_SIGMOIDS = {F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"}
_TANHS = {F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"}
_ADDS = {operator.add, torch.add, "add", "__add__"}
_ADDS_IN_PLACE = {operator.iadd, _in_place.iadd, "add_", "__iadd__"}
_CONVS = {F.conv2d, torch.conv2d}
TRANSPOSED_CONVS = {F.conv_transpose2d, torch.conv_transpose2d}
_LINEARS = {F.linear, torch._C._nn.linear}
_GELUS = {F.gelu, torch._C._nn.gelu}
_PADS = {F.pad, torch._C._nn.pad}

# Functions whose numbers have to be known; torch.compile with dynamic shapes gives them as symbols.
NEEDS_CONSTANTS = {F.instance_norm, F.interpolate, F.multi_head_attention_forward, *_LEAKY, *_PADS}


def describe(
    target: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Operation | None:
    """What a call of ``target`` (a function, or a method's name) computes; None where that is not known."""
    if target in _CONVS:
        given = _bind(_CONV2D, args, kwargs)
        if given is None:
            return None
        weight = given["weight"]
        return ops.conv(given["input"], weight, *(given[name] for name in _CONV2D[2:]))
    if target is F.instance_norm:
        return _instance_norm(args, kwargs)
    if target in _RELUS and args:
        return ops.Activation(args[0], "relu")
    if target in _SIGMOIDS and args:
        return ops.Activation(args[0], "sigmoid")
    if target in _TANHS and args:
        return ops.Activation(args[0], "tanh")
    if target in _SILUS and args:
        return ops.Activation(args[0], "silu")
    if target in _LEAKY:
        given = _bind(("input", "negative_slope", "inplace"), args, {"inplace": False, **kwargs})
        if given is None or not _real(given["negative_slope"]):
            return None
        return ops.Activation(given["input"], "leaky_relu", float(given["negative_slope"]))
    if target in _GELUS:
        given = _bind(("input", "approximate"), args, kwargs)
        return ops.gelu(given["input"], given["approximate"]) if given else None
    if target in _PADS:
        given = _bind(_PAD, args, kwargs)
        return ops.pad(*(given[name] for name in _PAD)) if given else None
    if target is F.interpolate:
        given = bound(F.interpolate, args, kwargs)
        return ops.upsample(*given.values()) if given else None
    if target in _LINEARS:
        given = _bind(("input", "weight", "bias"), args, kwargs)
        return ops.Linear(given["input"], given["weight"], given["bias"]) if given else None
    if target is F.dropout:
        given = bound(F.dropout, args, kwargs)
        if given is None:
            return None
        if given["p"] == 0 or given["training"] is False:
            return ops.Identity(given["input"])
        return ops.Dropout(given["input"], given["p"], given["training"])
    if target in _ADDS or target in _ADDS_IN_PLACE:
        given = _bind(("input", "other", "alpha"), args, kwargs)
        if given is None or given["alpha"] != 1:
            return None
        return ops.Add(given["input"], given["other"], target in _ADDS_IN_PLACE)
    if target in TRANSPOSED_CONVS and args:
        return ops.Other(args[0], "conv_transpose2d")
    return _transformer(target, args, kwargs)


def _instance_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
    given = bound(F.instance_norm, args, kwargs)
    if given is None:
        return None
    problem = None
    if given["running_mean"] is not None or given["running_var"] is not None:
        problem = "it has running statistics"
    elif given["use_input_stats"] is not True:
        problem = "use_input_stats is not True"
    elif not _real(given["eps"]):
        problem = "eps is not constant"
    return ops.Norm(given["input"], given["weight"], given["bias"], given["eps"], False, problem)


def _transformer(
    target: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Operation | None:
    if target is F.multi_head_attention_forward:
        given = bound(F.multi_head_attention_forward, args, kwargs)
        return _attention_function(given) if given else None
    if target is torch._native_multi_head_attention:
        return _native_attention(args, kwargs)
    if target is torch._transformer_encoder_layer_fwd and not kwargs and len(args) == 20:
        mask, mask_type = args[18:]
        problem = None if mask is None or mask_type == 1 else "it has an attention mask"
        if _too_wide(args[1], args[2]):
            problem = f"its heads are wider than {MAX_HEAD_DIM}"
        return ops.EncoderLayer(args[0], args, problem)
    return None


def _attention_function(given: dict[str, Any]) -> Operation:
    problem = None
    if not (given["query"] is given["key"] is given["value"]):
        problem = "query, key and value are not the same tensor"
    elif given["use_separate_proj_weight"] or given["in_proj_weight"] is None:
        problem = "query, key and value have weights of their own"
    elif any(given[name] is not None for name in ("bias_k", "bias_v", "static_k", "static_v")):
        problem = "it has keys or values besides the input's"
    elif _too_wide(given["embed_dim_to_check"], given["num_heads"]):
        problem = f"its heads are wider than {MAX_HEAD_DIM}"
    elif given["add_zero_attn"] is not False:
        problem = "add_zero_attn=True"
    elif given["training"] is not False and given["dropout_p"] != 0:
        problem = "it drops attention weights"
    elif given["attn_mask"] is not None and given["is_causal"] is not True:
        problem = "it has an attention mask"
    return ops.Attention(
        given["query"],
        given["num_heads"],
        given["in_proj_weight"],
        given["in_proj_bias"],
        given["out_proj_weight"],
        given["out_proj_bias"],
        given["key_padding_mask"],
        given["is_causal"] is True,
        True,
        True,
        problem,
    )


def _native_attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
    names = ["query", "key", "value", "embed_dim", "num_head", "qkv_weight", "qkv_bias", "proj_weight"]
    names += ["proj_bias", "mask", "need_weights", "average_attn_weights", "mask_type"]
    defaults = {"mask": None, "need_weights": True, "average_attn_weights": True, "mask_type": None}
    if len(args) > len(names):
        return None
    given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
    problem = None
    if not (given["query"] is given["key"] is given["value"]):
        problem = "query, key and value are not the same tensor"
    elif _too_wide(given["embed_dim"], given["num_head"]):
        problem = f"its heads are wider than {MAX_HEAD_DIM}"
    elif given["mask"] is not None and given["mask_type"] != 1:
        problem = "it has an attention mask"
    return ops.Attention(
        given["query"],
        given["num_head"],
        given["qkv_weight"],
        given["qkv_bias"],
        given["proj_weight"],
        given["proj_bias"],
        given["mask"],
        False,
        False,
        True,
        problem,
    )


def _too_wide(embed_dim: Any, num_heads: Any) -> bool:
    known = isinstance(embed_dim, int) and isinstance(num_heads, int)
    return not known or embed_dim > MAX_HEAD_DIM * num_heads


def transposed_conv(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """The arguments of ``conv_transpose2d`` in order; None where they do not fit."""
    given = _bind(_CONV_TRANSPOSE2D, args, kwargs)
    return None if given is None else tuple(given[name] for name in _CONV_TRANSPOSE2D)


def _bind(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments by name, with defaults; None where they are not of this form."""
    if len(args) > len(names) or any(name not in names for name in kwargs):
        return None
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    for name in names:
        if name not in given:
            if name not in _DEFAULTS:
                return None
            given[name] = _DEFAULTS[name]
    return given


def bound(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """The arguments of a Python function by name, with defaults; None where they do not fit."""
    try:
        found = inspect.signature(function).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return None
    found.apply_defaults()
    return dict(found.arguments)


def _real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
