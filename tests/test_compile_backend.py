"""``torch.compile(model, backend="styleforge")``: the same places fused in what Dynamo captures.

Inductor's C++ compiler takes long on the CPU: it runs for small networks, and where there is a GPU for all of
them. What is fused, graphs, recompilations and gradients are looked at in the graph before Inductor.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import styleforge
from _models import MODELS, Case
from _reference import assert_as_accurate
from styleforge.fuse import _attention, _calls, backend
from test_fuse import converted, exact_floats, without_dropout

REPOSITORY = Path(__file__).parents[1]
SIZES = (25, 28, 32, 40, 44)
FUNCTIONS = {
    _calls.conv_instance_norm: "conv",
    _calls.instance_norm: "norm",
    _calls.ffn: "ffn",
    _calls.reflect_conv: "last",
    _attention.self_attention: "attention",
    _attention.encoder_layer: "encoder_layer",
}


class Rewriting:
    """A backend that rewrites and then runs the graph with ``compile``; keeps the rewritten graphs."""

    def __init__(self, compile: Callable[..., Any] = lambda gm, inputs: gm) -> None:
        self.compile = compile
        self.graphs: list[Counter[str]] = []

    def __call__(self, gm: fx.GraphModule, inputs: Any) -> Any:
        count = backend.rewrite_captured(gm)
        found = Counter(FUNCTIONS[n.target] for n in gm.graph.nodes if n.target in FUNCTIONS)
        assert count == sum(found.values())
        self.graphs.append(found)
        return self.compile(gm, inputs)


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()


def expected(case: Case, training: bool) -> dict[str, int]:
    """In inference, Dynamo captures PyTorch's transformer layers as one call each."""
    layers = case.ffn if case.ffn and not case.conv and not training and "patches" not in case.left else 0
    counts = {"conv": case.conv, "norm": case.norm, "encoder_layer": layers}
    counts |= {"last": case.last, "ffn": case.ffn - layers, "attention": 0 if layers else case.attention}
    return {key: value for key, value in counts.items() if value}


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_for_all_sizes(name: str) -> None:
    case = MODELS[name]
    model = case.build().eval()
    rewriting = Rewriting()
    compiled = torch.compile(model, backend=rewriting, fullgraph=True, dynamic=True)
    for size in SIZES:
        inputs = case.inputs(size)
        with torch.no_grad():
            wide = case.build().double()
            wide.load_state_dict(model.state_dict())
            exact = wide.eval()(*converted(inputs, torch.float64, "cpu"))
            assert_as_accurate(compiled(*inputs), model(*inputs), exact, factor=2.0, ulps=2.0)
    assert rewriting.graphs == [expected(case, training=False)]


@pytest.mark.parametrize("name", MODELS)
def test_training_step_is_equal(name: str) -> None:
    from torch._dynamo.backends.debugging import aot_eager

    case = MODELS[name]
    model = without_dropout(case.build()).double()
    inputs = converted(case.inputs(20), torch.float64, "cpu")
    rewriting = Rewriting(aot_eager)
    compiled = torch.compile(model, backend=rewriting, fullgraph=True)
    ours = torch.autograd.grad(compiled(*inputs).square().mean(), list(model.parameters()))
    theirs = torch.autograd.grad(model(*inputs).square().mean(), list(model.parameters()))
    assert rewriting.graphs == [expected(case, training=True)]
    largest = max(g.abs().max().item() for g in theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10 * largest)


@pytest.mark.parametrize("name", ["unet_stage", "encoder_post_norm"])
def test_inductor_compiles_the_rest(name: str) -> None:
    case = MODELS[name]
    model = case.build().eval()
    compiled = torch.compile(model, backend="styleforge", fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for size in SIZES:
        inputs = case.inputs(size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_training_with_inductor() -> None:
    model = MODELS["functional"].build()
    (x,) = MODELS["functional"].inputs(16)
    compiled = torch.compile(model, backend="styleforge", fullgraph=True)
    ours = torch.autograd.grad(compiled(x).square().mean(), list(model.parameters()))
    theirs = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


def test_mode_and_options_reach_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(gm: Any, inputs: Any, config_patches: dict[str, Any] | None = None, **_: Any) -> Any:
        seen.append(config_patches or {})
        return gm

    seen: list[dict[str, Any]] = []
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", refuse)
    x = torch.ones(2)
    for given in ({}, {"mode": "reduce-overhead"}, {"options": {"max_autotune": True}}):
        torch._dynamo.reset()
        torch.compile(lambda x: x + 1, backend="styleforge", **given)(x)
    assert "triton.cudagraphs" not in seen[0] and "max_autotune" not in seen[0]
    assert seen[1]["triton.cudagraphs"] is True
    assert seen[2]["max_autotune"] is True
    torch._dynamo.reset()
    with pytest.raises(Exception, match="no_such_option"):
        torch.compile(lambda x: x + 1, backend="styleforge", options={"no_such_option": 1})(x)


@pytest.mark.parametrize("inline", [True, False])
def test_layers_as_calls_or_as_modules(inline: bool) -> None:
    """With ``inline_inbuilt_nn_modules`` off, Dynamo's graphs call modules."""
    model = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.ReLU(True))
    rewriting = Rewriting()
    x = torch.rand(1, 3, 8, 8)
    with torch._dynamo.config.patch(inline_inbuilt_nn_modules=inline), torch.no_grad():
        compiled = torch.compile(model, backend=rewriting, fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))
    assert rewriting.graphs == [{"conv": 1}]


def test_what_cannot_be_proven_is_left() -> None:
    weight = torch.randn(4, 4, 3, 3)

    def written(x: Tensor) -> Tensor:
        y = F.conv2d(x, weight, padding=1)
        x.mul_(2)
        return F.instance_norm(y) + x

    def cast(x: Tensor) -> Tensor:
        y = F.conv2d(x, weight, padding=1)
        with torch.autocast("cpu", torch.bfloat16):
            y = F.instance_norm(y) + F.conv2d(x, weight, padding=1)
        return y

    def statistics(x: Tensor) -> Tensor:
        return F.instance_norm(F.conv2d(x, weight), torch.zeros(4), torch.ones(4), use_input_stats=False)

    for function, found in ((written, {"norm": 1}), (cast, {"norm": 1}), (statistics, {})):
        torch._dynamo.reset()
        rewriting = Rewriting()
        x = torch.randn(2, 4, 6, 6)
        ours = torch.compile(function, backend=rewriting, fullgraph=True)(x.clone())
        torch.testing.assert_close(ours, function(x.clone()))
        assert rewriting.graphs == [found], function


def test_autocast_and_checkpoints() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.ReLU())
    x = torch.rand(1, 3, 8, 8)

    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    rewriting = Rewriting()
    torch.testing.assert_close(torch.compile(step, backend=rewriting)(x), step(x), rtol=0.05, atol=0.05)
    assert rewriting.graphs == [{"conv": 1}]

    def checkpointed(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    torch._dynamo.reset()
    counts: list[int] = []

    def count(gm: fx.GraphModule, inputs: Any) -> Any:
        counts.append(backend.rewrite_captured(gm))
        return gm

    torch.testing.assert_close(torch.compile(checkpointed, backend=count, fullgraph=True)(x), model(x))
    assert counts == [1]


def test_fused_models_compile_with_any_backend() -> None:
    for name in ("transformer_net", "two_streams", "encoder_post_norm"):
        torch._dynamo.reset()
        case = MODELS[name]
        fused = styleforge.fuse(case.build().eval())
        compiled = torch.compile(fused, backend="eager", fullgraph=True, dynamic=True)
        torch._dynamo.utils.counters.clear()
        for size in SIZES:
            inputs = case.inputs(size)
            with torch.no_grad():
                torch.testing.assert_close(compiled(*inputs), fused(*inputs))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def _run(code: str, path: str) -> str:
    package = Path(styleforge.__path__[0]).parent  # of the checkout, or installed
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([path, str(package)])}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


USE = """
import torch, sys
{first}
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.InstanceNorm2d(4)).eval()
assert "torch._dynamo" not in sys.modules
assert "styleforge" in torch._dynamo.list_backends()
from torch._dynamo.backends.registry import lookup_backend
print(lookup_backend("styleforge").__module__)
"""


def test_the_entry_point_needs_no_import(tmp_path: Path) -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    entries = project["entry-points"]["torch_dynamo_backends"]
    folder = tmp_path / "styleforge-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: styleforge\nVersion: 0\n")
    lines = "\n".join(f"{name} = {value}" for name, value in entries.items())
    (folder / "entry_points.txt").write_text(f"[torch_dynamo_backends]\n{lines}\n")
    assert _run(USE.format(first=""), str(tmp_path)) == "styleforge.fuse.backend"


def test_an_import_registers_it_without_loading_dynamo(tmp_path: Path) -> None:
    assert _run(USE.format(first="import styleforge"), str(tmp_path)) == "styleforge.fuse.backend"


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_on_the_gpu(name: str, dtype: torch.dtype) -> None:
    case = MODELS[name]
    model = case.build().eval().to("cuda", dtype)
    compiled = torch.compile(model, backend="styleforge", fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for size in SIZES:
        inputs = converted(case.inputs(size), dtype, "cuda")
        with torch.no_grad(), exact_floats():
            wide = case.build().eval().to("cuda", torch.float64)
            wide.load_state_dict(model.state_dict())
            exact = wide(*converted(inputs, torch.float64, "cuda"))
            assert_as_accurate(compiled(*inputs), model(*inputs), exact, factor=2.0, ulps=2.0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.cuda
def test_cuda_graphs() -> None:
    case = MODELS["transformer_net"]
    model = case.build().eval().to("cuda", torch.float16)
    compiled = torch.compile(model, backend="styleforge", mode="reduce-overhead", fullgraph=True)
    (x,) = converted(case.inputs(32), torch.float16, "cuda")
    with torch.no_grad():
        for _ in range(4):
            torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=2e-2)
