"""What is verified: for each operator its options, its tensors, and the call in PyTorch and in styleforge.

The PyTorch call is both the yardstick, in the dtype under test, and the reference, in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from styleforge import ops
from styleforge.ops._common import ACTIVATIONS, FFN_ACTIVATIONS, PADDING_MODES
from styleforge.ops.fused_attention import MAX_HEAD_DIM

Config = dict[str, Any]
"""An operator's options by name, as ``{"batch_size": 1, "seq_len": 128, ...}``."""
Tensors = dict[str, Tensor | None]
"""The arguments of a call by name; those in floating point are differentiated."""
Draw = Callable[..., Tensor]
"""``draw(*sizes, scale=1.0)``: normally distributed values in the dtype and on the device under test."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
_ATTENTION = {"auto": "fused_attention", "v1": "fused_attention_v1", "v2": "fused_attention_v2"}
_KINKED = ("relu", "leaky_relu")


class Operator(ABC):
    """One operator under test; ``defaults`` are its options and what they are where nothing is said."""

    name: ClassVar[str]
    defaults: ClassVar[Config]

    def check(self, config: Config) -> None:
        """Refuses options that fit no call.

        Raises:
            ValueError: one line that says which and why.
        """
        for name, value in config.items():
            if isinstance(self.defaults[name], int) and not isinstance(self.defaults[name], bool):
                least = 0 if name == "padding" else 1
                if value < least:
                    raise ValueError(f"{flag(name)} must be at least {least}, got {value}")

    @abstractmethod
    def tensors(self, config: Config, draw: Draw) -> Tensors:
        """The arguments of a call."""

    @abstractmethod
    def pytorch(self, config: Config, given: Tensors) -> Tensor:
        """The call in PyTorch's own operators, each of which rounds to the dtype of its input."""

    @abstractmethod
    def styleforge(self, config: Config, given: Tensors, precision: str) -> Tensor:
        """The same call as one operator."""

    @abstractmethod
    def terms(self, config: Config) -> int:
        """How many products the longest sum of the forward adds up."""

    def has_gradient(self, config: Config) -> bool:
        """Whether the gradient is defined wherever rounding may lead; it is not at a kink inside."""
        return True

    def kink(self, config: Config, given: Tensors) -> Tensor | None:
        """What goes into a last activation that has a kink at 0, or None."""
        return None


def flag(name: str) -> str:
    """The command line's spelling of an option."""
    return "--" + name.replace("_", "-")


def _choice(config: Config, name: str, choices: tuple[str, ...]) -> None:
    if config[name] not in choices:
        raise ValueError(f"{flag(name)} must be one of {', '.join(choices)}, got '{config[name]}'")


def _arranged(x: Tensor, config: Config) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if config["channels_last"] else x


class _Attention(Operator):
    name = "attention"
    defaults: ClassVar[Config] = {
        "batch_size": 1,
        "seq_len": 128,
        "embed_dim": 128,
        "num_heads": 4,
        "bias": True,
        "causal": False,
        "padding_mask": False,
        "version": "auto",
    }

    def check(self, config: Config) -> None:
        super().check(config)
        _choice(config, "version", tuple(_ATTENTION))
        embed, heads = config["embed_dim"], config["num_heads"]
        if embed % heads:
            raise ValueError(f"--num-heads must divide --embed-dim, got {heads} and {embed}")
        if embed // heads > MAX_HEAD_DIM:
            raise ValueError(
                f"a head may be {MAX_HEAD_DIM} wide, got {embed // heads} (--embed-dim over --num-heads)"
            )

    def tensors(self, config: Config, draw: Draw) -> Tensors:
        batch, length, embed = config["batch_size"], config["seq_len"], config["embed_dim"]
        bias = config["bias"]
        given: Tensors = {
            "input": draw(batch, length, embed),
            "qkv_weight": draw(3 * embed, embed, scale=embed**-0.5),
            "qkv_bias": draw(3 * embed, scale=0.5) if bias else None,
            "out_weight": draw(embed, embed, scale=embed**-0.5),
            "out_bias": draw(embed, scale=0.5) if bias else None,
            "key_padding_mask": None,
        }
        if config["padding_mask"]:
            hidden = draw(batch, length) > 0.5
            hidden[:, 0] = False  # a query that sees no key is NaN in PyTorch
            given["key_padding_mask"] = hidden
        return given

    def pytorch(self, config: Config, given: Tensors) -> Tensor:
        x, weight, out_weight = given["input"], given["qkv_weight"], given["out_weight"]
        assert x is not None and weight is not None and out_weight is not None
        batch, length, embed = x.shape
        heads = config["num_heads"]
        q, k, v = (
            F.linear(x, weight, given["qkv_bias"])
            .view(batch, length, 3, heads, embed // heads)
            .permute(2, 0, 3, 1, 4)
        )
        hidden, causal = given["key_padding_mask"], config["causal"]
        seen = None
        if hidden is not None:
            seen = ~hidden[:, None, None, :]
            if causal:
                seen = seen & torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        y = F.scaled_dot_product_attention(q, k, v, seen, is_causal=causal and seen is None)
        return F.linear(y.transpose(1, 2).reshape(batch, length, embed), out_weight, given["out_bias"])

    def styleforge(self, config: Config, given: Tensors, precision: str) -> Tensor:
        arguments: Any = given
        function = getattr(ops, _ATTENTION[config["version"]])
        result: Tensor = function(
            **arguments, num_heads=config["num_heads"], is_causal=config["causal"], precision=precision
        )
        return result

    def terms(self, config: Config) -> int:
        return int(max(config["embed_dim"], config["seq_len"]))


class _Ffn(Operator):
    name = "ffn"
    defaults: ClassVar[Config] = {
        "batch_size": 1,
        "seq_len": 128,
        "embed_dim": 128,
        "hidden_dim": 512,
        "activation": "gelu",
        "bias": True,
        "residual": False,
    }

    def check(self, config: Config) -> None:
        super().check(config)
        _choice(config, "activation", FFN_ACTIVATIONS)

    def tensors(self, config: Config, draw: Draw) -> Tensors:
        embed, hidden, bias = config["embed_dim"], config["hidden_dim"], config["bias"]
        rows = (config["batch_size"], config["seq_len"])
        return {
            "input": draw(*rows, embed),
            "fc1_weight": draw(hidden, embed, scale=embed**-0.5),
            "fc1_bias": draw(hidden, scale=0.5) if bias else None,
            "fc2_weight": draw(embed, hidden, scale=hidden**-0.5),
            "fc2_bias": draw(embed, scale=0.5) if bias else None,
            "residual": draw(*rows, embed) if config["residual"] else None,
        }

    def pytorch(self, config: Config, given: Tensors) -> Tensor:
        x, w1, w2, residual = (given[name] for name in ("input", "fc1_weight", "fc2_weight", "residual"))
        assert x is not None and w1 is not None and w2 is not None
        hidden = _ACTIVATIONS[config["activation"]](F.linear(x, w1, given["fc1_bias"]))
        y = F.linear(hidden, w2, given["fc2_bias"])
        return y if residual is None else y + residual

    def styleforge(self, config: Config, given: Tensors, precision: str) -> Tensor:
        arguments: Any = given
        return ops.fused_ffn(**arguments, activation=config["activation"], precision=precision)

    def terms(self, config: Config) -> int:
        return int(max(config["embed_dim"], config["hidden_dim"]))

    def has_gradient(self, config: Config) -> bool:
        return config["activation"] not in _KINKED


class _InstanceNorm(Operator):
    name = "instance-norm"
    defaults: ClassVar[Config] = {
        "batch_size": 1,
        "channels": 64,
        "height": 64,
        "width": 64,
        "affine": True,
        "activation": "none",
        "residual": False,
        "channels_last": False,
    }

    def check(self, config: Config) -> None:
        super().check(config)
        _choice(config, "activation", ACTIVATIONS)
        if config["height"] * config["width"] < 2:
            raise ValueError("--height and --width: a norm needs more than one pixel")

    def tensors(self, config: Config, draw: Draw) -> Tensors:
        channels, affine = config["channels"], config["affine"]
        sizes = (config["batch_size"], channels, config["height"], config["width"])
        return {
            "input": _arranged(draw(*sizes), config),
            "weight": draw(channels) if affine else None,
            "bias": draw(channels, scale=0.5) if affine else None,
            "residual": _arranged(draw(*sizes), config) if config["residual"] else None,
        }

    def pytorch(self, config: Config, given: Tensors) -> Tensor:
        x = given["input"]
        assert x is not None
        y = F.instance_norm(x, weight=given["weight"], bias=given["bias"])
        residual = given["residual"]
        return _ACTIVATIONS[config["activation"]](y if residual is None else y + residual)

    def styleforge(self, config: Config, given: Tensors, precision: str) -> Tensor:
        arguments: Any = given
        return ops.fused_instance_norm(**arguments, activation=config["activation"])

    def terms(self, config: Config) -> int:
        return 1

    def kink(self, config: Config, given: Tensors) -> Tensor | None:
        return self.pytorch({**config, "activation": "none"}, given) if _is_kinked(config) else None


class _Conv(Operator):
    name = "conv"
    defaults: ClassVar[Config] = {
        "batch_size": 1,
        "in_channels": 64,
        "out_channels": 64,
        "height": 64,
        "width": 64,
        "kernel_size": 3,
        "stride": 1,
        "padding": 1,
        "padding_mode": "zeros",
        "upsample": 1,
        "activation": "relu",
        "residual": False,
        "channels_last": False,
    }

    def check(self, config: Config) -> None:
        super().check(config)
        _choice(config, "activation", ACTIVATIONS)
        _choice(config, "padding_mode", PADDING_MODES)
        if config["upsample"] not in (1, 2):
            raise ValueError(f"--upsample must be 1 or 2, got {config['upsample']}")
        for side in ("height", "width"):
            size = config[side] * config["upsample"]
            if config["padding_mode"] == "reflect" and config["padding"] >= size:
                raise ValueError(
                    f"--padding must be less than {flag(side)} to reflect, got {config['padding']}"
                )
            if size + 2 * config["padding"] < config["kernel_size"]:
                raise ValueError(f"--kernel-size is larger than the padded {side}")
        height, width = self._result(config)
        if height * width < 2:
            raise ValueError("--height and --width: the norm needs more than one pixel of result")

    @staticmethod
    def _result(config: Config) -> tuple[int, int]:
        height, width = (
            (config[side] * config["upsample"] + 2 * config["padding"] - config["kernel_size"])
            // config["stride"]
            + 1
            for side in ("height", "width")
        )
        return height, width

    def tensors(self, config: Config, draw: Draw) -> Tensors:
        batch, ci, co = config["batch_size"], config["in_channels"], config["out_channels"]
        k = config["kernel_size"]
        residual = draw(batch, co, *self._result(config)) if config["residual"] else None
        return {
            "input": _arranged(draw(batch, ci, config["height"], config["width"]), config),
            "weight": _arranged(draw(co, ci, k, k, scale=(ci * k * k) ** -0.5), config),
            "bias": draw(co, scale=0.5),
            "norm_weight": draw(co),
            "norm_bias": draw(co, scale=0.5),
            "residual": None if residual is None else _arranged(residual, config),
        }

    def pytorch(self, config: Config, given: Tensors) -> Tensor:
        x, weight = given["input"], given["weight"]
        assert x is not None and weight is not None
        if config["upsample"] != 1:
            x = F.interpolate(x, scale_factor=float(config["upsample"]), mode="nearest")
        padding, mode = config["padding"], config["padding_mode"]
        if padding and mode != "zeros":
            x = F.pad(x, (padding,) * 4, mode=mode)
            padding = 0
        z = F.conv2d(x, weight, given["bias"], config["stride"], padding)
        y = F.instance_norm(z, weight=given["norm_weight"], bias=given["norm_bias"])
        residual = given["residual"]
        return _ACTIVATIONS[config["activation"]](y if residual is None else y + residual)

    def styleforge(self, config: Config, given: Tensors, precision: str) -> Tensor:
        arguments: Any = given
        names = ("stride", "padding", "padding_mode", "upsample", "activation")
        return ops.fused_conv_instance_norm_relu(
            **arguments, **{name: config[name] for name in names}, precision=precision
        )

    def terms(self, config: Config) -> int:
        return int(config["in_channels"] * config["kernel_size"] ** 2)

    def kink(self, config: Config, given: Tensors) -> Tensor | None:
        return self.pytorch({**config, "activation": "none"}, given) if _is_kinked(config) else None


def _is_kinked(config: Config) -> bool:
    return config["activation"] in _KINKED


OPERATORS: dict[str, Operator] = {
    operator.name: operator for operator in (_Attention(), _Ffn(), _InstanceNorm(), _Conv())
}
"""The operators by their names on the command line."""
