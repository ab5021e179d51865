"""``styleforge.jit.fuse_script``: saved TorchScript models, scripted and traced."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import styleforge
from _models import MODELS, ConvDropoutNormNonlin
from _reference import DEVICES, assert_as_accurate
from test_fuse import OPERATORS, Calls, converted, exact_floats

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
CONV, NORM, FFN = OPERATORS[:3]

# Not scripted: two_streams (a list and a tensor under one name), functional (integer scale factor).
# PyTorch's own transformer layers are one call in inference, which stays.
SCRIPTED = ["transformer_net", "cyclegan_reflect", "cyclegan_zeros", "unet_stage", "vit"]
TRACED = [
    "transformer_net",
    "cyclegan_reflect",
    "cyclegan_zeros",
    "two_streams",
    "unet_stage",
    "vit",
    "functional",
]
WAYS = [("script", name) for name in SCRIPTED] + [("trace", name) for name in TRACED]


def saved(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


def scripted(how: str, model: nn.Module, inputs: Sequence[Tensor]) -> torch.jit.ScriptModule:
    """As a file that somebody saved."""
    with torch.no_grad():
        made = (
            torch.jit.script(model)
            if how == "script"
            else torch.jit.trace(model, tuple(inputs), check_trace=False)
        )
    return saved(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("how", "name"), WAYS)
def test_equal_complete_and_saved_again(how: str, name: str, device: str, dtype: torch.dtype) -> None:
    case = MODELS[name]
    model = case.build().eval().to(device, dtype)
    inputs = converted(case.inputs(25), dtype, device)
    original = scripted(how, model, inputs)
    with exact_floats():
        fused = styleforge.jit.fuse_script(original)  # keeps the precision of now
    report = fused.styleforge_report
    found = {op: report.count(op) for op in (CONV, NORM, FFN)}
    assert found == {CONV: case.conv, NORM: case.norm, FFN: case.ffn}, report
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in model.named_parameters()]
    again = saved(fused)
    with torch.no_grad(), exact_floats():
        exact = copy.deepcopy(model).double()(*converted(inputs, torch.float64, device))
        for _ in range(3):  # TorchScript optimises after the first calls
            result = again(*inputs)
        assert_as_accurate(result, model(*inputs), exact, factor=2.0, ulps=2.0)
        with Calls() as calls:
            again(*inputs)
    assert {op: calls.count[op] for op in (CONV, NORM, FFN)} == found
    assert not {"instance_norm", "native_batch_norm"} & set(calls.count)


def test_other_sizes_and_fused_parameters() -> None:
    model = MODELS["cyclegan_reflect"].build().eval()
    original = scripted("script", model, ())
    fused = styleforge.jit.fuse_script(original)
    for size in (24, 41):
        (x,) = MODELS["cyclegan_reflect"].inputs(size)
        torch.testing.assert_close(fused(x), original(x), rtol=1e-4, atol=1e-5)
    assert next(fused.parameters()).data_ptr() == next(original.parameters()).data_ptr()
    wide = fused.double()
    assert wide(x.double()).dtype == torch.float64


def test_the_original_is_as_before() -> None:
    original = scripted("script", MODELS["unet_stage"].build().eval(), ())
    before = str(original.inlined_graph)
    styleforge.jit.fuse_script(original)
    assert str(original.inlined_graph) == before


def test_a_frozen_model() -> None:
    model = MODELS["unet_stage"].build().eval()
    (x,) = MODELS["unet_stage"].inputs(24)
    frozen = torch.jit.freeze(torch.jit.script(model))
    fused = styleforge.jit.fuse_script(saved(frozen))
    assert fused.styleforge_report.count(CONV) == 6
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


class Methods(nn.Module):
    """A model with more than a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = ConvDropoutNormNonlin(3, 4)
        self.head = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 2))

    @torch.jit.export
    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def test_further_methods() -> None:
    model = Methods().eval()
    x = torch.rand(2, 3, 8, 8)
    plain = styleforge.jit.fuse_script(torch.jit.script(model))
    assert not hasattr(plain, "features")
    fused = saved(styleforge.jit.fuse_script(torch.jit.script(model), preserved_attrs=["features"]))
    with torch.no_grad(), Calls() as calls:
        torch.testing.assert_close(fused.features(x), model.features(x))
        torch.testing.assert_close(fused(x), model(x))
    assert calls.count[CONV] == 2 and calls.count[FFN] == 1


class Graph(nn.Module):
    """One convolution, one norm and what a test does with them."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.c = nn.Conv2d(4, 4, 3, **{"padding": 1, **changes})
        self.n = nn.InstanceNorm2d(4, affine=True)


class Twice(Graph):
    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        return self.n(y) + y


class NormTwice(Graph):
    def forward(self, x: Tensor) -> Tensor:
        y = self.n(self.c(x))
        return F.relu(y) * y


class Written(Graph):
    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        x.mul_(2.0)
        return self.n(y) + x


class WrittenThroughAView(Graph):
    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        x[:, :2].relu_()
        return self.n(y)


class ShortcutWritten(Graph):
    def forward(self, x: Tensor) -> Tensor:
        x += self.n(self.c(x))
        return F.relu(x)


class Broadcast(Graph):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.n(self.c(x)) + x.mean(dim=(2, 3), keepdim=True), 0.2)


class InABranch(Graph):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            y = F.relu(self.n(self.c(x)))
        else:
            y = self.n(self.c(x)) + x
        for _ in range(2):  # TorchScript writes it out
            y = self.n(self.c(y)) + y
        return y


class Size(Graph):
    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        return self.n(y) * y.size(2)


CASES: list[tuple[Callable[[], nn.Module], dict[str, int], str]] = [
    (Twice, {NORM: 1}, "its output is used more than once"),
    (NormTwice, {CONV: 1}, ""),
    (Written, {NORM: 1}, "written to"),
    (WrittenThroughAView, {NORM: 1}, "written to"),
    (ShortcutWritten, {CONV: 1}, ""),
    (Broadcast, {CONV: 1}, ""),
    (InABranch, {CONV: 4}, ""),
    (Size, {NORM: 1}, "its output is used more than once"),
    (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.InstanceNorm2d(4)), {NORM: 1}, "groups=2"),
    (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, dilation=2), nn.InstanceNorm2d(4)), {NORM: 1}, "dilation="),
    (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True)),
        {},
        "statistics",
    ),
    (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.Dropout(0.5), nn.InstanceNorm2d(4)), {CONV: 1}, ""),
    (
        lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4)),
        {CONV: 1},
        "",
    ),
    (
        lambda: nn.Sequential(nn.ReplicationPad2d(2), nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4), nn.SiLU()),
        {CONV: 1},
        "",
    ),
    (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.InstanceNorm2d(4), nn.Tanh()),
        {NORM: 1},
        "ConvTranspose",
    ),
    (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), {}, ""),
    (lambda: nn.Sequential(nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 5), nn.Sigmoid()), {FFN: 1}, ""),
]


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_patterns(how: str, case: tuple[Callable[[], nn.Module], dict[str, int], str]) -> None:
    build, found, reason = case
    model = build().double().eval()
    if how == "trace" and isinstance(model, InABranch):
        pytest.skip("a trace has no branches")
    for sign in (1, -1):
        x = sign * torch.rand(2, 4, 9, 9, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            original = scripted(how, model, [x.clone()])
        fused = styleforge.jit.fuse_script(original)
        report = fused.styleforge_report
        if not (how == "trace" and isinstance(model, Size)):  # a traced size is a number
            assert {op: report.count(op) for op in (CONV, NORM, FFN) if report.count(op)} == found, report
            assert reason in str(report)
        for _ in range(3):
            torch.testing.assert_close(saved(fused)(x.clone()), model(x.clone()), rtol=1e-9, atol=1e-9)


def test_pictures_without_a_batch() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU()).eval()
    fused = styleforge.jit.fuse_script(torch.jit.script(model))
    assert fused.styleforge_report.count(NORM) == 1
    for shape in ((4, 9, 9), (2, 4, 9, 9)):
        x = torch.randn(shape)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def test_bad_arguments() -> None:
    with pytest.raises(
        TypeError, match=r"^fuse_script: module must be a ScriptModule, got ReLU; styleforge\.fuse"
    ):
        styleforge.jit.fuse_script(nn.ReLU())  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"^fuse_script: module is in training mode; call module\.eval\(\) first$"
    ):
        styleforge.jit.fuse_script(torch.jit.script(nn.ReLU()))


def test_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.jit.trace(MODELS["unet_stage"].build().eval(), torch.rand(1, 1, 16, 16))
    fused = styleforge.jit.fuse_script(model, verbose=True)
    printed = capsys.readouterr().out
    assert printed.strip() == str(fused.styleforge_report)
    assert "down1.0.conv (_convolution)" in printed and "tu (" in printed
