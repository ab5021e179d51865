"""The modules against the layers they stand for."""

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
from torch import Tensor

import styleforge
from _reference import ACTIVATIONS, DEVICES, tensor, tf32, torch_activate
from styleforge import FusedConvInstanceNormReLU, FusedInstanceNorm2d, ResidualBlock


def _close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def _randomize(module: nn.Module) -> None:
    """Parameters and buffers other than the initial ones and zeros, so that a mix-up shows."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.3)
        for name, b in module.named_buffers():
            if b.dtype.is_floating_point:
                b.copy_(torch.rand_like(b) + (0.5 if "var" in name else -0.5))


# --- FusedInstanceNorm2d --------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("track", [False, True])
def test_state_dicts_go_both_ways(track: bool, affine: bool) -> None:
    theirs = nn.InstanceNorm2d(5, affine=affine, track_running_stats=track)
    ours = FusedInstanceNorm2d(5, affine=affine, track_running_stats=track)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for source, target in ((theirs, ours), (ours, theirs)):
        _randomize(source)
        target.load_state_dict(source.state_dict(), strict=True)
        for key, value in source.state_dict().items():
            assert torch.equal(target.state_dict()[key], value), key


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("track", [False, True])
def test_instance_norm_in_training_and_evaluation(
    track: bool, affine: bool, layout: str, device: str
) -> None:
    theirs = nn.InstanceNorm2d(6, eps=1e-3, momentum=0.3, affine=affine, track_running_stats=track).to(device)
    _randomize(theirs)
    ours = FusedInstanceNorm2d(6, eps=1e-3, momentum=0.3, affine=affine, track_running_stats=track).to(device)
    ours.load_state_dict(theirs.state_dict())
    for training in (True, True, False, True, False):
        ours.train(training)
        theirs.train(training)
        x = tensor(3, 6, 9, 7, device=device, layout=layout, offset=2.0)
        a, b = ours(x), theirs(x)
        _close(a, b)
        if track:  # PyTorch's own operators
            assert a.stride() == b.stride()
        else:
            assert a.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
        for key, value in theirs.state_dict().items():
            _close(ours.state_dict()[key].float(), value.float())
    if track:
        assert not torch.equal(theirs.running_mean, torch.zeros(6, device=device))


@pytest.mark.parametrize("momentum", [None, 0.0, 1.0])
def test_momentum_of_running_statistics(momentum: float | None) -> None:
    theirs = nn.InstanceNorm2d(3, momentum=momentum, track_running_stats=True)  # type: ignore[arg-type]
    ours = FusedInstanceNorm2d.from_torch(copy.deepcopy(theirs))
    for _ in range(3):
        x = tensor(2, 3, 5, 5, offset=1.0)
        _close(ours(x), theirs(x))
    assert ours.momentum == theirs.momentum
    for key, value in theirs.state_dict().items():
        _close(ours.state_dict()[key].float(), value.float())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("track", [False, True])
def test_activation_and_residual(track: bool, activation: str) -> None:
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=track)
    _randomize(norm)
    for training in (True, False):
        theirs = copy.deepcopy(norm).train(training)
        ours = FusedInstanceNorm2d.from_torch(copy.deepcopy(norm).train(training), activation, 0.3)
        assert ours.training == training
        x, r = tensor(2, 4, 6, 5), tensor(2, 4, 6, 5)
        _close(ours(x, r), torch_activate(theirs(x) + r, activation, 0.3))
        _close(ours(x), torch_activate(theirs(x), activation, 0.3))


@pytest.mark.parametrize("track", [False, True])
def test_an_unbatched_input(track: bool) -> None:
    theirs = nn.InstanceNorm2d(4, affine=True, track_running_stats=track)
    _randomize(theirs)
    ours = FusedInstanceNorm2d.from_torch(copy.deepcopy(theirs), "relu")
    x, r = torch.randn(4, 6, 5), torch.randn(4, 6, 5)
    _close(ours(x), theirs(x).relu())
    _close(ours(x, r), (theirs(x) + r).relu())
    assert ours(x).shape == (4, 6, 5)


def test_from_torch_shares_parameters_and_buffers() -> None:
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval()
    ours = FusedInstanceNorm2d.from_torch(norm)
    assert ours.weight is norm.weight and ours.bias is norm.bias
    assert ours.running_mean is norm.running_mean and ours.num_batches_tracked is norm.num_batches_tracked
    assert not ours.training
    assert ours.eps == norm.eps and ours.affine and ours.track_running_stats
    plain = FusedInstanceNorm2d.from_torch(nn.InstanceNorm2d(4))
    assert plain.weight is None and plain.bias is None and not plain.state_dict()


def test_the_module_is_an_instance_norm() -> None:
    """Tools that look for the class (quantisation, freezing norms, counting) find it."""
    module = FusedInstanceNorm2d(4, activation="relu")
    assert isinstance(module, nn.InstanceNorm2d)
    assert module.affine  # unlike nn.InstanceNorm2d, whose default is False
    assert "activation=relu" in repr(module) and "4" in repr(module)


@pytest.mark.parametrize("sizes", [(4, 5), (1, 2, 4, 5, 5), (4,)])
def test_a_wrong_rank_is_refused(sizes: tuple[int, ...]) -> None:
    for track in (False, True):
        with pytest.raises((ValueError, RuntimeError)):
            FusedInstanceNorm2d(4, track_running_stats=track)(torch.randn(sizes))


def test_wrong_channels_are_refused() -> None:
    for affine in (False, True):
        module = FusedInstanceNorm2d(4, affine=affine)
        if affine:
            with pytest.raises((ValueError, RuntimeError), match="4"):
                module(torch.randn(2, 5, 3, 3))
        else:  # nn.InstanceNorm2d warns and goes on
            with pytest.warns(UserWarning, match="num_features"):
                nn.InstanceNorm2d(4)(torch.randn(2, 5, 3, 3))


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match=r'activation must be one of none, relu, .*, got "gelu"'):
        FusedInstanceNorm2d(4, activation="gelu")


# --- FusedConvInstanceNormReLU --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "padding"), [(1, 0), (3, 1), (4, 1), (5, 2), (7, 3), (9, 4), ((3, 5), (1, 2))]
)
def test_default_paddings(kernel: Any, padding: Any) -> None:
    module = FusedConvInstanceNormReLU(2, 3, kernel)
    pair = padding if isinstance(padding, tuple) else (padding, padding)
    assert module.padding == pair
    x = tensor(1, 2, 12, 11)
    conv = nn.Conv2d(2, 3, kernel, 1, padding)
    conv.load_state_dict({"weight": module.weight, "bias": module.bias})
    _close(module(x), nn.InstanceNorm2d(3)(conv(x)).relu())


def test_the_seeds_constructor_arguments() -> None:
    """Positions and names: in_channels, out_channels, kernel_size, stride, padding, eps, bias, affine."""
    module = FusedConvInstanceNormReLU(3, 8, 5, 2, 1, 1e-4, False, False)
    assert module.stride == (2, 2) and module.padding == (1, 1) and module.eps == 1e-4
    assert module.bias is None and module.norm_weight is None and module.norm_bias is None
    assert set(module.state_dict()) == {"weight"}
    named = FusedConvInstanceNormReLU(in_channels=3, out_channels=8, kernel_size=3, stride=1, padding=None)
    assert set(named.state_dict()) == {"weight", "bias", "norm_weight", "norm_bias"}
    assert torch.equal(named.norm_weight, torch.ones(8)) and torch.equal(named.norm_bias, torch.zeros(8))
    assert "3, 8" in repr(named) and "kernel_size=(3, 3)" in repr(named)


def test_weights_are_drawn_as_by_conv2d() -> None:
    torch.manual_seed(3)
    ours = FusedConvInstanceNormReLU(16, 32, 3)
    torch.manual_seed(3)
    theirs = nn.Conv2d(16, 32, 3)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ["relu", "none", "leaky_relu"])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate"])
@pytest.mark.parametrize("affine", [False, True])
def test_from_torch_equals_the_layers(affine: bool, padding_mode: str, activation: str, device: str) -> None:
    conv = nn.Conv2d(4, 6, (3, 5), (2, 1), (1, 2), padding_mode=padding_mode).to(device)
    norm = nn.InstanceNorm2d(6, eps=1e-3, affine=affine).to(device)
    _randomize(norm)
    ours = FusedConvInstanceNormReLU.from_torch(conv, norm, activation, negative_slope=0.3)
    assert ours.weight is conv.weight and ours.bias is conv.bias
    assert ours.norm_weight is norm.weight and ours.norm_bias is norm.bias
    x = tensor(2, 4, 9, 10, device=device)
    with tf32(False):
        _close(ours(x), torch_activate(norm(conv(x)), activation, 0.3))


@pytest.mark.parametrize("device", DEVICES)
def test_from_torch_with_layers_before(device: str) -> None:
    """UpsampleConvLayer of the fast-neural-style networks: upsampling, ReflectionPad2d, convolution."""
    conv, norm = nn.Conv2d(4, 6, 3).to(device), nn.InstanceNorm2d(6, affine=True).to(device)
    layers = nn.Sequential(nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1), conv, norm, nn.ReLU())
    ours = FusedConvInstanceNormReLU.from_torch(conv, norm, padding=1, padding_mode="reflect", upsample=2)
    x = tensor(2, 4, 7, 6, device=device)
    with tf32(False):
        _close(ours(x), layers(x))


def test_from_torch_keeps_mode_dtype_and_frozen_parameters() -> None:
    conv, norm = nn.Conv2d(4, 6, 3).double().eval(), nn.InstanceNorm2d(6, affine=True).double().eval()
    conv.weight.requires_grad_(False)
    ours = FusedConvInstanceNormReLU.from_torch(conv, norm)
    assert not ours.training and ours.weight.dtype == torch.float64 and not ours.weight.requires_grad
    assert len(list(ours.parameters())) == 4


UNSUPPORTED = {
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.InstanceNorm2d(6), "groups=2"),
    "dilation": (lambda: nn.Conv2d(4, 6, 3, dilation=2), lambda: nn.InstanceNorm2d(6), "dilation"),
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), lambda: nn.InstanceNorm2d(6), '"same"'),
    "circular": (
        lambda: nn.Conv2d(4, 6, 3, padding_mode="circular"),
        lambda: nn.InstanceNorm2d(6),
        '"circular"',
    ),
    "statistics": (
        lambda: nn.Conv2d(4, 6, 3),
        lambda: nn.InstanceNorm2d(6, track_running_stats=True),
        "running statistics",
    ),
    "features": (lambda: nn.Conv2d(4, 6, 3), lambda: nn.InstanceNorm2d(5), "6 features"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_layers_are_refused(case: str) -> None:
    conv, norm, words = UNSUPPORTED[case]
    with pytest.raises(ValueError, match=words):
        FusedConvInstanceNormReLU.from_torch(conv(), norm())
    with pytest.raises(ValueError, match=words):
        FusedConvInstanceNormReLU(4, 6, 3).load_from_pytorch(conv(), norm())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"activation": "elu"}, "activation must be one of"),
        ({"padding_mode": "circular"}, "padding_mode must be one of"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"upsample": 3}, "upsample must be 1 or 2, got 3"),
        ({"padding": "same"}, "padding must be one or two integers >= 0, got 'same'"),
        ({"padding": -1}, "padding must be one or two integers >= 0, got -1"),
        ({"stride": 0}, "stride must be one or two integers >= 1, got 0"),
        ({"stride": 1.5}, "stride must be one or two integers >= 1, got 1.5"),
        ({"kernel_size": 0}, "kernel_size must be one or two integers >= 1, got 0"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size must be one or two integers >= 1, got \(3, 3, 3\)"),
        ({"in_channels": 0}, "in_channels must be positive, got 0"),
        ({"out_channels": -6}, "out_channels must be positive, got -6"),
    ],
)
def test_wrong_constructor_arguments_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FusedConvInstanceNormReLU(**{"in_channels": 4, "out_channels": 6, **arguments})


LAYERS_OF_ANOTHER_CLASS: dict[str, Any] = {
    "conv must be an nn.Conv2d, got ConvTranspose2d": lambda: FusedConvInstanceNormReLU.from_torch(
        nn.ConvTranspose2d(4, 4, 3), nn.InstanceNorm2d(4)
    ),
    "norm must be an nn.InstanceNorm2d, got BatchNorm2d": lambda: FusedConvInstanceNormReLU.from_torch(
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)
    ),
    "norm must be an nn.InstanceNorm2d, got InstanceNorm1d": lambda: FusedInstanceNorm2d.from_torch(
        nn.InstanceNorm1d(4)
    ),
    "attention must be an nn.MultiheadAttention, got FusedAttention": lambda: (
        styleforge.FusedAttention.from_torch(styleforge.FusedAttention(8, 2))
    ),
    "layers must be two linear layers, .* or nn.TransformerEncoderLayer, got Linear": lambda: (
        styleforge.FusedFFN.from_torch(nn.Linear(4, 4))
    ),
}


@pytest.mark.parametrize("words", LAYERS_OF_ANOTHER_CLASS)
def test_layers_of_another_class_are_refused(words: str) -> None:
    """Some have all the attributes that are read, and would give other numbers without a word."""
    with pytest.raises(TypeError, match=words):
        LAYERS_OF_ANOTHER_CLASS[words]()


def test_load_from_pytorch_copies() -> None:
    conv, norm = nn.Conv2d(4, 6, 3, padding=1), nn.InstanceNorm2d(6, affine=True)
    _randomize(norm)
    ours = FusedConvInstanceNormReLU(4, 6, 3)
    ours.load_from_pytorch(conv, norm)
    x = tensor(2, 4, 7, 6)
    expected = norm(conv(x)).relu()
    _close(ours(x), expected)
    with torch.no_grad():
        conv.weight.zero_()
        norm.weight.zero_()
    _close(ours(x), expected)
    with pytest.raises(ValueError, match=r"conv.weight must have shape \[6, 4, 3, 3\], got \[6, 4, 5, 5\]"):
        ours.load_from_pytorch(nn.Conv2d(4, 6, 5), norm)


def test_load_from_pytorch_resets_what_the_layers_lack() -> None:
    """A norm without scale and shift is one with 1 and 0: what was there before must not survive."""
    conv, norm = nn.Conv2d(4, 6, 3, padding=1), nn.InstanceNorm2d(6)
    ours = FusedConvInstanceNormReLU(4, 6, 3)
    _randomize(ours)
    ours.load_from_pytorch(conv, norm)
    x = tensor(2, 4, 7, 6)
    _close(ours(x), norm(conv(x)).relu())


def test_gamma_and_beta_are_older_names() -> None:
    source = FusedConvInstanceNormReLU(3, 4, 3)
    _randomize(source)
    state = source.state_dict()
    names = {"weight": "weight", "bias": "bias", "gamma": "norm_weight", "beta": "norm_bias"}
    old = {before: state[now] for before, now in names.items()}
    kept = dict(old)
    target = FusedConvInstanceNormReLU(3, 4, 3)
    target.load_state_dict(old, strict=True)
    assert set(old) == set(kept)  # the caller's dictionary is as it was
    x = tensor(1, 3, 6, 6)
    assert torch.equal(target(x), source(x))
    nested = nn.Sequential(FusedConvInstanceNormReLU(3, 4, 3))
    nested.load_state_dict({f"0.{k}": v for k, v in old.items()}, strict=True)
    assert torch.equal(nested(x), source(x))


# --- ResidualBlock --------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_residual_block(padding_mode: str, activation: str, device: str) -> None:
    conv1, conv2 = (nn.Conv2d(6, 6, 3, 1, 1, padding_mode=padding_mode).to(device) for _ in range(2))
    in1, in2 = (nn.InstanceNorm2d(6, affine=True).to(device) for _ in range(2))
    for norm in (in1, in2):
        _randomize(norm)
    block = ResidualBlock(6, padding_mode=padding_mode, activation=activation).to(device)
    block.load_from_pytorch_block(conv1, in1, nn.ReLU(), conv2, in2)
    for layout in ("contiguous", "channels_last"):
        x = tensor(2, 6, 9, 8, device=device, layout=layout).requires_grad_()
        with tf32(False):
            ours = block(x)
            theirs = torch_activate(in2(conv2(in1(conv1(x)).relu())) + x, activation, 0.0)
            _close(ours, theirs)
            grad = torch.randn_like(theirs)
            # away from relu's kink: one element on the other side would be a large difference
            grad = grad * (theirs.detach().abs() > 1e-3)
            (a,) = torch.autograd.grad(ours, x, grad)
            (b,) = torch.autograd.grad(theirs, x, grad)
        assert (a - b).norm() < 1e-2 * b.norm()


def test_residual_block_refuses_what_changes_the_size() -> None:
    with pytest.raises(ValueError, match="kernel_size must be odd and stride 1"):
        ResidualBlock(4, kernel_size=4)
    with pytest.raises(ValueError, match="kernel_size must be odd and stride 1"):
        ResidualBlock(4, stride=2)


# --- all of them ----------------------------------------------------------------------------------

MODULES = {
    "norm": lambda: FusedInstanceNorm2d(4, activation="silu"),
    "norm without affine": lambda: FusedInstanceNorm2d(4, affine=False),
    "norm with statistics": lambda: FusedInstanceNorm2d(4, track_running_stats=True, activation="relu"),
    "conv": lambda: FusedConvInstanceNormReLU(4, 4, 3, padding_mode="reflect", activation="leaky_relu"),
    "conv without affine": lambda: FusedConvInstanceNormReLU(4, 4, (3, 1), bias=False, affine=False),
    "upsampling": lambda: FusedConvInstanceNormReLU(4, 4, 3, upsample=2),
    "residual": lambda: ResidualBlock(4),
}


@pytest.mark.parametrize("name", MODULES)
def test_scripting(name: str) -> None:
    module = MODULES[name]().eval()
    _randomize(module)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for sizes in ((2, 4, 6, 5), (1, 4, 9, 11)):
        x = tensor(*sizes)
        _close(loaded(x), module(x))
    if not name.startswith("residual"):
        r = torch.randn_like(module(x))
        _close(loaded(x, r), module(x, r))
    if name.startswith("norm"):
        _close(loaded(x[0]), module(x[0]))
    frozen = torch.jit.freeze(torch.jit.script(module))
    _close(frozen(x), module(x))


@pytest.mark.parametrize("name", MODULES)
def test_deepcopy_pickle_and_state_dict(name: str) -> None:
    module = MODULES[name]()
    _randomize(module)
    x = tensor(2, 4, 6, 5)
    module.eval()
    expected = module(x)
    reloaded = MODULES[name]().eval()
    reloaded.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), reloaded):
        assert torch.equal(other(x), expected)
        assert all(a is not b for a, b in zip(other.parameters(), module.parameters(), strict=True))
        assert repr(other) == repr(module)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_dtypes(name: str, dtype: torch.dtype, device: str) -> None:
    module = MODULES[name]().to(device)
    _randomize(module)
    module.eval()
    x = tensor(2, 4, 8, 8, device=device)
    with tf32(False):
        expected = module(x)
    converted = copy.deepcopy(module).to(dtype)
    result = converted(x.to(dtype))
    assert result.dtype == dtype
    bound = 40 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert (result.float() - expected).abs().max() < bound * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("name", MODULES)
def test_meta_device_and_skip_init(name: str) -> None:
    """Shapes without data, and a model that is built empty and then filled."""
    module = MODULES[name]().eval()
    _randomize(module)
    with torch.device("meta"):
        empty = MODULES[name]().eval()
    x = tensor(2, 4, 6, 5)
    meta = empty(x.to("meta"))
    assert meta.is_meta and meta.shape == module(x).shape
    empty.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(empty(x), module(x))


@pytest.mark.parametrize("name", MODULES)
def test_a_whole_network_trains(name: str) -> None:
    """Every parameter gets a finite gradient (the convolution's bias zeros) and the loss falls."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), MODULES[name](), nn.Conv2d(4, 3, 1))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    x = tensor(2, 3, 8, 8)
    with torch.no_grad():
        target = torch.randn_like(network(x))
    losses = []
    for _ in range(30):
        loss = nn.functional.mse_loss(network(x), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-3


# --- precision ------------------------------------------------------------------------------------

PRECISION = {
    "default": ("", "tf32"),  # PyTorch's own default for convolutions
    "old flag off": ("torch.backends.cudnn.allow_tf32 = False", "ieee"),
    "old flag on": (
        "torch.backends.cudnn.allow_tf32 = False\ntorch.backends.cudnn.allow_tf32 = True",
        "tf32",
    ),
    "new flag of convolutions, ieee": ("torch.backends.cudnn.conv.fp32_precision = 'ieee'", "ieee"),
    "new flag of convolutions, tf32": (
        "torch.backends.cudnn.conv.fp32_precision = 'ieee'\n"
        "torch.backends.cudnn.conv.fp32_precision = 'tf32'",
        "tf32",
    ),
    "new flag of cuDNN": (
        "torch.backends.cudnn.fp32_precision = 'ieee'\n"
        "torch.backends.cudnn.conv.fp32_precision = 'ieee'\n"
        "torch.backends.cudnn.rnn.fp32_precision = 'ieee'",
        "ieee",
    ),
    "matmul flags do not count": ("torch.backends.cuda.matmul.allow_tf32 = True", "tf32"),
}


@pytest.mark.parametrize("case", PRECISION)
def test_precision_follows_pytorchs_flags(case: str) -> None:
    """In a process of its own: the flags are global, and the older and newer ones do not mix."""
    statement, expected = PRECISION[case]
    code = (
        f"import torch, styleforge\n{statement}\n"
        "from styleforge.ops import conv_precision\n"
        "print(conv_precision())\n"
        "print(conv_precision('ieee'), conv_precision('tf32'))\n"
        "layer = styleforge.FusedConvInstanceNormReLU(3, 4, 3)\n"
        "layer(torch.randn(1, 3, 5, 5))\n"
        "print(layer.scripted_precision)\n"
    )
    path = str(Path(styleforge.__path__[0]).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])}
    finished = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == [expected, "ieee", "tf32", expected]


def test_precision_is_asked_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[Any] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.styleforge.fused_conv_instance_norm_relu.default:
                seen.append(args[13] if len(args) > 13 else "ieee")
            return func(*args, **(kwargs or {}))

    layer = FusedConvInstanceNormReLU(3, 4, 3).requires_grad_(False)
    fixed = FusedConvInstanceNormReLU(3, 4, 3, precision="ieee").requires_grad_(False)
    x = torch.randn(1, 3, 5, 5)
    for flag in (True, False, True):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", flag)
        with Record():
            layer(x)
            fixed(x)
    assert seen == ["tf32", "ieee", "ieee", "ieee", "tf32", "ieee"]


@pytest.mark.parametrize("track", [False, True])
def test_symbolic_trace(track: bool) -> None:
    """As with PyTorch's layers: torch.fx follows a model that they are in."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        styleforge.FusedInstanceNorm2d(3, track_running_stats=track),
        styleforge.FusedConvInstanceNormReLU(3, 4, 3),
        styleforge.ResidualBlock(4),
        nn.Flatten(2),
        styleforge.FusedFFN(16, 8, 0.0),
        styleforge.FusedAttention(16, 2),
    ).eval()
    graph = torch.fx.symbolic_trace(model)
    x = tensor(2, 2, 6, 6)
    torch.testing.assert_close(graph(x), model(x))
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x))


def test_symbolic_trace_of_attention_in_the_place_of_pytorchs() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = styleforge.FusedAttention(6, 2)

        def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
            first = self.attention(x, x, x, need_weights=False)[0]
            second, weights = self.attention(first, memory, memory)
            return second, weights

    block = Block()
    x, memory = torch.randn(2, 5, 6), torch.randn(2, 4, 6)
    for ours, expected in zip(torch.fx.symbolic_trace(block)(x, memory), block(x, memory), strict=True):
        torch.testing.assert_close(ours, expected)
