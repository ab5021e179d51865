"""What ``styleforge.fuse`` recognises and what it must not touch, pattern by pattern.

Every network here is compared with itself unfused, whatever was fused.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

import styleforge
from styleforge.fuse import FusionReport

CONV, NORM, FFN = "fused_conv_instance_norm_relu", "fused_instance_norm", "fused_ffn"


@torch.fx.wrap
def wrapped_double(x: Tensor) -> None:
    x.mul_(2)


class Net(nn.Module):
    """Layers by name and a forward that is given."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.__class__ = type("Net", (Net,), {"forward": forward})


def conv(**changes: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, **{"padding": 1, **changes})


def norm(**changes: Any) -> nn.InstanceNorm2d:
    layer = nn.InstanceNorm2d(4, **{"affine": True, **changes})
    if layer.affine:
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.uniform_(layer.bias, -1, 1)
    return layer


def check(model: nn.Module, *inputs: Any, training: bool = False) -> FusionReport:
    """Fused and unfused are equal in float64; gives the report."""
    model = model.double().train(training)
    inputs = inputs or (torch.randn(2, 4, 9, 10, dtype=torch.float64),)
    fused = styleforge.fuse(model)
    with torch.random.fork_rng():
        ours = fused(*(x.clone() if isinstance(x, Tensor) else x for x in inputs))
    with torch.random.fork_rng():
        theirs = model(*(x.clone() if isinstance(x, Tensor) else x for x in inputs))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    return fused.styleforge_report


def reasons(report: FusionReport) -> str:
    return "; ".join(map(str, report.not_fused))


# --- what is fused --------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu_in_place": nn.ReLU(True),
    "leaky_relu": nn.LeakyReLU(0.3),
    "silu": nn.SiLU(True),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_after_a_norm(activation: str) -> None:
    report = check(nn.Sequential(conv(), norm(), ACTIVATIONS[activation], conv()))
    assert report.fused[0].operator == CONV and report.fused[0].parts == ("0", "1", "2")


@pytest.mark.parametrize(
    "before",
    [
        [nn.ReflectionPad2d(1), conv(padding=0)],
        [nn.ReflectionPad2d((2, 2, 1, 1)), conv(padding=0)],
        [nn.ReplicationPad2d(1), conv(padding=0)],
        [nn.ZeroPad2d(1), conv(padding=0)],
        [nn.ConstantPad2d(2, 0.0), conv(padding=0)],
        [conv(padding_mode="reflect")],
        [conv(padding_mode="replicate", stride=2)],
        [conv(padding="same")],
        [conv(padding="valid", stride=(2, 1))],
        [nn.Upsample(scale_factor=2), conv()],
        [nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact"), nn.ReflectionPad2d(1), conv(padding=0)],
        [nn.UpsamplingNearest2d(scale_factor=2), nn.Identity(), conv(bias=False)],
    ],
)
def test_padding_and_upsampling_before_a_convolution(before: list[nn.Module]) -> None:
    report = check(nn.Sequential(*before, norm(eps=1e-3), nn.ReLU()))
    assert report.count(CONV) == 1 and not report.not_fused
    assert len(report.fused[0].parts) == len(before) + 2


@pytest.mark.parametrize("training", [False, True])
def test_the_last_layer_of_picture_networks(training: bool) -> None:
    x = torch.randn(2, 4, 12, 13, dtype=torch.float64)
    for rows, columns in ((1, 1), (2, 3)):
        kernel = (2 * rows + 1, 2 * columns + 1)
        last = nn.Conv2d(4, 3, kernel, bias=rows == 1)
        net = nn.Sequential(nn.ReflectionPad2d((columns, columns, rows, rows)), last, nn.Tanh())
        for picture in (x, x[0], x.contiguous(memory_format=torch.channels_last)):
            assert check(net, picture, training=training).count("reflect_conv2d") == 1
            with torch.no_grad():
                check(net, picture, training=training)
    for layers in (
        [nn.ReflectionPad2d(1), nn.Conv2d(4, 3, 5)],
        [nn.ReflectionPad2d(1), nn.Conv2d(4, 3, 3, stride=2)],
        [nn.ReflectionPad2d(1), nn.Conv2d(4, 3, 3, padding=1)],
        [nn.ReflectionPad2d(1), nn.Conv2d(4, 8, 3)],
        [nn.ReplicationPad2d(1), nn.Conv2d(4, 3, 3)],
        [nn.ReflectionPad2d(1), nn.Conv2d(4, 2, 3, groups=2)],
    ):
        report = check(nn.Sequential(*layers), x, training=training)
        assert not report.fused and "no InstanceNorm2d after it" in str(report)


def test_a_lone_norm_takes_what_follows_it() -> None:
    report = check(Net(lambda m, x: F.silu(x + m.n(m.t(x))), t=nn.ConvTranspose2d(4, 4, 1), n=norm()))
    assert report.fused[0].parts == ("n", "add", "silu") and report.fused[0].operator == NORM
    assert "t (ConvTranspose2d): no operator for it" in reasons(report)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.SiLU()])
def test_feed_forward_networks(activation: nn.Module) -> None:
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    layers = [nn.Linear(6, 11), activation, nn.Dropout(0.2), nn.Linear(11, 7, bias=False), nn.Dropout(0.2)]
    for training in (False, True):
        report = check(nn.Sequential(*layers), x, training=training)
        assert report.count(FFN) == 1
        assert report.fused[0].parts == ("0", "1", "2", "3")


def test_parametrized_layers_are_read_at_each_call() -> None:
    layer = nn.utils.parametrizations.weight_norm(conv())
    report = check(nn.Sequential(layer, norm(), nn.ReLU()))
    assert report.count(CONV) == 1
    fused = styleforge.fuse(nn.Sequential(layer, norm(), nn.ReLU()).double().eval())
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    before = fused(x)
    with torch.no_grad():
        layer.parametrizations.weight.original1.copy_(torch.randn(4, 4, 3, 3))
    assert not torch.allclose(fused(x), before)


def test_layers_used_twice_are_two_places() -> None:
    both = nn.Sequential(conv(), norm(), nn.ReLU(True))
    report = check(Net(lambda m, x: m.a(x) - m.a(x + 1), a=both))
    assert report.count(CONV) == 1  # in the Sequential, which runs twice
    shared = norm()
    report = check(nn.Sequential(conv(), shared, conv(), shared))
    assert report.count(CONV) == 2


def test_pictures_without_a_batch() -> None:
    x = torch.randn(4, 9, 10, dtype=torch.float64)
    net = Net(lambda m, x: F.relu(m.n(m.c(x)) + x), c=conv(padding_mode="reflect"), n=norm())
    assert check(net, x).count(CONV) == 1
    # PyTorch's upsampling takes [C, H, W] for rows: odd, but that is what the network says.
    assert check(nn.Sequential(nn.Upsample(scale_factor=2), conv(), norm()), x).count(CONV) == 1
    assert check(nn.Sequential(nn.ConvTranspose2d(4, 4, 3), norm(), nn.ReLU()), x).count(NORM) == 1
    # F.instance_norm has no pictures without a batch: there [4, 9, 10] is a batch of signals.
    functional = Net(lambda m, x: F.relu(F.instance_norm(m.c(x))), c=conv())
    assert check(functional, x).count(CONV) == 1


@pytest.mark.parametrize("rank", [3, 5])
def test_instance_norm_of_signals_and_volumes(rank: int) -> None:
    x = torch.randn((2, 3, 4, 5, 6)[:rank], dtype=torch.float64)
    assert check(Net(lambda m, x: F.relu(F.instance_norm(x) + x)), x).count(NORM) == 1


@pytest.mark.parametrize("other", [(1, 4, 1, 1), (2, 4, 9, 1), (10,), (3, 2, 4, 9, 10)])
def test_additions_that_broadcast(other: tuple[int, ...]) -> None:
    net = Net(lambda m, x, y: F.relu(m.n(m.c(x)) + y), c=conv(), n=norm())
    x = torch.randn(2, 4, 9, 10, dtype=torch.float64)
    check(net, x, torch.randn(other, dtype=torch.float64))
    check(Net(lambda m, x, y: F.relu(m.n(x) + y), n=norm()), x, torch.randn(other, dtype=torch.float64))


def test_additions_of_numbers_and_of_other_dtypes() -> None:
    x = torch.randn(2, 4, 9, 10, dtype=torch.float64)
    check(Net(lambda m, x: F.relu(m.n(m.c(x)) + 1.5), c=conv(), n=norm()))
    check(Net(lambda m, x: F.relu(m.n(m.c(x)) + x.shape[1]), c=conv(), n=norm()))
    check(Net(lambda m, x, y: m.n(m.c(x)) + y, c=conv(), n=norm()), x, torch.ones(2, 4, 9, 10))
    check(Net(lambda m, x: torch.add(m.n(m.c(x)), x, alpha=2), c=conv(), n=norm()))
    check(Net(lambda m, x: m.b(F.gelu(m.a(x))) + 1, a=nn.Linear(10, 4), b=nn.Linear(4, 10)))


# --- what is left ---------------------------------------------------------------------------------


class Swish(nn.Conv2d):
    """A subclass does what it likes."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).sigmoid()


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    return layer


LEFT: dict[str, tuple[list[nn.Module], str, dict[str, int]]] = {
    "groups": ([conv(groups=2), norm(), nn.ReLU()], "groups=2", {NORM: 1}),
    "dilation": ([conv(dilation=2), norm()], "dilation=", {NORM: 1}),
    "circular": ([conv(padding_mode="circular"), norm()], "circular", {NORM: 1}),
    "same_of_even": ([nn.Conv2d(4, 4, 2, padding="same"), norm()], "even kernel", {NORM: 1}),
    "running_statistics": ([conv(), norm(track_running_stats=True)], "track_running_stats=True", {}),
    "transposed": ([nn.ConvTranspose2d(4, 4, 3), norm()], "ConvTranspose2d", {NORM: 1}),
    "no_norm": ([conv(), nn.BatchNorm2d(4)], "no InstanceNorm2d after it", {}),
    "dropout_between": ([conv(), nn.Dropout(0.5), norm()], "dropout between", {NORM: 1}),
    "dropout_of_channels": ([conv(), nn.Dropout2d(0.5), norm()], "Dropout2d", {NORM: 1}),
    "hook_on_convolution": ([hooked(conv()), norm()], "Conv2d with hooks", {NORM: 1}),
    "hook_on_norm": ([conv(), hooked(norm())], "InstanceNorm2d with hooks", {}),
    "hook_on_activation": ([conv(), norm(), hooked(nn.ReLU())], "with hooks", {CONV: 1}),
    "subclass": ([Swish(4, 4, 3), norm()], "", {NORM: 1}),
    "uneven_padding": ([nn.ZeroPad2d((0, 1, 0, 1)), conv(padding=0), norm()], "", {CONV: 1}),
    "padding_with_one": ([nn.ConstantPad2d(1, 1.0), conv(padding=0), norm()], "", {CONV: 1}),
    "padding_twice": ([nn.ReflectionPad2d(1), conv(), norm()], "", {CONV: 1}),
    "cropping": ([nn.ZeroPad2d(-1), conv(), norm()], "", {CONV: 1}),
    "bilinear": ([nn.Upsample(scale_factor=2, mode="bilinear"), conv(), norm()], "", {CONV: 1}),
    "three_times": ([nn.Upsample(scale_factor=3), conv(), norm()], "", {CONV: 1}),
    "up_to_a_size": ([nn.Upsample((18, 20)), conv(), norm()], "", {CONV: 1}),
    "other_activation": ([conv(), norm(), nn.ELU()], "", {CONV: 1}),
    "linear_tanh": ([nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 4)], "tanh between it", {}),
    "linear_elu": ([nn.Linear(10, 4), nn.ELU(), nn.Linear(4, 4)], "", {}),
    "linear_hook": ([nn.Linear(10, 4), nn.ReLU(), hooked(nn.Linear(4, 4))], "", {}),
    "linear_alpha": ([nn.Linear(10, 4), nn.ReLU(), nn.AlphaDropout(0.1), nn.Linear(4, 4)], "", {}),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_proven_is_left(name: str, training: bool) -> None:
    layers, reason, found = LEFT[name]
    report = check(nn.Sequential(*layers), training=training)
    assert {op: report.count(op) for op in (CONV, NORM, FFN) if report.count(op)} == found
    assert reason in reasons(report)


def _twice(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    return m.n(y) + y


def _norm_twice(m: Any, x: Tensor) -> Tensor:
    y = m.n(m.c(x))
    return F.relu(y) + y


def _norm_of_norm_with_itself(m: Any, x: Tensor) -> Tensor:
    y = m.n(m.c(x))
    return F.relu(y + y)


def _input_written_to(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    x.mul_(2)
    return F.relu(m.n(y)) + x


def _input_written_to_through_a_view(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    x[:, :2].relu_()
    return m.n(y)


def _input_assigned_to(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    x[:, 0] = 0
    return m.n(y) + x


def _shortcut_written_to(m: Any, x: Tensor) -> Tensor:
    y = m.n(m.c(x))
    x += y
    return F.relu(x)


def _result_written_to(m: Any, x: Tensor) -> Tensor:
    y = m.n(m.c(x))
    y += x
    return F.relu_(y)


def _written_to_between_sum_and_activation(m: Any, x: Tensor) -> Tensor:
    z = m.n(m.c(x)) + x
    x.zero_()
    return F.relu(z) + x


def _pad_used_twice(m: Any, x: Tensor) -> Tensor:
    y = F.pad(x, (1, 1, 1, 1), mode="reflect")
    return m.n(m.c(y)) + y[:, :, : -0 or None, :].mean()


GRAPHS: dict[str, tuple[Callable[..., Any], dict[str, int]]] = {
    "convolution_twice": (_twice, {NORM: 1}),
    "norm_twice": (_norm_twice, {CONV: 1}),
    "norm_with_itself": (_norm_of_norm_with_itself, {CONV: 1}),
    "input_written_to": (_input_written_to, {NORM: 1}),
    "view_written_to": (_input_written_to_through_a_view, {NORM: 1}),
    "input_assigned_to": (_input_assigned_to, {NORM: 1}),
    "shortcut_written_to": (_shortcut_written_to, {CONV: 1}),
    "result_written_to": (_result_written_to, {CONV: 1}),
    "between_sum_and_activation": (_written_to_between_sum_and_activation, {CONV: 1}),
    "pad_twice": (_pad_used_twice, {CONV: 1}),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_readers_and_writers_in_the_way(name: str) -> None:
    forward, found = GRAPHS[name]
    report = check(Net(forward, c=conv(), n=norm()))
    assert {op: report.count(op) for op in (CONV, NORM) if report.count(op)} == found


def test_a_residual_that_is_written_to_stays_outside() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        z = m.n(m.c(x)) + x
        x.zero_()
        return F.relu(z) + x

    report = check(Net(forward, c=conv(), n=norm()))
    assert report.fused[0].parts == ("c", "n")


# --- forwards that cannot be followed, or only for some calls --------------------------------------


def _by_value(m: Any, x: Tensor) -> Tensor:
    y = m.body(x)
    return m.n(y) if y.sum() > 0 else m.n(y + 1)


def _by_chance(m: Any, x: Tensor) -> Tensor:
    return m.body(x) if random.random() < 2 else x


def _own_tensor(m: Any, x: Tensor) -> Tensor:
    return m.body(x) + torch.rand(1, dtype=torch.float64)


def _sets_attribute(m: Any, x: Tensor) -> Tensor:
    m.seen = m.body(x)
    return m.seen


def _sets_list(m: Any, x: Tensor) -> Tensor:
    m.history.append(1)
    return m.body(x)


def _without_gradients(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m.body(x)


def _in_bfloat16(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.body(x)


def _any_arguments(m: Any, *x: Tensor) -> Tensor:
    return m.body(x[0])


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (_by_value, "cannot be traced"),
        (_by_chance, "draws random numbers"),
        (_own_tensor, "makes tensors of its own"),
        (_sets_attribute, "sets attributes"),
        (_sets_list, "sets attributes"),
        (_without_gradients, "changes the gradient mode"),
        (_in_bfloat16, "changes the gradient mode or autocast"),
        (_any_arguments, "takes *args"),
    ],
)
def test_the_parts_of_a_forward_that_cannot_be_followed(forward: Callable[..., Any], reason: str) -> None:
    net = Net(forward, body=nn.Sequential(conv(), norm(), nn.ReLU()), n=norm())
    net.history = []  # type: ignore[assignment]
    state = random.getstate()
    report = check(net)
    assert net.history in ([], [1, 1])  # both ran; reading the forward left no trace
    assert random.getstate() == state or forward is _by_chance
    assert "seen" not in vars(net) or isinstance(net.seen, Tensor)
    assert report.count(CONV) == 1, report
    assert report.count(NORM) == 1, report  # the layer on its own
    assert f"the model (Net): {reason}" in reasons(report).replace("its forward ", "")


def test_lists_of_modules() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Sequential(conv(), norm(), nn.ReLU(True)) for _ in range(2))
            self.both = [self.a, self.b]
            self.named = {"last": (self.a,)[0]}

        def forward(self, x: Tensor) -> Tensor:
            for part in self.both:
                x = part(x)
            return x + self.named["last"](x)

    model = Listed()
    assert check(model).count(CONV) == 2
    fused = styleforge.fuse(model)
    assert fused.both[0] is fused.a and fused.both[0] is not model.a
    assert list(fused.state_dict()) == list(model.state_dict())


def test_operators_that_write_in_the_way() -> None:
    library = torch.library.Library("styleforge_tests", "FRAGMENT")
    library.define("double_(Tensor(a!) x) -> ()")

    def double_(x: Tensor) -> None:
        x.mul_(2)

    library.impl("double_", double_, "CompositeExplicitAutograd")

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.c(x)
        torch.ops.styleforge_tests.double_(x)
        return m.n(y) + x

    def function(m: Any, x: Tensor) -> Tensor:
        y = m.c(x)
        wrapped_double(x)
        return m.n(y) + x

    def overload(m: Any, x: Tensor) -> Tensor:
        y = m.c(x)
        torch.ops.styleforge_tests.double_.default(x)
        return m.n(y) + x

    for written in (forward, overload, function):
        with torch.no_grad():
            assert check(Net(written, c=conv(), n=norm())).count(CONV) == 0


def test_masks_that_may_be_left_out() -> None:
    def forward(m: Any, x: Tensor, mask: Tensor | None = None, *, scale: float = 2.0) -> Tensor:
        y = F.relu(m.n(m.c(x))) * scale
        return y * mask if mask is not None else y

    net = Net(forward, c=conv(), n=norm())
    x, mask = torch.randn(2, 2, 4, 9, 10, dtype=torch.float64)
    assert check(net, x).count(CONV) == 1
    assert check(net, x, mask).count(CONV) == 1
    fused = styleforge.fuse(net)
    torch.testing.assert_close(fused(x, mask=mask), net(x, mask))
    torch.testing.assert_close(fused(x, scale=3.0), net(x, scale=3.0))  # as written: not read for that
    torch.testing.assert_close(fused(x=x, mask=mask, scale=2.0), net(x, mask))


def test_forwards_that_ask_for_types() -> None:
    def forward(m: Any, x: Any) -> Tensor:
        if not isinstance(x, torch.Tensor):
            x = x["picture"]
        return m.n(m.c(x))

    net = Net(forward, c=conv(), n=norm())
    x = torch.randn(2, 4, 9, 10, dtype=torch.float64)
    assert check(net, x).count(CONV) == 1
    assert check(net, {"picture": x}).count(CONV) == 1


def test_modes_of_functional_dropout() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(F.dropout(F.gelu(m.a(x)), 0.5, m.training)) + x

    net = Net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 6))
    x = torch.randn(3, 6, dtype=torch.float64)
    for training in (True, False):
        assert check(net, x, training=training).count(FFN) == 1
    net.eval()
    net.training = True  # one module in another mode than what is inside of it
    fused = styleforge.fuse(net)
    torch.manual_seed(1)
    ours = fused(x)
    torch.manual_seed(1)
    torch.testing.assert_close(ours, net(x))


def test_results_of_many_kinds() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.n(m.c(x))
        return {"out": F.relu(y), "both": [x, (x + 1, None)]}

    check(Net(forward, c=conv(), n=norm()))


def test_scripted_parts_and_models_without_torch_layers() -> None:
    part = torch.jit.script(nn.Sequential(conv(), norm()).double())
    report = check(nn.Sequential(part, conv(), norm()))
    assert report.count(CONV) == 1
    assert not check(nn.Identity()).fused
    assert check(norm()).count(NORM) == 1


# --- random networks ------------------------------------------------------------------------------

PIECES: dict[str, Callable[[], nn.Module]] = {
    "conv": conv,
    "conv0": lambda: conv(padding=0),
    "reflect": lambda: conv(padding_mode="reflect"),
    "group": lambda: conv(groups=4),
    "norm": norm,
    "plain": lambda: norm(affine=False),
    "pad": lambda: nn.ReflectionPad2d(1),
    "up": lambda: nn.Upsample(scale_factor=2),
    "relu": lambda: nn.ReLU(True),
    "leaky": lambda: nn.LeakyReLU(0.2, True),
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "identity": nn.Identity,
    "dropout": lambda: nn.Dropout(0.3),
}
JOINS = ("none", "add", "iadd", "add_first", "iadd_first", "view", "write")


class Random(nn.Module):
    """Pieces one after the other; some are joined with a value from before, some write to one."""

    def __init__(self, plan: list[tuple[str, str, int]]) -> None:
        super().__init__()
        self.pieces = nn.ModuleList([PIECES[name]() for name, _, _ in plan])
        self.joins = [(join, back) for _, join, back in plan]

    def forward(self, x: Tensor) -> Tensor:
        values = [x * 1]
        for piece, (join, back) in zip(self.pieces, self.joins, strict=True):
            old = values[max(0, len(values) - back)]
            y = piece(values[-1])
            if join == "add":
                y = y + old
            elif join == "add_first":
                y = old + y
            elif join == "iadd" and not isinstance(piece, nn.Identity):
                y += old
            elif join == "iadd_first":
                old += y
                y = old
            elif join == "view":
                y = y.view(y.shape)
            elif join == "write":
                old.mul_(0.5)
            values.append(y)
        return values[-1] + values[len(values) // 2].mean()


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(PIECES)), st.sampled_from(JOINS), st.integers(1, 4)),
        min_size=2,
        max_size=9,
    ),
    st.booleans(),
)
def test_random_networks(plan: list[tuple[str, str, int]], training: bool) -> None:
    torch.manual_seed(0)
    net = Random(plan).double().train(training)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        try:
            torch.manual_seed(1)
            theirs = net(x.clone())
        except (RuntimeError, ValueError):  # sizes that do not fit
            return
        fused = styleforge.fuse(net)
        torch.manual_seed(1)
        ours = fused(x.clone())
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("functional", [False, True])
def test_a_norm_takes_the_bias_of_a_transposed_convolution_out(functional: bool) -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.ConvTranspose2d(4, 6, 3, 2, 1, 1)
            self.norm = nn.InstanceNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            if functional:
                y = F.conv_transpose2d(
                    x, self.conv.weight, self.conv.bias, 2, padding=1, output_padding=(1, 1)
                )
            else:
                y = self.conv(x)
            return F.relu(self.norm(y))

    model = Up().eval()
    fused = styleforge.fuse(model)
    x = torch.randn(2, 4, 9, 11)
    with torch.no_grad(), Biases() as seen:
        torch.testing.assert_close(fused(x), model(x))
    assert seen.given == [False, True]
    with Biases() as seen:
        fused(x).square().sum().backward()
    assert seen.given == [True] and model.conv.bias is not None
    assert model.conv.bias.grad is not None and model.conv.bias.grad.abs().max() < 1e-4
    with torch.no_grad():
        script = torch.jit.script(styleforge.fuse(model))
        torch.testing.assert_close(script(x), model(x))


def test_a_bias_that_is_read_elsewhere_stays() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.ConvTranspose2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return F.instance_norm(y) + y

    model = Both().eval()
    x = torch.randn(1, 4, 6, 6)
    with torch.no_grad(), Biases() as seen:
        torch.testing.assert_close(styleforge.fuse(model)(x), model(x))
    assert seen.given == [True, True]


class Biases(TorchFunctionMode):
    """Whether each transposed convolution had a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.conv_transpose2d, torch.conv_transpose2d):
            bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            self.given.append(bias is not None)
        return func(*args, **(kwargs or {}))
