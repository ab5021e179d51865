"""``FusedAttention`` against ``nn.MultiheadAttention``, alone and in PyTorch's transformer layers."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import styleforge
from _reference import DEVICES, random_mask
from styleforge import FusedAttention, FusedFFN

OPS = [
    torch.ops.styleforge.fused_attention.default,
    torch.ops.styleforge.fused_attention_v1.default,
    torch.ops.styleforge.fused_attention_v2.default,
]


class Calls(TorchDispatchMode):
    """The attention operators that ran, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in OPS or func is torch.ops.styleforge._fused_attention_forward.default:
            self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


@contextmanager
def _fused(expected: bool) -> Iterator[None]:
    """Exactly one of the operators runs inside, or none of them."""
    with Calls() as calls:
        yield
    assert len(calls.seen) == expected


def _close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5, equal_nan=True)


def _pair(device: str = "cpu", **options: Any) -> tuple[nn.MultiheadAttention, FusedAttention]:
    theirs = nn.MultiheadAttention(12, 3, **{"batch_first": True, **options}).to(device)
    for name, p in theirs.named_parameters():
        if name.endswith("bias"):  # they start at 0
            nn.init.normal_(p)
    return theirs, FusedAttention.from_torch(theirs)


def _causal(length: int, device: str = "cpu") -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


# --- construction ---------------------------------------------------------------------------------


def test_the_seeds_constructor_arguments() -> None:
    module = FusedAttention(embed_dim=128, num_heads=4, bias=True)
    y = module(torch.randn(2, 256, 128))
    assert isinstance(y, Tensor) and y.shape == (2, 256, 128)


def test_parameters_have_the_names_and_the_first_values_of_pytorchs() -> None:
    for bias in (True, False):
        torch.manual_seed(3)
        ours = FusedAttention(12, 3, bias=bias)
        torch.manual_seed(3)
        theirs = nn.MultiheadAttention(12, 3, bias=bias)
        state, expected = ours.state_dict(), theirs.state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], expected[name]) for name in state)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        for p in ours.parameters():
            nn.init.constant_(p, 7.0)
        ours.reset_parameters()
        assert not any((p == 7).any() for p in ours.parameters())
        assert (ours.in_proj_bias is None) == (not bias)
        if bias:
            assert not ours.in_proj_bias.any() and not ours.out_proj.bias.any()


def test_attributes_that_others_look_at() -> None:
    theirs, ours = _pair(dropout=0.25)
    for name in (
        "embed_dim",
        "kdim",
        "vdim",
        "num_heads",
        "head_dim",
        "dropout",
        "batch_first",
        "bias_k",
        "bias_v",
    ):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.add_zero_attn is theirs.add_zero_attn


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_heads": 5}, "num_heads must divide embed_dim, 12, got 5"),
        ({"num_heads": 0}, "num_heads must divide embed_dim, 12, got 0"),
        ({"embed_dim": 0}, "embed_dim must be positive, got 0"),
        (
            {"embed_dim": 771, "num_heads": 3},
            "embed_dim / num_heads must be at most 256, got 771 / 3 = 257; take more heads",
        ),
        ({"dropout": 1.5}, "dropout must be a probability from 0 to 1, got 1.5"),
        ({"version": 3}, 'version must be one of "auto", 1, 2, got 3'),
        ({"version": "v1"}, "version must be one of \"auto\", 1, 2, got 'v1'"),
        ({"version": True}, 'version must be one of "auto", 1, 2, got True'),
        ({"precision": "high"}, 'precision must be one of ieee, tf32, got "high"'),
    ],
)
def test_wrong_constructor_arguments_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        FusedAttention(**{"embed_dim": 12, "num_heads": 3, **arguments})
    assert str(caught.value) == words


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kdim": 8}, "kdim and vdim must be embed_dim, 12, got 8 and 12"),
        ({"vdim": 9}, "kdim and vdim must be embed_dim, 12, got 12 and 9"),
        ({"add_bias_kv": True}, "add_bias_kv must be False, got True"),
        ({"add_zero_attn": True}, "add_zero_attn must be False, got True"),
    ],
)
def test_from_torch_refuses_what_it_has_not(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        FusedAttention.from_torch(nn.MultiheadAttention(12, 3, **options))
    assert str(caught.value) == words


def test_from_torch_shares_the_parameters_and_keeps_the_rest() -> None:
    theirs = nn.MultiheadAttention(12, 3, dropout=0.3, bias=False, dtype=torch.float64).eval()
    theirs.in_proj_weight.requires_grad_(False)
    ours = FusedAttention.from_torch(theirs, 2)
    assert ours.in_proj_weight is theirs.in_proj_weight and ours.out_proj is theirs.out_proj
    assert not ours.training and not ours.batch_first and ours.dropout == 0.3 and ours.version == 2
    assert not ours.in_proj_weight.requires_grad


def test_repr_meta_device_and_dtype() -> None:
    assert repr(FusedAttention(12, 3)).startswith("FusedAttention(\n  12, 3, version=auto\n")
    text = repr(FusedAttention(12, 3, 0.1, False, 2, False))
    assert "12, 3, dropout=0.1, bias=False, version=2, batch_first=False" in text
    assert all(p.is_meta for p in FusedAttention(12, 3, device="meta").parameters())
    assert (
        FusedAttention(12, 3, dtype=torch.bfloat16)(torch.randn(2, 4, 12).bfloat16()).dtype == torch.bfloat16
    )


def test_each_version_is_its_operator() -> None:
    x = torch.randn(2, 5, 12)
    for version, op in zip(("auto", 1, 2), OPS, strict=True):
        module = FusedAttention(12, 3, version=version).requires_grad_(False)
        with Calls() as calls:
            module(x)
        assert [seen[0] for seen in calls.seen] == [op]


# --- the same as PyTorch's ------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_every_way_to_call_it(
    batched: bool, batch_first: bool, bias: bool, training: bool, device: str
) -> None:
    """Masks of each kind, with and without weights: results and gradients, and whether the operator runs."""
    theirs, ours = _pair(device, bias=bias, batch_first=batch_first)
    theirs.train(training)
    ours.train(training)
    x = torch.randn((6, 12) if not batched else (2, 6, 12) if batch_first else (6, 2, 12), device=device)
    hidden = random_mask(2, 6, "some", device)
    hidden[:, 0] = False  # PyTorch's own weights of what sees nothing are not a number
    if not batched:
        hidden = hidden[0]
    additive = torch.zeros(hidden.shape, device=device).masked_fill(hidden, float("-inf"))
    causal, some = _causal(6, device), torch.randn(6, 6, device=device)
    heads = torch.randn((2 if batched else 1) * 3, 6, 6, device=device)
    for padding, mask, need_weights in itertools.product(
        (None, hidden, additive), (None, "causal", "hint", causal, some, heads), (False, True)
    ):
        if isinstance(mask, Tensor) and padding is not None and padding.dtype != mask.dtype:
            continue  # PyTorch warns of it
        if isinstance(mask, str) and padding is additive:
            continue
        options: dict[str, Any] = {"key_padding_mask": padding}
        if isinstance(mask, Tensor):
            options["attn_mask"] = mask
        elif mask:
            options.update(attn_mask=causal, is_causal=True)
        expected, weights = theirs(x, x, x, need_weights=need_weights, **options)
        if mask == "causal":
            del options["attn_mask"]  # which PyTorch's wants
        fused = not need_weights and not isinstance(mask, Tensor) and padding is not additive
        with _fused(fused):
            result, ours_weights = ours(x, x, x, need_weights=need_weights, **options)
        _close(result, expected)
        assert (weights is None) == (ours_weights is None) == (not need_weights)
        if weights is not None:
            _close(ours_weights, weights)
        if not need_weights:
            with _fused(fused):
                alone = ours(x, **options)
            assert isinstance(alone, Tensor) and torch.equal(alone, result)
        gradients = [
            torch.autograd.grad(y.square().sum(), list(theirs.parameters())) for y in (result, expected)
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch_first", [False, True])
def test_cross_attention(batch_first: bool, device: str) -> None:
    theirs, ours = _pair(device, batch_first=batch_first)
    query, key = torch.randn(4, 4, 12, device=device), torch.randn(4, 4, 12, device=device)
    for args in ((query, key, key), (query, key, query), (query, query, key), (query, query.clone(), query)):
        for need_weights, average in itertools.product((False, True), (False, True)):
            options = dict(need_weights=need_weights, average_attn_weights=average)
            with _fused(False):
                result, weights = ours(*args, **options)
            expected, their_weights = theirs(*args, **options)
            _close(result, expected)
            if need_weights:
                _close(weights, their_weights)
    longer = torch.randn(7, 4, 12, device=device)
    if not batch_first:
        _close(ours(query, longer, longer)[0], theirs(query, longer, longer)[0])
        causal = torch.ones(4, 7, device=device).triu(1).bool()
        expected = theirs(query, longer, longer, attn_mask=causal)[0]
        _close(ours(query, longer, longer, is_causal=True)[0], expected)


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_is_pytorchs(device: str) -> None:
    theirs, ours = _pair(device, dropout=0.4)
    x = torch.randn(2, 6, 12, device=device)
    torch.manual_seed(5)
    with _fused(False):
        result = ours(x)
    torch.manual_seed(5)
    _close(result, theirs(x, x, x, need_weights=False)[0])
    assert not torch.equal(ours(x), result)
    with _fused(True):
        _close(ours.eval()(x), theirs.eval()(x, x, x, need_weights=False)[0])


def test_a_key_without_a_value_is_refused() -> None:
    x = torch.randn(2, 6, 12)
    with pytest.raises(TypeError, match="value must be given where key is"):
        FusedAttention(12, 3)(x, x)


def test_a_wrong_width_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"fused_attention: num_heads must divide embed_dim, 8, got 3"):
        FusedAttention(12, 3)(torch.randn(2, 6, 8))
    with pytest.raises(RuntimeError, match=r"fused_attention: qkv_weight must have shape \[18, 6\], got"):
        FusedAttention(12, 3)(torch.randn(2, 6, 6))


# --- in transformers ------------------------------------------------------------------------------


def _fuse(layer: nn.TransformerEncoderLayer, ffn: bool) -> nn.TransformerEncoderLayer:
    """A copy of the layer on both fused modules, or on the attention alone."""
    layer = copy.deepcopy(layer)
    layer.self_attn = FusedAttention.from_torch(layer.self_attn)
    if ffn:
        layer.linear1 = FusedFFN.from_torch(
            layer
        )  # both linear layers, and what lies between and behind them
        layer.activation = layer.dropout = layer.linear2 = layer.dropout2 = nn.Identity()
    return layer


def _encoder_layer(device: str = "cpu", dropout: float = 0.0, **options: Any) -> nn.TransformerEncoderLayer:
    layer = nn.TransformerEncoderLayer(12, 2, 24, dropout, batch_first=True, **options)
    return layer.to(device)


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """PyTorch's encoder layers by their modules: on the GPU the fast path takes GELU's tanh form for erf."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("ffn", [False, True])
def test_an_encoder_layer_trains_and_infers(
    ffn: bool, activation: str, norm_first: bool, device: str
) -> None:
    layer = _encoder_layer(device, norm_first=norm_first, activation=activation)
    fused = _fuse(layer, ffn)
    x = torch.randn(3, 6, 12, device=device)
    hidden, causal = random_mask(3, 6, "some", device), _causal(6, device)
    hidden[:, 0] = False
    for training, grad in ((True, True), (False, True), (False, False)):
        layer.train(training)
        fused.train(training)
        with torch.set_grad_enabled(grad):
            for options, takes_it in (
                ({}, True),
                ({"src_mask": causal, "is_causal": True}, True),
                ({"src_mask": causal}, False),
                ({"src_key_padding_mask": hidden}, False),  # the layer makes a float of it
            ):
                with _fused(takes_it):
                    result = fused(x, **options)
                with _without_fast_path():
                    expected = layer(x, **options)
                if "src_key_padding_mask" in options and not grad:
                    result, expected = result[~hidden], expected[~hidden]  # PyTorch's own path differs there
                _close(result, expected)
        if grad:
            gradients = [torch.autograd.grad(m(x).square().sum(), m.norm1.weight) for m in (layer, fused)]
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ffn", [False, True])
def test_dropout_in_an_encoder_layer_is_that_of_the_layer(ffn: bool, device: str) -> None:
    layer = _encoder_layer(device, 0.3)
    fused, x = _fuse(layer, ffn), torch.randn(3, 6, 12, device=device)
    results = []
    for module in (layer, fused):
        torch.manual_seed(4)
        results.append(module(x))
    _close(*results)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ffn", [False, True])
def test_an_encoder_of_fused_layers(ffn: bool, device: str) -> None:
    layer = _encoder_layer(device)
    theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(device)
    with pytest.warns(
        UserWarning, match="_qkv_same_embed_dim was not True"
    ):  # it leaves nested tensors alone
        ours = nn.TransformerEncoder(_fuse(layer, ffn), 2)
    x, hidden = torch.randn(3, 6, 12, device=device), torch.zeros(3, 6, dtype=torch.bool, device=device)
    hidden[0, 4:] = True
    for training in (True, False):
        theirs.train(training)
        ours.train(training)
        with torch.set_grad_enabled(training):
            _close(ours(x), theirs(x))
            result, expected = (m(x, src_key_padding_mask=hidden) for m in (ours, theirs))
            _close(result[~hidden], expected[~hidden])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("device", DEVICES)
def test_attention_replaced_inside_of_an_encoder(device: str) -> None:
    """Which then packs sequences of several lengths into a nested tensor."""
    theirs = nn.TransformerEncoder(_encoder_layer(device), 2).to(device).eval()
    ours = copy.deepcopy(theirs)
    for layer in ours.layers:
        layer.self_attn = FusedAttention.from_torch(layer.self_attn)
    x, hidden = torch.randn(3, 6, 12, device=device), torch.zeros(3, 6, dtype=torch.bool, device=device)
    hidden[0, 4:] = hidden[1, 1:] = True
    with torch.no_grad():
        with Calls() as calls:
            result = ours(x, src_key_padding_mask=hidden)
        assert len(calls.seen) == 2
        _close(result, theirs(x, src_key_padding_mask=hidden))


@pytest.mark.parametrize("device", DEVICES)
def test_a_decoder_layer(device: str) -> None:
    theirs = nn.TransformerDecoderLayer(12, 2, 24, 0.0, batch_first=True).to(device)
    ours = copy.deepcopy(theirs)
    ours.self_attn = FusedAttention.from_torch(ours.self_attn)
    ours.multihead_attn = FusedAttention.from_torch(ours.multihead_attn)
    x, memory = torch.randn(3, 6, 12, device=device), torch.randn(3, 9, 12, device=device)
    with _fused(True):
        result = ours(x, memory, tgt_mask=_causal(6, device), tgt_is_causal=True)
    _close(result, theirs(x, memory, tgt_mask=_causal(6, device), tgt_is_causal=True))


# --- as a module ----------------------------------------------------------------------------------


class Both(nn.Module):
    """Called both ways."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        y = self.attention(x) + self.attention(x, key_padding_mask=hidden, is_causal=True)
        pair = self.attention(x, x, x, need_weights=False)
        cross, weights = self.attention(x, y, y)
        assert weights is not None
        return y + pair[0] + cross + weights.sum()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("version", ["auto", 1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_scripting(bias: bool, version: Any, device: str) -> None:
    module = Both(FusedAttention(12, 3, 0.2, bias, version)).to(device)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    x, hidden = torch.randn(2, 6, 12, device=device), random_mask(2, 6, "some", device)
    for training in (True, False):
        module.train(training)
        loaded.train(training)
        torch.manual_seed(1)
        expected = module(x, hidden)
        torch.manual_seed(1)
        _close(loaded(x, hidden), expected)
    scripted = torch.jit.script(nn.Sequential(module.attention, nn.Linear(12, 4)).to(device).eval())
    frozen = torch.jit.freeze(scripted)
    assert "fused_attention" in str(frozen.inlined_graph)
    _close(frozen(x), scripted(x))


def test_scripting_an_encoder_layer() -> None:
    fused = _fuse(_encoder_layer(), ffn=False).eval()
    scripted = torch.jit.script(fused)
    x, hidden = torch.randn(2, 6, 12), torch.zeros(2, 6, dtype=torch.bool)
    hidden[1, 4:] = True
    _close(scripted(x), fused(x))
    _close(scripted(x, src_key_padding_mask=hidden), fused(x, src_key_padding_mask=hidden))


@pytest.mark.parametrize("device", DEVICES)
def test_tracing(device: str) -> None:
    module = FusedAttention(12, 3).to(device).eval().requires_grad_(False)
    traced = torch.jit.trace(module, torch.randn(2, 6, 12, device=device))
    assert "fused_attention" in str(traced.inlined_graph)
    x = torch.randn(3, 9, 12, device=device)
    _close(traced(x), module(x))


@pytest.mark.parametrize("device", DEVICES)
def test_export_with_dynamic_batch_and_length(device: str) -> None:
    from torch.export import Dim

    module = Both(FusedAttention(12, 3)).to(device).eval()
    sizes = {0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=512)}
    example = (torch.randn(2, 6, 12, device=device), random_mask(2, 6, "some", device))
    program = torch.export.export(module, example, dynamic_shapes={"x": sizes, "hidden": sizes}, strict=False)
    targets = [str(n.target) for n in program.graph.nodes]
    assert sum("fused_attention" in t for t in targets) == 3
    for batch, length in ((2, 6), (1, 33), (5, 2)):
        x, hidden = torch.randn(batch, length, 12, device=device), random_mask(batch, length, "some", device)
        _close(program.module()(x, hidden), module(x, hidden))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_a_compiled_training_step_has_no_graph_break(masked: bool, dropout: float, device: str) -> None:
    torch._dynamo.reset()
    module = FusedAttention(12, 3, dropout).to(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 9):
        x = torch.randn(3, length, 12, device=device)
        hidden = random_mask(3, length, "left", device) if masked else None
        gradients = []
        for function in (compiled, module):
            module.zero_grad()
            torch.manual_seed(1)
            function(x, key_padding_mask=hidden, is_causal=True).square().sum().backward()
            gradients.append([p.grad.clone() for p in module.parameters()])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_encoder_layer(device: str) -> None:
    torch._dynamo.reset()
    module = _fuse(_encoder_layer(device), ffn=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 6, 12, device=device)
    for training in (True, False):
        module.train(training)
        _close(compiled(x), module(x))
    with torch.no_grad():
        _close(compiled(x), module(x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, device: str) -> None:
    module, x = FusedAttention(12, 3).to(device), torch.randn(2, 6, 12, device=device)
    with torch.autocast(device, dtype):
        y = module(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), module(x), rtol=2e-2, atol=2e-2)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


def test_deepcopy_pickle_and_state_dict() -> None:
    module = FusedAttention(12, 3)
    x = torch.randn(2, 6, 12)
    expected = module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), expected)
    fresh = FusedAttention(12, 3)
    fresh.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(fresh(x), expected)


def test_other_parameters_for_one_call_and_parametrizations() -> None:
    class Double(nn.Module):
        def forward(self, p: Tensor) -> Tensor:
            return 2 * p

    module, x = FusedAttention(12, 3), torch.randn(2, 6, 12)
    given = {name: torch.rand_like(p) for name, p in module.named_parameters()}
    result = torch.func.functional_call(module, given, (x,))
    module.load_state_dict(given)
    with torch.no_grad():
        expected = module(x)
        assert torch.equal(result, expected)
        for owner, name in ((module, "in_proj_weight"), (module.out_proj, "weight")):
            torch.nn.utils.parametrize.register_parametrization(owner, name, Double())
            owner.parametrizations[name].original.mul_(0.5)
            torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_precision_is_asked_at_every_call(device: str) -> None:
    module = FusedAttention(12, 3).to(device).requires_grad_(False)
    fixed = FusedAttention(12, 3, precision="ieee").to(device).requires_grad_(False)
    x = torch.randn(2, 6, 12, device=device)
    before = torch.backends.cuda.matmul.allow_tf32
    seen = []
    try:
        for flag in (True, False):
            torch.backends.cuda.matmul.allow_tf32 = flag
            with Calls() as calls:
                module(x)
                fixed(x)
            seen += [args[9] if len(args) > 9 else "ieee" for _, args in calls.seen]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert seen == ["tf32", "ieee", "ieee", "ieee"]


@pytest.mark.parametrize("device", DEVICES)
def test_it_learns(device: str) -> None:
    """To copy each token's left neighbour."""
    torch.manual_seed(0)
    module = FusedAttention(16, 2).to(device)
    x = torch.cat([torch.randn(64, 8, 8), F.one_hot(torch.arange(8)).expand(64, 8, 8)], -1).to(device)
    target = x.roll(1, 1)
    optimizer = torch.optim.Adam(module.parameters(), 2e-2)
    losses = []
    for _ in range(150):
        loss = F.mse_loss(module(x)[..., :8], target[..., :8])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
    assert styleforge.last_path().startswith("attention_backward:")
