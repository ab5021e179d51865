"""Which configurations are run: three an operator, a grid of 25 and more, or one that the user gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from styleforge.verify.operators import OPERATORS, Config, flag

# Kernel size, stride, padding.
_KERNELS = ((1, 1, 0), (3, 1, 1), (3, 2, 1), (4, 2, 1), (5, 1, 2), (5, 2, 2))

_QUICK: dict[str, list[Config]] = {
    "attention": [
        {},
        {"batch_size": 2, "seq_len": 64, "num_heads": 8, "causal": True, "version": "v2"},
        {"seq_len": 77, "embed_dim": 96, "num_heads": 3, "bias": False, "padding_mask": True},
    ],
    "ffn": [
        {},
        {"batch_size": 2, "seq_len": 77, "embed_dim": 96, "hidden_dim": 384, "bias": False},
        {"seq_len": 64, "activation": "silu", "residual": True},
    ],
    "instance-norm": [
        {},
        {"batch_size": 2, "channels": 32, "activation": "relu", "residual": True},
        {"channels": 3, "height": 37, "width": 53, "activation": "silu", "channels_last": True},
    ],
    "conv": [
        {"height": 32, "width": 32},
        {"in_channels": 32, "height": 32, "width": 32, "stride": 2, "channels_last": True},
        {
            "in_channels": 32,
            "out_channels": 32,
            "height": 19,
            "width": 23,
            "padding_mode": "reflect",
            "upsample": 2,
            "residual": True,
        },
    ],
}


@dataclass(frozen=True)
class Case:
    """One configuration of one operator; every option is given."""

    operator: str
    config: Config

    def __str__(self) -> str:
        """Sizes first, then what differs from the default."""
        defaults = OPERATORS[self.operator].defaults
        parts = []
        for name, value in self.config.items():
            if isinstance(value, bool):
                if value != defaults[name]:
                    parts.append(name if value else f"no {name}")
            elif isinstance(value, str):
                if value not in ("none", "zeros", "auto"):
                    parts.append(value)
            elif name == "upsample":
                if value != 1:
                    parts.append(f"upsample={value}")
            else:
                parts.append(f"{_SHORT.get(name, name)}={value}")
        return " ".join(parts).replace("_", " ").replace("leaky relu", "leaky_relu")


_SHORT = {
    "batch_size": "bs",
    "seq_len": "seq",
    "embed_dim": "embed",
    "num_heads": "heads",
    "hidden_dim": "hidden",
    "channels": "c",
    "in_channels": "in",
    "out_channels": "out",
    "height": "h",
    "width": "w",
    "kernel_size": "k",
    "stride": "s",
    "padding": "p",
}


def specific(operator: str, given: Mapping[str, Any]) -> Case:
    """The case with these options, and the operator's defaults for the others.

    Raises:
        ValueError: an option is none of this operator's, or does not fit; one line that names it.
    """
    of = OPERATORS[operator]
    for name in given:
        if name not in of.defaults:
            known = ", ".join(map(flag, of.defaults))
            raise ValueError(f"{flag(name)} is no option of {operator}, which takes {known}")
    config = {**of.defaults, **given}
    if operator == "ffn" and "embed_dim" in given and "hidden_dim" not in given:
        config["hidden_dim"] = 4 * config["embed_dim"]
    of.check(config)
    return Case(operator, config)


def grid(operator: str, mode: str) -> list[Case]:
    """The cases of ``quick`` or ``full``, each once."""
    given = _QUICK[operator] if mode == "quick" else list(_FULL[operator]())
    cases: list[Case] = []
    for options in given:
        case = specific(operator, options)
        if case not in cases:
            cases.append(case)
    return cases


def _attention() -> Iterator[Config]:
    for batch in (1, 2, 4, 8, 16):
        yield {"batch_size": batch}
    for length in (64, 128, 256, 512):
        for embed in (128, 256, 512):
            yield {"seq_len": length, "embed_dim": embed}
    for heads in (1, 2, 4, 8):
        for bias in (True, False):
            yield {"num_heads": heads, "bias": bias}
    yield {"batch_size": 2, "seq_len": 256, "causal": True}
    yield {"batch_size": 4, "seq_len": 256, "num_heads": 8, "padding_mask": True}
    yield {"batch_size": 2, "seq_len": 200, "causal": True, "padding_mask": True}
    yield {"batch_size": 3, "seq_len": 77, "embed_dim": 39, "num_heads": 3}
    yield {"seq_len": 1}
    yield {"seq_len": 197, "embed_dim": 192, "num_heads": 3}  # a ViT block
    yield {"embed_dim": 256, "num_heads": 1}  # the widest head
    for version in ("v1", "v2"):
        yield {"version": version, "batch_size": 2, "seq_len": 256, "causal": True}
        yield {"version": version, "seq_len": 77, "embed_dim": 96, "num_heads": 3, "padding_mask": True}


def _ffn() -> Iterator[Config]:
    for batch in (1, 2, 4, 8, 16):
        yield {"batch_size": batch}
    for length in (64, 128, 256, 512):
        for embed in (128, 256, 512):
            yield {"seq_len": length, "embed_dim": embed}
    for activation in ("gelu", "gelu_tanh", "relu", "silu"):
        for bias in (True, False):
            yield {"activation": activation, "bias": bias}
    yield {"batch_size": 2, "residual": True}
    yield {"batch_size": 3, "seq_len": 77, "embed_dim": 39, "hidden_dim": 111}
    yield {"seq_len": 1}
    yield {"seq_len": 197, "embed_dim": 192}
    yield {"seq_len": 256, "hidden_dim": 344, "activation": "silu", "bias": False, "residual": True}


def _instance_norm() -> Iterator[Config]:
    for batch in (1, 2, 4, 8, 16):
        yield {"batch_size": batch, "height": 32, "width": 32}
    for channels in (3, 32, 64, 128, 256):
        yield {"channels": channels, "activation": "relu"}
    for side in (16, 32, 64, 128, 256):
        yield {"height": side, "width": side, "channels": 32, "residual": True}
    for activation in ("none", "relu", "leaky_relu", "silu", "sigmoid", "tanh"):
        for last in (False, True):
            yield {"batch_size": 2, "activation": activation, "channels_last": last, "channels": 32}
    yield {"batch_size": 4, "height": 256, "width": 256}
    yield {"channels": 3, "height": 512, "width": 512}
    yield {"affine": False}
    yield {"batch_size": 3, "channels": 5, "height": 37, "width": 53, "activation": "relu", "residual": True}
    yield {"channels": 7, "height": 1, "width": 19}


def _conv() -> Iterator[Config]:
    for kernel, stride, padding in _KERNELS:
        of = {"kernel_size": kernel, "stride": stride, "padding": padding}
        yield {**of}
        yield {**of, "batch_size": 2, "in_channels": 32, "height": 32, "width": 32, "channels_last": True}
        yield {**of, "batch_size": 3, "in_channels": 12, "out_channels": 20, "height": 31, "width": 45}
    square = {"in_channels": 128, "out_channels": 128}
    yield {**square, "height": 128, "width": 128}
    yield {"height": 256, "width": 256}
    yield {**square, "height": 32, "width": 32}
    yield {"in_channels": 256, "out_channels": 256, "kernel_size": 1, "padding": 0}
    yield {"out_channels": 128, "height": 128, "width": 128, "stride": 2}
    for mode in ("reflect", "replicate"):
        yield {"padding_mode": mode, "residual": True, "height": 32, "width": 32}
    for activation in ("none", "leaky_relu", "silu", "sigmoid", "tanh"):
        yield {"activation": activation, "in_channels": 32, "height": 32, "width": 32}
    # The first and the upsampling layer of a style network.
    yield {"in_channels": 3, "out_channels": 32, "kernel_size": 9, "padding": 4, "padding_mode": "reflect"}
    yield {"out_channels": 32, "padding_mode": "reflect", "upsample": 2, "height": 32, "width": 32}


_FULL = {"attention": _attention, "ffn": _ffn, "instance-norm": _instance_norm, "conv": _conv}
