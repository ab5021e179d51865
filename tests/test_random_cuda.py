"""Random configurations of the sizes that the GPU's own kernels take; the operators' tests have small ones.

Each result is held against float64 and against PyTorch's error in the same dtype, written over poisoned
memory and repeated to the bit. ``STYLEFORGE_TEST_EXAMPLES`` is how many an operator, 500 by default.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, seed
from hypothesis import strategies as st
from torch import Tensor

import styleforge
from _reference import (
    ACTIVATIONS,
    FFN_ACTIVATIONS,
    assert_as_accurate,
    assert_as_accurate_together,
    attention,
    attention_parameters,
    conv_instance_norm,
    ffn,
    instance_norm,
    matmul_tf32,
    poison,
    random_configurations,
    random_tensor,
    rms,
    rms_error,
    tensor,
    tf32,
    torch_attention,
    torch_conv_instance_norm,
    torch_ffn,
    torch_instance_norm,
)

pytestmark = pytest.mark.cuda

OPS = torch.ops.styleforge

KINDS = [
    (torch.float16, "ieee"),
    (torch.bfloat16, "ieee"),
    (torch.float32, "ieee"),
    (torch.float32, "tf32"),
]
PARTS = 3
EACH = random_configurations(PARTS * len(KINDS))
MOST_PIXELS = 1 << 21
# Compared over all configurations, PyTorch's errors in float32 being those of another order of sums.
TOGETHER = {torch.float16: 1.2, torch.bfloat16: 1.2, torch.float32: 1.5}
# PyTorch's libraries do not take TF32 for every shape that allows it: this many units count as exact.
TF32_UNITS = 3 * 2.0**-11 / torch.finfo(torch.float32).eps

kinds = pytest.mark.parametrize(("dtype", "precision"), KINDS, ids=str)
parts = pytest.mark.parametrize("part", range(PARTS))
data_seeds = st.integers(0, 2**31 - 1)


class _Errors:
    """What was found over the configurations of a test."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.pairs: list[tuple[float, float]] = []
        self.paths: Counter[str] = Counter()

    def hold(
        self, call: Callable[[], Tensor], yardstick: Tensor, reference: Tensor, ulps: float | None
    ) -> None:
        """Runs a call and compares."""
        poison(reference.numel(), self.dtype, "cuda")
        result = call()
        self.paths[styleforge.last_path()] += 1
        assert_as_accurate(result, yardstick, reference, ulps=ulps)
        assert torch.equal(result, call())
        size = rms(reference)
        if size > 0:
            self.pairs.append((rms_error(result, reference) / size, rms_error(yardstick, reference) / size))

    def together(self, own: tuple[str, ...] = ()) -> None:
        """Over all, where luck averages out; and most of them by the kernels that are meant, on their GPU."""
        if len(self.pairs) < 20:
            return
        assert_as_accurate_together(self.pairs, self.dtype, TOGETHER[self.dtype])
        if own and torch.cuda.get_device_capability() == (9, 0):
            taken = sum(count for path, count in self.paths.items() if any(name in path for name in own))
            assert taken >= 0.5 * sum(self.paths.values()), self.paths


def _seed(part: int, dtype: torch.dtype, precision: str) -> int:
    return PARTS * KINDS.index((dtype, precision)) + part


def _parameters(channels: int, batch: int, styles: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    sizes = (batch, channels) if styles else (channels,)
    weight = torch.randn(sizes, device="cuda") * 0.5 + 1
    return weight.to(dtype), torch.randn(sizes, device="cuda").to(dtype)


@kinds
@parts
def test_random_configurations_of_convolutions(part: int, dtype: torch.dtype, precision: str) -> None:
    errors = _Errors(dtype)

    @seed(_seed(part, dtype, precision))
    @EACH
    @given(
        batch=st.sampled_from((1, 1, 1, 2, 3, 5)),
        inputs=st.one_of(st.integers(4, 26).map(lambda n: 8 * n), st.sampled_from((1, 3, 32, 64, 128))),
        outputs=st.one_of(st.integers(4, 80).map(lambda n: 2 * n), st.sampled_from((32, 64, 128, 256))),
        height=st.integers(6, 70),
        width=st.integers(6, 100),
        kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)) | st.sampled_from(((3, 3), (1, 1), (9, 9))),
        stride=st.tuples(st.integers(1, 3), st.integers(1, 3)) | st.just((1, 1)),
        padding=st.tuples(st.integers(0, 3), st.integers(0, 3)) | st.just((1, 1)),
        padding_mode=st.sampled_from(("zeros", "reflect", "replicate")),
        upsample=st.sampled_from((1, 1, 2)),
        layout=st.sampled_from(("contiguous", "channels_last", "channels_last")),
        styles=st.booleans(),
        residual=st.sampled_from((None, "contiguous", "channels_last")),
        activation=st.sampled_from(ACTIVATIONS),
        data_seed=data_seeds,
    )
    def check(
        batch: int,
        inputs: int,
        outputs: int,
        height: int,
        width: int,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        padding_mode: str,
        upsample: int,
        layout: str,
        styles: bool,
        residual: str | None,
        activation: str,
        data_seed: int,
    ) -> None:
        if upsample == 2:  # what the kernels have phases for
            kernel, stride, padding = (3, 3), (1, 1), (1, 1)
        size = [side * upsample for side in (height, width)]
        out = [(s + 2 * p - k) // t + 1 for s, p, k, t in zip(size, padding, kernel, stride, strict=True)]
        # A norm over a few pixels divides by a deviation that may be next to nothing.
        assume(min(out) >= 2 and out[0] * out[1] >= 16)
        torch.manual_seed(data_seed)
        x = tensor(batch, inputs, height, width, dtype=dtype, device="cuda", layout=layout, offset=0.3)
        terms = inputs * kernel[0] * kernel[1]
        weight = tensor(outputs, inputs, *kernel, dtype=dtype, device="cuda", scale=terms**-0.5)
        if layout == "channels_last":
            weight = weight.contiguous(memory_format=torch.channels_last)
        norm = _parameters(outputs, batch, styles, dtype)
        r = tensor(batch, outputs, *out, dtype=dtype, device="cuda", layout=residual) if residual else None
        given: Any = (
            x,
            weight,
            None,
            *norm,
            stride,
            padding,
            padding_mode,
            upsample,
            1e-5,
            activation,
            0.2,
            r,
        )
        with tf32(precision == "tf32"):
            yardstick = torch_conv_instance_norm(*given)
        ulps = None
        if dtype == torch.float32:
            ulps = TF32_UNITS if precision == "tf32" else 2 + 0.5 * terms**0.5
        errors.hold(
            lambda: OPS.fused_conv_instance_norm_relu(*given, precision=precision),
            yardstick,
            conv_instance_norm(*given),
            ulps,
        )

    check()
    if precision == "ieee":  # cuDNN does not take TF32 for every shape that allows it
        errors.together(("sm90", "mma", "picture"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("part", range(PARTS + 1))
def test_random_configurations_of_norms(part: int, dtype: torch.dtype) -> None:
    errors = _Errors(dtype)

    @seed(part)
    @EACH
    @given(
        batch=st.sampled_from((1, 1, 2, 4)),
        channels=st.integers(1, 300) | st.sampled_from((3, 32, 64, 128)),
        height=st.integers(6, 400),
        width=st.integers(6, 400) | st.sampled_from((64, 128, 256)),
        layout=st.sampled_from(("contiguous", "channels_last", "sliced")),
        styles=st.booleans(),
        residual=st.sampled_from((None, "contiguous", "channels_last")),
        activation=st.sampled_from(ACTIVATIONS),
        offset=st.sampled_from((0.0, 3.0)),
        data_seed=data_seeds,
    )
    def check(
        batch: int,
        channels: int,
        height: int,
        width: int,
        layout: str,
        styles: bool,
        residual: str | None,
        activation: str,
        offset: float,
        data_seed: int,
    ) -> None:
        channels = max(1, min(channels, MOST_PIXELS // (batch * height * width)))
        torch.manual_seed(data_seed)
        sizes = (batch, channels, height, width)
        x = tensor(*sizes, dtype=dtype, device="cuda", layout=layout, offset=offset)
        weight, bias = _parameters(channels, batch, styles, dtype)
        r = tensor(*sizes, dtype=dtype, device="cuda", layout=residual) if residual else None
        given: Any = (x, weight, bias, 1e-5, activation, 0.2, r)
        errors.hold(
            lambda: OPS.fused_instance_norm(*given),
            torch_instance_norm(*given),
            instance_norm(*given),
            4.0 if dtype == torch.float32 else None,
        )

    check()
    errors.together()


@kinds
@parts
def test_random_configurations_of_networks(part: int, dtype: torch.dtype, precision: str) -> None:
    errors = _Errors(dtype)

    @seed(_seed(part, dtype, precision))
    @EACH
    @given(
        batch=st.integers(1, 4),
        length=st.integers(1, 700),
        embed=st.integers(2, 64).map(lambda n: 8 * n) | st.integers(16, 300),
        hidden=st.integers(2, 130).map(lambda n: 8 * n) | st.integers(16, 600),
        biases=st.booleans(),
        residual=st.booleans(),
        activation=st.sampled_from(FFN_ACTIVATIONS),
        layout=st.sampled_from(("contiguous", "contiguous", "rows", "offset")),
        data_seed=data_seeds,
    )
    def check(
        batch: int,
        length: int,
        embed: int,
        hidden: int,
        biases: bool,
        residual: bool,
        activation: str,
        layout: str,
        data_seed: int,
    ) -> None:
        torch.manual_seed(data_seed)
        of: dict[str, Any] = dict(dtype=dtype, device="cuda")
        x = random_tensor(batch, length, embed, layout=layout, **of)
        given: Any = (
            x,
            random_tensor(hidden, embed, scale=embed**-0.5, **of),
            random_tensor(hidden, scale=0.5, **of) if biases else None,
            random_tensor(embed, hidden, scale=hidden**-0.5, **of),
            random_tensor(embed, scale=0.5, **of) if biases else None,
            activation,
            random_tensor(batch, length, embed, **of) if residual else None,
        )
        with matmul_tf32(precision == "tf32"):
            yardstick = torch_ffn(*given)
        ulps = None
        if dtype == torch.float32:
            ulps = TF32_UNITS if precision == "tf32" else max(2.0, (embed + hidden) ** 0.5 / 2)
        errors.hold(lambda: OPS.fused_ffn(*given, precision=precision), yardstick, ffn(*given), ulps)

    check()
    if precision == "ieee":
        errors.together()


@kinds
@parts
def test_random_configurations_of_attention(part: int, dtype: torch.dtype, precision: str) -> None:
    errors = _Errors(dtype)

    @seed(_seed(part, dtype, precision))
    @EACH
    @given(
        batch=st.integers(1, 3),
        length=st.integers(1, 700) | st.sampled_from((64, 128, 512, 1025)),
        heads=st.integers(1, 8),
        head_dim=st.sampled_from((8, 16, 24, 32, 40, 64, 80, 96, 128, 160, 256)),
        biases=st.sampled_from(("none", "both")),
        is_causal=st.booleans(),
        masked=st.booleans(),
        version=st.sampled_from(("fused_attention", "fused_attention_v1", "fused_attention_v2")),
        data_seed=data_seeds,
    )
    def check(
        batch: int,
        length: int,
        heads: int,
        head_dim: int,
        biases: str,
        is_causal: bool,
        masked: bool,
        version: str,
        data_seed: int,
    ) -> None:
        heads = max(1, min(heads, 512 // head_dim))
        torch.manual_seed(data_seed)
        embed = heads * head_dim
        x = random_tensor(batch, length, embed, dtype=dtype, device="cuda")
        hidden = None
        if masked:
            hidden = torch.rand(batch, length, device="cuda") < 0.4
            hidden[:, 0] = False  # a query that sees no key is NaN in PyTorch
        parameters = attention_parameters(embed, dtype, "cuda", biases)
        given: Any = (x, *parameters, heads, None, is_causal, hidden)
        with matmul_tf32(precision == "tf32"):
            yardstick = torch_attention(*given)
        ulps = 0.5
        if dtype == torch.float32:
            ulps = TF32_UNITS if precision == "tf32" else max(4.0, embed**0.5 / 2)
        errors.hold(
            lambda: getattr(OPS, version)(*given, precision=precision), yardstick, attention(*given), ulps
        )

    check()
    if precision == "ieee":
        errors.together()
