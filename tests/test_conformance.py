"""The conformance matrix: every operator by every way in. Its outcome is the README's support table.

A cell compares with the operator's formula in float64, at sizes other than those that a program was made with
where the way allows it. What a way needs beyond that is in the tests named after it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import _conformance
import _cpp
import _onnx
import styleforge
from _operators import MODULES, PLAIN
from _reference import max_error, tensor, tf32

OPERATORS = list(MODULES)
SIZES = ((2, 4, 8, 6), (1, 4, 12, 9), (3, 4, 5, 16))

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(torch.jit|legacy TorchScript|LeafSpec).*"),
    pytest.mark.filterwarnings("ignore:.*(Constant folding|dynamic axes|feature will be removed).*"),
]


@dataclass
class Cell:
    """One operator on one device, and what a way may use."""

    operator: str
    device: str
    folder: Path
    request: pytest.FixtureRequest

    def module(self) -> Any:
        """The operator between others, with the same parameters each time."""
        torch.manual_seed(0)
        return Between(MODULES[self.operator]()).to(self.device)

    def input(self, *sizes: int, layout: str = "contiguous") -> Tensor:
        return tensor(*sizes, device=self.device, layout=layout)

    def compare(
        self, function: Callable[[Tensor], Tensor], module: Any, sizes: Any = SIZES, tolerance: float = 2e-5
    ) -> None:
        """Without gradients, in both memory formats."""
        with torch.no_grad():
            for layout in ("contiguous", "channels_last"):
                for shape in sizes:
                    x = self.input(*shape, layout=layout)
                    for _ in range(2):  # TorchScript changes the graph after the first calls
                        result = function(x)
                        expected = module.reference(x).cpu()
                        assert result.shape == expected.shape
                        assert max_error(result.cpu(), expected) < tolerance


class Between(nn.Module):
    """An operator between others, so that the strides that a compiler expects of it matter."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * 0.5) + 1

    @torch.jit.unused
    def reference(self, x: Tensor) -> Tensor:
        inner: Any = self.inner
        return inner.reference(x.double() * 0.5) + 1


def _dynamic() -> tuple[dict[int, Any]]:
    return ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)


# --- inference ------------------------------------------------------------------------------------


def eager(cell: Cell) -> None:
    module = cell.module()
    cell.compare(module, module)
    with torch.inference_mode():
        assert module(cell.input(*SIZES[0])).is_inference()


def _saved_and_loaded(cell: Cell, compiled: Any) -> Any:
    path = cell.folder / "module.pt"
    compiled.save(path)
    loaded = torch.jit.load(path)
    assert f"styleforge::{cell.operator}(" in str(loaded.inlined_graph)
    return loaded


def script(cell: Cell) -> None:
    module = cell.module().eval()
    cell.compare(_saved_and_loaded(cell, torch.jit.script(module)), module)


def trace(cell: Cell) -> None:
    module = cell.module().eval()
    cell.compare(_saved_and_loaded(cell, torch.jit.trace(module, cell.input(*SIZES[0]))), module)


def freeze(cell: Cell) -> None:
    module = cell.module().eval()
    cell.compare(_saved_and_loaded(cell, torch.jit.freeze(torch.jit.script(module))), module)


def script_in_cpp(cell: Cell) -> None:
    programs = cell.request.getfixturevalue("programs")
    module = cell.module().eval().requires_grad_(False)
    _saved_and_loaded(cell, torch.jit.script(module))

    def function(x: Tensor) -> Tensor:
        path = cell.folder / "module.pt"
        return _cpp.output(programs / "examples" / "run_torchscript", path, x.cpu(), cell.device)

    cell.compare(function, module, SIZES[1:2])


def compile_static(cell: Cell) -> None:
    module = cell.module()
    cell.compare(torch.compile(module, fullgraph=True, dynamic=False), module, SIZES[:1])


def compile_dynamic(cell: Cell) -> None:
    module = cell.module()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for sizes in (*SIZES[::2], (5, 4, 16, 31), (2, 4, 5, 40)):
            x = cell.input(*sizes)
            assert max_error(compiled(x).cpu(), module.reference(x).cpu()) < 2e-5
    assert counter.frame_count == 1


def compile_reduce_overhead(cell: Cell) -> None:
    module = cell.module()
    compiled = torch.compile(module, fullgraph=True, mode="reduce-overhead")

    def function(x: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(x).clone()

    for _ in range(3):  # warm-up, capture, replay
        cell.compare(function, module, SIZES[:1])


def _exported(cell: Cell, module: nn.Module) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module, (cell.input(*SIZES[0]),), dynamic_shapes=_dynamic())


def export(cell: Cell) -> None:
    module = cell.module().eval()
    torch.export.save(_exported(cell, module), cell.folder / "module.pt2")
    cell.compare(torch.export.load(cell.folder / "module.pt2").module(), module)


def _package(cell: Cell, module: nn.Module) -> Path:
    """Of the operator; made once for Python and C++, also where several workers test."""
    folder: Path = cell.request.getfixturevalue("shared_folder")
    path = folder / f"{cell.device}-{cell.operator}.pt2"
    with filelock.FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            with torch.no_grad():
                made = cell.folder / path.name
                torch._inductor.aoti_compile_and_package(_exported(cell, module), package_path=str(made))
            made.rename(path)
    return path


def aoti(cell: Cell) -> None:
    module = cell.module().eval()
    loaded = torch._inductor.aoti_load_package(str(_package(cell, module)))
    with torch.no_grad():
        for sizes in SIZES:
            x = cell.input(*sizes)
            assert max_error(loaded(x).cpu(), module.reference(x).cpu()) < 2e-5


def aoti_in_cpp(cell: Cell) -> None:
    programs = cell.request.getfixturevalue("programs")
    module = cell.module().eval()
    path = cell.folder / "package.pt2"
    path.symlink_to(_package(cell, module))
    with torch.no_grad():
        for sizes in SIZES:
            x = cell.input(*sizes)
            arguments = (x.cpu(), cell.device, _cpp.library_folder())
            result = _cpp.output(programs / "examples" / "run_aoti", path, *arguments)
            assert max_error(result, module.reference(x).cpu()) < 2e-5


def onnx(cell: Cell) -> None:
    _onnx.needs_onnx()
    module = cell.module().eval()
    path = cell.folder / "module.onnx"
    styleforge.onnx.export(module, (cell.input(*SIZES[0]),), path, dynamic_shapes=_dynamic())
    _onnx.load(path)
    cell.compare(lambda x: _onnx.run(path, x.cpu()), module)


def onnx_of_torchscript(cell: Cell) -> None:
    _onnx.needs_onnx()
    module = cell.module().eval()
    path = cell.folder / "module.onnx"
    styleforge.onnx.register_symbolics()
    axes = {"x": {0: "batch", 2: "height", 3: "width"}}
    names = {"input_names": ["x"], "dynamic_axes": axes}
    x = cell.input(*SIZES[0])
    torch.onnx.export(module, (x,), str(path), dynamo=False, opset_version=17, **names)
    _onnx.load(path)
    cell.compare(lambda x: _onnx.run(path, x.cpu()), module)


# --- the same sites in plain PyTorch ----------------------------------------------------------------


def _plain(cell: Cell) -> Any:
    module = PLAIN[cell.operator]().to(cell.device).eval()
    double = PLAIN[cell.operator]().to(cell.device).eval().double()
    double.load_state_dict(module.state_dict())
    module.reference = lambda x: double(x.double())
    return module


def _calls(function: Callable[[Tensor], Tensor], x: Tensor) -> set[str]:
    with torch.no_grad(), torch.profiler.profile() as profile:
        function(x)
    return {event.key for event in profile.key_averages()}


def fuse(cell: Cell) -> None:
    module = _plain(cell)
    fused = styleforge.fuse(module)
    assert f"styleforge::{cell.operator}" in _calls(fused, cell.input(*SIZES[0]))
    cell.compare(fused, module)


def backend(cell: Cell) -> None:
    module = _plain(cell)
    compiled = torch.compile(module, backend="styleforge", fullgraph=True, dynamic=True)
    assert f"styleforge::{cell.operator}" in _calls(compiled, cell.input(*SIZES[0]))
    cell.compare(compiled, module)


# --- training -------------------------------------------------------------------------------------


def _train(cell: Cell, step: Callable[[nn.Module, Tensor, Tensor], Tensor], all_sizes: Any = SIZES) -> None:
    """Steps of a compiled or scripted training loop against the eager one: losses, gradients, parameters."""
    eager, other = cell.module(), cell.module()
    other.load_state_dict(eager.state_dict())
    batches = [(cell.input(*sizes), cell.input(*sizes)) for sizes in all_sizes]
    kept: list[list[Tensor]] = [[], []]
    for module, function, values in ((eager, _step, kept[0]), (other, step, kept[1])):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for x, target in batches:
            x = x.clone().requires_grad_()
            loss = function(module, x, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert x.grad is not None
            values += [loss.detach(), x.grad]
        values += [parameter.detach() for parameter in module.parameters()]
    for ours, expected in zip(kept[1], kept[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def _step(module: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(module(x), target)


def train(cell: Cell) -> None:
    """The eager gradients, against those of the formula in float64."""
    module = cell.module()
    for sizes in SIZES:
        x = cell.input(*sizes).requires_grad_()
        inputs = (x, *module.parameters())
        weights = torch.randn_like(x)
        ours = torch.autograd.grad((module(x) * weights).sum(), inputs, allow_unused=True)
        expected = torch.autograd.grad((module.reference(x) * weights).sum(), inputs, allow_unused=True)
        for a, b in zip(ours, expected, strict=True):
            b = torch.zeros_like(a) if b is None else b  # a bias that the norm cancels
            torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-4)


def train_script(cell: Cell) -> None:
    scripted: dict[nn.Module, Any] = {}

    def step(module: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        compiled = scripted.setdefault(module, None) or torch.jit.script(module)
        scripted[module] = compiled
        return F.mse_loss(compiled(x), target)

    _train(cell, step)


def train_compiled(cell: Cell) -> None:
    _train(cell, torch.compile(_step, fullgraph=True, dynamic=False), SIZES[:1] * 2)


def train_compiled_dynamic(cell: Cell) -> None:
    _train(cell, torch.compile(_step, fullgraph=True, dynamic=True), SIZES[::2])


# --- the matrix -----------------------------------------------------------------------------------

WAYS: dict[str, Callable[[Cell], None]] = {
    "eager": eager,
    "TorchScript: script": script,
    "TorchScript: trace": trace,
    "TorchScript: freeze": freeze,
    "TorchScript in C++": script_in_cpp,
    "`torch.compile`, static": compile_static,
    "`torch.compile`, dynamic": compile_dynamic,
    "`torch.compile`, reduce-overhead": compile_reduce_overhead,
    "`torch.export`, dynamic": export,
    "AOTInductor, dynamic": aoti,
    "AOTInductor, dynamic, in C++": aoti_in_cpp,
    "ONNX, dynamic": onnx,
    "ONNX by the older exporter": onnx_of_torchscript,
    "`styleforge.fuse`": fuse,
    '`backend="styleforge"`, dynamic': backend,
    "training: eager": train,
    "training: TorchScript": train_script,
    "training: `torch.compile`, static": train_compiled,
    "training: `torch.compile`, dynamic": train_compiled_dynamic,
}
if importlib.util.find_spec("styleforge.fuse") is None:
    WAYS = {name: way for name, way in WAYS.items() if way not in (fuse, backend)}


def _applies(device: str, operator: str, way: str) -> bool:
    if WAYS[way] is compile_reduce_overhead:
        return device == "cuda"  # it is about CUDA graphs
    if WAYS[way] in (fuse, backend):
        return operator in PLAIN  # the other versions of attention are the user's choice alone
    return True


CELLS = [
    pytest.param(device, operator, way, marks=[pytest.mark.cuda] if device == "cuda" else [])
    for device in ("cpu", "cuda")
    for operator in OPERATORS
    for way in WAYS
    if _applies(device, operator, way)
]


@pytest.mark.parametrize(("device", "operator", "way"), CELLS)
def test_conformance(
    device: str, operator: str, way: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    torch._dynamo.reset()
    with tf32(False):
        WAYS[way](Cell(operator, device, tmp_path, request))
    _conformance.record(device, operator, way)


def test_the_table_in_the_readme_is_the_outcome() -> None:
    """Stale where an operator, a way or the kept outcome has changed; `make support-table` writes it anew."""
    kept = _conformance.load()
    declared = {(operator, way) for operator in OPERATORS for way in WAYS if _applies("cpu", operator, way)}
    passed = {(operator, way) for operator, ways in kept["cpu"]["passed"].items() for way in ways}
    assert passed == declared, "run make support-table"
    expected = _conformance.render(kept, OPERATORS, list(WAYS))
    assert _conformance.table_in(_conformance.README.read_text()) == expected, "run make support-table"
