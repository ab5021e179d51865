"""``styleforge.fuse`` on whole networks: equal, complete, and of the model nothing changes but its speed."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import styleforge
from _models import MODELS, Case, CycleGANGenerator, FlowEncoder, Mlp, UNetStage, ViTBlock
from _reference import DEVICES, assert_as_accurate, tf32
from styleforge.fuse import FusionReport
from styleforge.models.torch_transformer_net import TorchTransformerNet

OPERATORS = ("fused_conv_instance_norm_relu", "fused_instance_norm", "fused_ffn", "fused_attention")


class Calls(TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count[func.name().split("::")[1].split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def expected(case: Case) -> dict[str, int]:
    return dict(zip(OPERATORS, (case.conv, case.norm, case.ffn, case.attention), strict=True))


def converted(values: Any, dtype: torch.dtype, device: str) -> list[Tensor]:
    return [v.to(device=device, dtype=dtype) for v in values]


@contextmanager
def exact_floats() -> Iterator[None]:
    """Both sides in float32 proper, and encoders by their layers.

    Without TF32, and without PyTorch's one kernel for an encoder layer: on CUDA it takes GELU by tanh where
    erf was asked for, and torch.compile of PyTorch 2.11 cannot trace it with dynamic shapes.
    """
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.mha.get_fastpath_enabled()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with tf32(False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before[0]
        torch.backends.mha.set_fastpath_enabled(before[1])


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_equal_within_rounding(name: str, device: str, dtype: torch.dtype) -> None:
    case = MODELS[name]
    model = case.build().eval().to(device=device, dtype=dtype)
    fused = styleforge.fuse(model)
    for size in (25, 40):
        inputs = converted(case.inputs(size), dtype, device)
        with torch.no_grad(), exact_floats():
            wide = copy.deepcopy(model).double()(*converted(inputs, torch.float64, device))
            assert_as_accurate(fused(*inputs), model(*inputs), wide, factor=2.0, ulps=2.0)


@pytest.mark.parametrize("name", MODELS)
def test_every_place_is_fused_and_runs(name: str) -> None:
    case = MODELS[name]
    fused = styleforge.fuse(case.build().eval())
    report: FusionReport = fused.styleforge_report
    assert {op: report.count(op) for op in OPERATORS} == expected(case)
    assert report.count("reflect_conv2d") == case.last
    with torch.no_grad(), Calls() as calls:
        fused(*case.inputs(24))
    assert {op: calls.count[op] for op in OPERATORS} == expected(case)
    assert not {"instance_norm", "native_batch_norm", "gelu", "silu"} & set(calls.count)
    text = str(report)
    for part, reason in case.left.items():
        assert any(part in str(entry) and reason in str(entry) for entry in report.not_fused), text
        assert part in text and reason in text
    assert all(entry.reason in case.left.values() or entry.kind == "Conv2d" for entry in report.not_fused), (
        text
    )


@pytest.mark.parametrize("name", MODELS)
def test_training_step_is_equal(name: str) -> None:
    case = MODELS[name]
    model = without_dropout(case.build()).double()
    inputs = converted(case.inputs(20), torch.float64, "cpu")
    fused = styleforge.fuse(model)
    with Calls() as calls:
        loss = fused(*inputs).square().mean()
    assert sum(calls.count[op] + calls.count[f"_{op}_forward"] for op in OPERATORS) > 0
    ours = torch.autograd.grad(loss, list(model.parameters()))
    theirs = torch.autograd.grad(model(*inputs).square().mean(), list(model.parameters()))
    largest = max(g.abs().max().item() for g in theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10 * largest)


def test_dropout_of_a_feed_forward_network_is_pytorchs() -> None:
    for module in (Mlp(8, 16, 0.3), ViTBlock(8, 2, 0.3), nn.TransformerEncoderLayer(8, 2, 16, 0.3)):
        x = torch.randn(3, 5, 8)
        fused = styleforge.fuse(module)
        torch.manual_seed(3)
        theirs = module(x)
        torch.manual_seed(3)
        torch.testing.assert_close(fused(x), theirs)
        assert not torch.equal(fused(x), theirs)  # it does drop
        fused.eval()
        module.eval()
        with torch.no_grad(), Calls() as calls:
            torch.testing.assert_close(fused(x), module(x))
        assert calls.count["fused_ffn"] == 1


def test_the_model_stays_what_it_is() -> None:
    model = TorchTransformerNet(4)
    model.eval()
    heard: list[str] = []
    model.res1.register_forward_hook(lambda *_: heard.append("block"))
    model.register_forward_pre_hook(lambda *_: heard.append("model"))
    fused = styleforge.fuse(model)
    assert type(model) is TorchTransformerNet and not hasattr(model, "styleforge_report")
    assert isinstance(fused, TorchTransformerNet) and not fused.training
    assert list(fused.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(fused.parameters(), model.parameters(), strict=True))
    x = torch.rand(1, 3, 16, 20)
    torch.testing.assert_close(fused(x), model(x))
    assert heard == ["model", "block"] * 2
    fused.load_state_dict(TorchTransformerNet(4).state_dict())  # written to shared parameters
    torch.testing.assert_close(fused(x), model(x))
    assert fused.double()(x.double()).dtype == torch.float64


def test_unfuse_and_inplace() -> None:
    model = CycleGANGenerator(4, 1).eval()
    before = [(path, type(module)) for path, module in model.named_modules()]
    assert styleforge.fuse(model, inplace=True) is model
    assert model.styleforge_report.count() == 8
    assert [type(m) for _, m in model.named_modules()] != [kind for _, kind in before]
    assert styleforge.unfuse(model) is model
    assert [(path, type(module)) for path, module in model.named_modules()] == before
    assert not hasattr(model, "styleforge_report")
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2)
    kinds = [type(m) for m in encoder.modules()]
    assert [type(m) for m in styleforge.unfuse(styleforge.fuse(encoder)).modules()] == kinds


def test_fusing_twice_changes_nothing() -> None:
    fused = styleforge.fuse(UNetStage(4).eval())
    again = styleforge.fuse(fused)
    x = torch.rand(1, 1, 16, 20)
    assert torch.equal(again(x), fused(x))
    assert type(styleforge.unfuse(again)) is UNetStage


@pytest.mark.parametrize("name", ["transformer_net", "unet_stage", "two_streams", "encoder_post_norm"])
def test_copies_and_pickles(name: str) -> None:
    case = MODELS[name]
    fused = styleforge.fuse(case.build().eval())
    inputs = case.inputs(24)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for other in (copy.deepcopy(fused), torch.load(file, weights_only=False)):
        assert type(other) is type(fused)
        assert next(other.parameters()) is not next(fused.parameters())
        with torch.no_grad(), Calls() as calls:
            assert torch.equal(other(*inputs), fused(*inputs))
        assert sum(calls.count[op] for op in OPERATORS) == 2 * sum(expected(case).values())


@pytest.mark.parametrize("how", [torch.jit.script, "trace", "export"])
@pytest.mark.parametrize("name", ["transformer_net", "cyclegan_zeros", "unet_stage"])
def test_fused_models_go_on(name: str, how: Any) -> None:
    case = MODELS[name]
    fused = styleforge.fuse(case.build().eval())
    inputs = tuple(case.inputs(24))
    if how == "trace":
        other = torch.jit.trace(fused, inputs)
    elif how == "export":
        other = torch.export.export(fused, inputs).module()
    else:
        other = how(fused)
    with torch.no_grad(), Calls() as calls:
        torch.testing.assert_close(other(*inputs), fused(*inputs))
    assert sum(calls.count[op] for op in OPERATORS) == 2 * sum(expected(case).values())


@pytest.mark.parametrize("name", ["transformer_net", "two_streams", "encoder", "vit"])
def test_export_with_dynamic_sizes(name: str) -> None:
    case = MODELS[name]
    fused = styleforge.fuse(case.build().eval())

    def batch(size: int, samples: int) -> tuple[Tensor, ...]:
        return tuple(x[:1].repeat(samples, *[1] * (x.dim() - 1)) for x in case.inputs(size))

    auto = torch.export.Dim.AUTO
    inputs = batch(40, 2)
    sizes = tuple({0: auto, **({1: auto} if x.dim() == 3 else {2: auto, 3: auto})} for x in inputs)
    program = torch.export.export(fused, inputs, dynamic_shapes=sizes).module()
    for size, samples in ((24, 3), (64, 2)):
        others = batch(size, samples)
        with torch.no_grad():
            torch.testing.assert_close(program(*others), fused(*others))


def test_lists_and_tensors_take_the_same_encoder() -> None:
    model = FlowEncoder(4, 8, dropout=0.5).eval()
    fused = styleforge.fuse(model)
    x, y = torch.rand(2, 1, 3, 24, 32)
    for argument in (x, [x, y], (x, y)):
        with torch.no_grad(), Calls() as calls:
            ours = fused(argument)
        assert calls.count["fused_conv_instance_norm_relu"] == 15
        torch.testing.assert_close(ours, model(argument))
    torch.manual_seed(0)
    ours = fused.train()(x)
    torch.manual_seed(0)
    torch.testing.assert_close(ours, model.train()(x))


def test_verbose_prints_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    fused = styleforge.fuse(UNetStage(4), verbose=True)
    printed = capsys.readouterr().out
    assert printed.strip() == str(fused.styleforge_report)
    assert "down1.0.conv > down1.0.instnorm > down1.0.lrelu: fused_conv_instance_norm_relu" in printed
    assert "seg (Conv2d): no InstanceNorm2d after it" in printed
    assert "fused=1" in repr(fused)


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"^fuse: model must be an nn\.Module, got function$"):
        styleforge.fuse(lambda x: x)  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"^fuse: model is a ScriptModule; use styleforge\.jit\.fuse_script"):
        styleforge.fuse(torch.jit.script(nn.ReLU()))
