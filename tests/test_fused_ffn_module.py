"""``FusedFFN`` against the layers it stands for."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import styleforge
from _reference import DEVICES, FFN_ACTIVATIONS
from styleforge import FusedFFN

LAYERS: dict[str, Any] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


def _close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def _sequential(activation: str = "gelu", dropout: float = 0.0, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(12, 40, bias=bias),
        LAYERS[activation](),
        nn.Dropout(dropout),
        nn.Linear(40, 12, bias=bias),
        nn.Dropout(dropout),
    )


# --- construction ---------------------------------------------------------------------------------


def test_the_seeds_constructor_arguments() -> None:
    module = FusedFFN(embed_dim=12, hidden_dim=40, dropout=0.1)
    assert (module.embed_dim, module.hidden_dim) == (12, 40)
    assert (module.hidden_dropout, module.output_dropout) == (0.1, 0.1)
    assert FusedFFN(12, 40).hidden_dropout == 0.1 and FusedFFN(12, 40).activation == "gelu"
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {"fc1_weight": (40, 12), "fc1_bias": (40,), "fc2_weight": (12, 40), "fc2_bias": (12,)}
    assert set(dict(FusedFFN(12, 40, bias=False).named_parameters())) == {"fc1_weight", "fc2_weight"}
    assert module(torch.randn(2, 5, 12)).shape == (2, 5, 12)


def test_parameters_are_drawn_as_by_linear_layers() -> None:
    torch.manual_seed(3)
    ours = FusedFFN(12, 40)
    torch.manual_seed(3)
    theirs = nn.Linear(12, 40), nn.Linear(40, 12)
    for a, b in zip(ours.parameters(), (p for layer in theirs for p in layer.parameters()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"activation": "tanh"}, 'activation must be one of gelu, gelu_tanh, relu, silu, got "tanh"'),
        ({"precision": "high"}, 'precision must be one of ieee, tf32, got "high"'),
        ({"dropout": 1.5}, "dropout must be a probability from 0 to 1, got 1.5"),
        ({"dropout": -0.1}, "dropout must be a probability from 0 to 1, got -0.1"),
    ],
)
def test_wrong_constructor_arguments_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FusedFFN(12, 40, **arguments)


def test_repr() -> None:
    assert (
        repr(FusedFFN(12, 40, 0.2, False, "silu"))
        == "FusedFFN(12, 40, dropout=0.2, bias=False, activation=silu)"
    )


def test_meta_device_dtype_and_empty_widths() -> None:
    assert all(p.is_meta for p in FusedFFN(12, 40, device="meta").parameters())
    skipped = torch.nn.utils.skip_init(FusedFFN, 12, 40)
    assert skipped.fc1_weight.shape == (40, 12) and not skipped.fc1_weight.is_meta
    module = FusedFFN(12, 40, 0.0, dtype=torch.bfloat16)
    assert module(torch.randn(3, 12).bfloat16()).dtype == torch.bfloat16
    assert FusedFFN(0, 4)(torch.randn(3, 0)).shape == (3, 0)


# --- the same as the layers -----------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", FFN_ACTIVATIONS)
def test_from_torch_of_a_sequential(activation: str, bias: bool, device: str) -> None:
    layers = _sequential(activation, 0.3, bias).to(device)
    ours = FusedFFN.from_torch(layers)
    assert ours.fc1_weight is layers[0].weight and ours.fc2_bias is layers[3].bias
    assert ours.activation == activation and ours.training
    x, r = torch.randn(3, 7, 12, device=device), torch.randn(3, 7, 12, device=device)
    ours.eval()
    layers.eval()
    for leading in (x, x[0], x[0, 0]):
        _close(ours(leading), layers(leading))
    _close(ours(x, r), layers(x) + r)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", FFN_ACTIVATIONS)
def test_dropout_in_training_is_that_of_the_layers(activation: str, device: str) -> None:
    """The same masks under the same seed, the same gradients; the residual is not dropped."""
    layers = _sequential(activation, 0.3).to(device)
    ours = FusedFFN.from_torch(copy.deepcopy(layers))
    x, r = torch.randn(3, 7, 12, device=device), torch.randn(3, 7, 12, device=device)
    for module in (layers, ours):
        torch.manual_seed(5)
        y = module(x) + r if module is layers else module(x, r)
        y.square().sum().backward()
        if module is layers:
            expected = y.detach()
    _close(y.detach(), expected)
    for a, b in zip(ours.parameters(), layers.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    torch.manual_seed(5)
    assert torch.equal(ours(x, r), y)
    assert not torch.equal(ours(x, r), y)


def test_dropout_is_the_identity_in_evaluation_and_at_probability_0() -> None:
    module = FusedFFN(12, 40, 0.5)
    never = FusedFFN(12, 40, 0.0)
    never.load_state_dict(module.state_dict())
    x = torch.randn(5, 12)
    assert not torch.equal(module(x), never(x))
    before = torch.random.get_rng_state()
    assert torch.equal(module.eval()(x), never(x))
    assert torch.equal(never(x), never.eval()(x))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_dropout_of_everything() -> None:
    module, x = FusedFFN(12, 40, 1.0), torch.randn(5, 12)
    assert torch.equal(module(x, x), x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "activation",
    ["relu", "gelu", F.silu, nn.GELU(approximate="tanh")],
    ids=["relu", "gelu", "silu function", "GELU module"],
)
def test_from_torch_of_an_encoder_layer(activation: Any, training: bool) -> None:
    layer = nn.TransformerEncoderLayer(12, 3, 40, 0.2, activation).train(training)
    for ours in (
        FusedFFN.from_torch(layer),
        FusedFFN.from_torch((layer.linear1, layer.linear2), FusedFFN.from_torch(layer).activation, 0.2),
    ):
        assert ours.training == training
        x = torch.randn(4, 2, 12)
        torch.manual_seed(9)
        expected = layer._ff_block(x)
        torch.manual_seed(9)
        _close(ours(x), expected)


def test_from_torch_of_two_layers() -> None:
    fc1, fc2 = nn.Linear(12, 40).double(), nn.Linear(40, 12, bias=False).double()
    fc1.weight.requires_grad_(False)
    ours = FusedFFN.from_torch((fc1.eval(), fc2.eval()), "silu")
    assert not ours.training and ours.fc2_bias is None and not ours.fc1_weight.requires_grad
    x = torch.randn(3, 12, dtype=torch.float64)
    _close(ours(x), fc2(F.silu(fc1(x))))
    assert FusedFFN.from_torch((fc1, fc2)).activation == "gelu"
    assert FusedFFN.from_torch((fc1, fc2), dropout=0.4).output_dropout == 0.4


def test_each_dropout_keeps_its_probability() -> None:
    fc1, fc2 = nn.Linear(12, 40), nn.Linear(40, 12)
    for layers, expected in (
        (nn.Sequential(fc1, nn.ReLU(), fc2), (0.0, 0.0)),
        (nn.Sequential(fc1, nn.ReLU(), nn.Dropout(0.2), fc2), (0.2, 0.0)),
        (nn.Sequential(fc1, nn.ReLU(), fc2, nn.Dropout(0.2)), (0.0, 0.2)),
        (nn.Sequential(fc1, nn.ReLU(), nn.Dropout(0.1), fc2, nn.Dropout(0.2)), (0.1, 0.2)),
    ):
        ours = FusedFFN.from_torch(layers)
        assert (ours.hidden_dropout, ours.output_dropout) == expected
        x = torch.randn(5, 12)
        torch.manual_seed(2)
        theirs = layers(x)
        torch.manual_seed(2)
        _close(ours(x), theirs)
    assert "dropout=0.1 and 0.2" in repr(ours)


UNFIT: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no activation": (
        nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)),
        {},
        "layers must be Linear, activation, (Dropout,) Linear, (Dropout), got Linear, Linear",
    ),
    "another activation": (
        nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)),
        {},
        "layers must be Linear, activation, (Dropout,) Linear, (Dropout), got Linear, Tanh, Linear",
    ),
    "a layer too many": (
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU()),
        {},
        "layers must be Linear, activation, (Dropout,) Linear, (Dropout), got Linear, ReLU, Linear, ReLU",
    ),
    "not linear": (
        (nn.Linear(4, 8), nn.ReLU()),
        {},
        "layers must be two linear layers, or nn.Sequential of Linear, activation, (Dropout,) Linear, "
        "(Dropout), got Linear, ReLU",
    ),
    "widths between": (
        (nn.Linear(4, 8), nn.Linear(9, 4)),
        {},
        "fc2 must take fc1's 8 features, got one that takes 9",
    ),
    "width at the end": (
        (nn.Linear(4, 8), nn.Linear(8, 5)),
        {},
        "fc2 must lead back to fc1's 4 features, got one with 5",
    ),
    "activation twice": (
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)),
        {"activation": "gelu"},
        "activation and dropout must be left out where Sequential brings them along, got 'gelu' and None",
    ),
    "encoder layer": (
        nn.TransformerEncoderLayer(4, 1, 8, activation=torch.tanh),
        {},
        "activation must be one of gelu, gelu_tanh, relu, silu, got <built-in",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_layers_that_do_not_fit_are_refused(case: str) -> None:
    layers, arguments, message = UNFIT[case]
    with pytest.raises(ValueError) as caught:
        FusedFFN.from_torch(layers, **arguments)
    assert str(caught.value).startswith(message)


def test_a_wrong_width_is_refused() -> None:
    with pytest.raises(
        RuntimeError, match=r"fused_ffn: fc1_weight must have shape \[hidden, 5\], got \[40, 12\]"
    ):
        FusedFFN(12, 40, 0.0)(torch.randn(3, 5))


# --- as a module ----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_scripting(dropout: float, device: str) -> None:
    module = FusedFFN(12, 40, dropout).to(device)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    x, r = torch.randn(3, 5, 12, device=device), torch.randn(3, 5, 12, device=device)
    for training in (True, False):
        module.train(training)
        loaded.train(training)
        for args in ((x,), (x, r)):
            torch.manual_seed(1)
            expected = module(*args)
            torch.manual_seed(1)
            _close(loaded(*args), expected)
    frozen = torch.jit.freeze(torch.jit.script(module.eval()))
    assert "fused_ffn" in str(frozen.inlined_graph)
    _close(frozen(x, r), module(x, r))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_compiled_training_step_has_no_graph_break(dropout: float, device: str) -> None:
    module = FusedFFN(12, 40, dropout).to(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 9):
        x = torch.randn(3, length, 12, device=device)
        module.zero_grad()
        torch.manual_seed(1)
        compiled(x, x).square().sum().backward()
        ours = [p.grad.clone() for p in module.parameters()]
        module.zero_grad()
        torch.manual_seed(1)
        module(x, x).square().sum().backward()
        for a, p in zip(ours, module.parameters(), strict=True):
            torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-4)


def test_deepcopy_pickle_and_state_dict() -> None:
    module = FusedFFN(12, 40).eval()
    x = torch.randn(3, 12)
    expected = module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), expected)
    fresh = FusedFFN(12, 40).eval()
    fresh.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(fresh(x), expected)


def test_other_parameters_for_one_call_and_parametrizations() -> None:
    class Double(nn.Module):
        def forward(self, p: Tensor) -> Tensor:
            return 2 * p

    module, x = FusedFFN(12, 40).eval(), torch.randn(3, 12)
    given = {name: torch.rand_like(p) for name, p in module.named_parameters()}
    result = torch.func.functional_call(module, given, (x,))
    module.load_state_dict(given)
    with torch.no_grad():
        expected = module(x)
        assert torch.equal(result, expected)
        torch.nn.utils.parametrize.register_parametrization(module, "fc1_weight", Double())
        module.parametrizations.fc1_weight.original.mul_(0.5)
        torch.testing.assert_close(module(x), expected)
        torch.nn.utils.parametrize.remove_parametrizations(module, "fc1_weight", leave_parametrized=True)
        weight = module.fc2_weight
        del module.fc2_weight  # as wrappers do that keep the parameters elsewhere
        module.fc2_weight = weight * 1.0
        torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_it_learns(device: str) -> None:
    torch.manual_seed(0)
    module = FusedFFN(8, 32, 0.05).to(device)
    x = torch.randn(256, 8, device=device)
    target = torch.sin(x.flip(1))
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(module(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


# --- precision ------------------------------------------------------------------------------------

PRECISION = {
    "default": ("", "ieee"),  # PyTorch's own default for matrix products
    "old flag": ("torch.backends.cuda.matmul.allow_tf32 = True", "tf32"),
    "highest": ("torch.set_float32_matmul_precision('highest')", "ieee"),
    "high": ("torch.set_float32_matmul_precision('high')", "tf32"),
    "medium": ("torch.set_float32_matmul_precision('medium')", "tf32"),
    "new flag, tf32": ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "tf32"),
    "new flag, ieee": ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", "ieee"),
    "convolutions do not count": ("torch.backends.cudnn.allow_tf32 = True", "ieee"),
}


@pytest.mark.parametrize("case", PRECISION)
def test_precision_follows_pytorchs_flags(case: str) -> None:
    """In a process of its own: the flags are global, and the older and newer ones do not mix."""
    statement, expected = PRECISION[case]
    code = (
        f"import torch, styleforge\n{statement}\n"
        "from styleforge.ops import matmul_precision\n"
        "from styleforge.ops._precision import matmuls_in\n"
        "print(matmul_precision())\n"
        "print(matmul_precision('ieee'), matmul_precision('tf32'))\n"
        "layer = styleforge.FusedFFN(4, 8)\n"
        "layer.eval()(torch.randn(3, 4))\n"
        "print(layer.scripted_precision)\n"
        "flags = torch.backends.cuda.matmul\n"
        "before = flags.fp32_precision\n"
        "for precision in ('ieee', 'tf32'):\n"
        "    with matmuls_in(precision):\n"
        "        print(flags.fp32_precision)\n"
        "assert flags.fp32_precision == before\n"
        "print(matmul_precision())\n"
    )
    path = str(Path(styleforge.__path__[0]).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])}
    finished = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == [expected, "ieee", "tf32", expected, "ieee", "tf32", expected]


def test_precision_is_asked_at_every_call() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[Any] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.styleforge.fused_ffn.default:
                seen.append(args[7] if len(args) > 7 else "ieee")
            return func(*args, **(kwargs or {}))

    layer = FusedFFN(4, 8).eval().requires_grad_(False)
    fixed = FusedFFN(4, 8, precision="ieee").eval().requires_grad_(False)
    x = torch.randn(3, 4)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for flag in (True, False, True):
            torch.backends.cuda.matmul.allow_tf32 = flag
            with Record():
                layer(x)
                fixed(x)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert seen == ["tf32", "ieee", "ieee", "ieee", "tf32", "ieee"]
