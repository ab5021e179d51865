"""``styleforge.fuse`` and the backend on PyTorch's attention and transformer layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import styleforge
from styleforge.fuse import backend
from test_fuse import Calls

ATTENTION, FFN = "fused_attention", "fused_ffn"


def attention(**changes: Any) -> nn.MultiheadAttention:
    layer = nn.MultiheadAttention(8, 2, **{"batch_first": True, **changes}).double().eval()
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    return layer


def tokens(*sizes: int) -> Tensor:
    return torch.randn(sizes or (3, 5, 8), dtype=torch.float64)


def padding(batch: int = 3, length: int = 5) -> Tensor:
    return torch.arange(length) >= torch.tensor([length, length - 1, length - 3][:batch])[:, None]


def causal(length: int = 5) -> Tensor:
    return torch.ones(length, length).triu(1).bool()


def runs(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[int, int]:
    """How often the attention and the feed-forward operator run in a fused module that gives the same."""
    fused = styleforge.fuse(module)
    with torch.no_grad(), Calls() as calls:
        ours = fused(*args, **kwargs)
    with torch.no_grad():
        torch.testing.assert_close(ours, module(*args, **kwargs), rtol=1e-9, atol=1e-9)
    return calls.count[ATTENTION], calls.count[FFN]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_without_weights(batch_first: bool, bias: bool) -> None:
    layer = attention(batch_first=batch_first, bias=bias)
    x = tokens()
    mask = padding() if batch_first else padding(length=3).repeat(2, 1)[:5]
    assert runs(layer, x, x, x, need_weights=False) == (1, 0)
    assert runs(layer, x, x, x, mask, need_weights=False) == (1, 0)
    length = 5 if batch_first else 3
    given = {"attn_mask": causal(length), "is_causal": True, "need_weights": False}
    assert runs(layer, x, x, x, **given) == (1, 0)


def test_calls_that_stay_pytorchs() -> None:
    layer = attention()
    x, y = tokens(), tokens(3, 4, 8)
    assert runs(layer, x, x, x) == (0, 0)  # weights
    assert runs(layer, x, y, y, need_weights=False) == (0, 0)  # two sequences
    assert runs(layer, x, x, x, attn_mask=causal(), need_weights=False) == (0, 0)  # any mask
    floats = torch.zeros(3, 5, dtype=torch.float64).masked_fill(padding(), -1.0)
    assert runs(layer, x, x, x, floats, need_weights=False) == (0, 0)  # added to the scores
    assert runs(layer, x[0], x[0], x[0], need_weights=False) == (0, 0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kdim": 4, "vdim": 4}, "widths of their own"),
        ({"add_bias_kv": True}, "besides the input's"),
        ({"add_zero_attn": True}, "besides the input's"),
        ({"embed_dim": 514}, "wider than 256"),
    ],
)
def test_attention_that_is_left(changes: dict[str, Any], reason: str) -> None:
    layer = nn.MultiheadAttention(**{"embed_dim": 8, "num_heads": 2, **changes})
    report = styleforge.fuse(layer).styleforge_report
    assert not report.fused and reason in str(report)


def test_weights_that_nobody_reads() -> None:
    class Ignored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = attention()

        def forward(self, x: Tensor) -> Tensor:
            y, _ = self.attn(x, x, x)
            return x + y + self.attn(y, y, y)[0]

    class Read(Ignored):
        def forward(self, x: Tensor) -> Tensor:
            y, weights = self.attn(x, x, x)
            return y * weights.sum()

    assert runs(Ignored(), tokens()) == (2, 0)
    assert runs(Read(), tokens()) == (0, 0)


def layers(**changes: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, **{"batch_first": True, **changes}).double().eval()


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", nn.functional.silu])
def test_encoder_layers(norm_first: bool, activation: Any) -> None:
    layer = layers(norm_first=norm_first, activation=activation)
    assert runs(layer, tokens()) == (1, 1)
    assert runs(layer, tokens(), src_key_padding_mask=padding()) == (1, 1)
    assert runs(layer, tokens(), src_mask=causal(), is_causal=True) == (1, 1)
    assert runs(layer, tokens(), src_mask=causal()) == (0, 1)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("how", ["fuse", "compiled", "backend"])
def test_the_shortcut_stays_in_float32_under_autocast(norm_first: bool, how: str) -> None:
    """PyTorch adds a 16-bit result to it with promotion; rounded, it loses what is small beside it."""
    torch._dynamo.reset()
    layer = layers(norm_first=norm_first).float()
    fused = styleforge.fuse(layer)
    run = {
        "fuse": lambda: fused,
        "compiled": lambda: torch.compile(fused, backend="aot_eager"),
        "backend": lambda: torch.compile(layer, backend="styleforge"),
    }[how]()
    x = 100 + torch.rand(3, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected, ours = layer(x), run(x)
    assert ours.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.03)


def test_encoders_with_nested_tensors_take_pytorchs_path() -> None:
    encoder = nn.TransformerEncoder(layers(), 2, enable_nested_tensor=True).eval()
    assert runs(encoder, tokens()) == (2, 2)
    assert runs(encoder, tokens(), src_key_padding_mask=padding()) == (0, 0)


def test_a_causal_mask_is_found_by_the_encoder() -> None:
    encoder = nn.TransformerEncoder(layers(), 2, enable_nested_tensor=False).eval()
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    assert runs(encoder, tokens(), mask=mask, is_causal=True) == (2, 2)


def test_decoders() -> None:
    decoder = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True).double().eval()
    assert runs(decoder, tokens(), tokens(3, 4, 8)) == (1, 1)
    assert runs(nn.Transformer(8, 2, 1, 1, 16, batch_first=True).double().eval(), tokens(), tokens()) == (
        2,
        2,
    )


def test_layers_that_are_left() -> None:
    for change, reason in (
        ("elu", "has no operator"),
        ("hook", "linear2 has hooks"),
        ("class", "linear1 is a Bilinear"),
    ):
        layer: Any = layers(activation=nn.ELU() if change == "elu" else "relu")
        if change == "hook":
            layer.linear2.register_forward_hook(lambda *_: None)
        if change == "class":
            layer.linear1 = nn.Bilinear(8, 8, 16)
        report = styleforge.fuse(layer).styleforge_report
        assert report.count(FFN) == 0 and reason in str(report), report


def test_dropout_of_attention_weights_stays_pytorchs() -> None:
    layer = layers().train()
    fused = styleforge.fuse(layer)
    x = tokens()
    torch.manual_seed(1)
    theirs = layer(x)
    torch.manual_seed(1)
    torch.testing.assert_close(fused(x), theirs)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_attention_in_captured_graphs(training: bool, masked: bool) -> None:
    layer = attention().train(training)
    found: list[int] = []

    def count(gm: Any, inputs: Any) -> Any:
        found.append(backend.rewrite_captured(gm))
        return gm

    def call(x: Tensor, mask: Tensor | None) -> Tensor:
        return layer(x, x, x, mask, need_weights=False)[0]

    torch._dynamo.reset()
    compiled = torch.compile(call, backend=count, fullgraph=True)
    x, mask = tokens(), padding() if masked else None
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(x, mask), call(x, mask))
    assert found == [1]  # PyTorch makes a boolean mask one of numbers before the call that Dynamo captures


def test_a_padding_mask_for_all_layers_of_a_captured_encoder() -> None:
    encoder = nn.TransformerEncoder(layers(), 2, enable_nested_tensor=False).eval()
    for training in (False, True):
        found: list[int] = []

        def count(gm: Any, inputs: Any, found: list[int] = found) -> Any:
            found.append(backend.rewrite_captured(gm))
            return gm

        torch._dynamo.reset()
        compiled = torch.compile(encoder, backend=count, fullgraph=True)
        x, mask = tokens(), padding()
        with torch.set_grad_enabled(training):
            ours = compiled(x, src_key_padding_mask=mask)
            torch.testing.assert_close(ours, encoder(x, src_key_padding_mask=mask))
        assert found == [4 if training else 2]  # in inference, a layer is one call


def test_masks_that_are_no_padding_are_left_in_captured_graphs() -> None:
    layer = attention()
    floats = torch.zeros(3, 5, dtype=torch.float64).masked_fill(padding(), -1.0)
    for given in ({"key_padding_mask": floats}, {"attn_mask": causal()}, {"need_weights": True}):
        found: list[int] = []

        def count(gm: Any, inputs: Any, found: list[int] = found) -> Any:
            found.append(backend.rewrite_captured(gm))
            return gm

        def call(x: Tensor, given: Any = given) -> Any:
            output, weights = layer(x, x, x, **{"need_weights": False, **given})
            return output if weights is None else output * weights.sum()

        torch._dynamo.reset()
        x = tokens()
        torch.testing.assert_close(torch.compile(call, backend=count, fullgraph=True)(x), call(x))
        assert found == [0], given
