"""Who is measured: styleforge, and what else can run the plain layers on this machine."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from styleforge.bench.cases import Case
from styleforge.graphs import capture

OURS = "styleforge"
OTHERS = ("eager", "compile", "cudagraph", "onnxruntime", "jax")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Unavailable(Exception):
    """A contender cannot take part; the message says why."""


@dataclass
class Problem:
    """A case on a device: modules and inputs in one memory format.

    Attributes:
        plain: PyTorch's layers; ours: the fused module with the same parameters.
        inputs: equal in shape, different in memory (rotating over them keeps the L2 cache cold).
        grad: gradient of the output, or None for inference.
        precision: "ieee" or "tf32", what float32 products and convolutions may do on the GPU.
        autocast: dtype that ``torch.autocast`` runs the layers in, or None for that of the parameters.
    """

    case: Case
    plain: nn.Module
    ours: nn.Module
    inputs: list[Tensor]
    grad: Tensor | None
    precision: str = "ieee"
    memory_format: str = "contiguous"
    autocast: torch.dtype | None = None

    def in_format(self, name: str) -> Problem:
        """A copy in a memory format; modules of other than pictures have only the contiguous one."""
        memory_format = FORMATS[name]
        plain, ours = copy.deepcopy(self.plain), copy.deepcopy(self.ours)
        for module in (plain, ours):
            module.to(memory_format=memory_format)  # type: ignore[call-overload]  # in place
        inputs = [x.detach().contiguous(memory_format=memory_format) for x in self.inputs]
        grad = None if self.grad is None else self.grad.contiguous(memory_format=memory_format)
        return Problem(self.case, plain, ours, inputs, grad, self.precision, name, self.autocast)


@dataclass
class Contender:
    """Something that runs a problem.

    Attributes:
        calls: one for each input; each returns its result, which ``outputs`` turns into tensors.
        capturable: whether a call can be captured in a CUDA graph.
        synchronous: whether a call returns only when its work is done.
    """

    name: str
    memory_format: str
    calls: list[Callable[[], Any]]
    outputs: Callable[[Any], list[Tensor]] = field(default=lambda result: as_list(result))
    capturable: bool = True
    synchronous: bool = False


def as_list(result: Any) -> list[Tensor]:
    """A result, or the gradients of a step, as a list of tensors."""
    return [result] if isinstance(result, Tensor) else list(result)


def step(
    module: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor, grad: Tensor
) -> list[Tensor]:
    """Forward and backward: gradients of the input and of each parameter (zeros where it has none)."""
    wanted = [x, *parameters]
    found = torch.autograd.grad(module(x), wanted, grad, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]


def module_calls(
    module: Callable[[Tensor], Tensor], parameters: list[Tensor], problem: Problem
) -> list[Callable[[], Any]]:
    """Calls of a module: inference, or a training step where the problem has a gradient."""
    if problem.autocast is not None:
        module = partial(_autocast, problem.autocast, module)
    if problem.grad is None:
        return [partial(module, x) for x in problem.inputs]
    leaves = [x.detach().requires_grad_() for x in problem.inputs]
    return [partial(step, module, parameters, leaf, problem.grad) for leaf in leaves]


def _autocast(dtype: torch.dtype, module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, dtype):
        return module(x)


def build(name: str, problem: Problem) -> Contender:
    """Makes a contender.

    Raises:
        Unavailable: it is not installed, or cannot run this.
    """
    makers = {
        OURS: _ours,
        "eager": _eager,
        "compile": _compile,
        "cudagraph": _cudagraph,
        "onnxruntime": _onnxruntime,
        "jax": _jax,
    }
    return makers[name](problem)


def _ours(problem: Problem) -> Contender:
    calls = module_calls(problem.ours, list(problem.ours.parameters()), problem)
    return Contender(OURS, problem.memory_format, calls)


def _eager(problem: Problem) -> Contender:
    calls = module_calls(problem.plain, list(problem.plain.parameters()), problem)
    return Contender("eager", problem.memory_format, calls)


def keep_all_compiled() -> None:
    """Lets torch.compile hold what it made of many modules with the same code, as many cases have."""
    config: Any = torch._dynamo.config
    config.recompile_limit = config.accumulated_recompile_limit = 4096


def _compile(problem: Problem) -> Contender:
    # Sizes that an earlier case has changed would count as dynamic, and give slower code.
    compiled = torch.compile(problem.plain, fullgraph=True, dynamic=False)
    calls = module_calls(compiled, list(problem.plain.parameters()), problem)
    return Contender("compile", problem.memory_format, calls)


def _cudagraph(problem: Problem) -> Contender:
    """Eager PyTorch captured once: a call copies the input to where the graph reads it, and replays."""
    if problem.inputs[0].device.type != "cuda":
        raise Unavailable("needs a CUDA device")
    static = problem.inputs[0].clone()
    one = Problem(
        problem.case, problem.plain, problem.ours, [static], problem.grad, autocast=problem.autocast
    )
    (call,) = module_calls(problem.plain, list(problem.plain.parameters()), one)
    graph, result = capture(call)

    def replay(x: Tensor) -> Any:
        with torch.no_grad():
            static.copy_(x)
        graph.replay()
        return result

    calls: list[Callable[[], Any]] = [partial(replay, x) for x in problem.inputs]
    return Contender(
        "cudagraph",
        problem.memory_format,
        calls,
        outputs=lambda value: [t.clone() for t in as_list(value)],
        capturable=False,
    )


def _forward_only(problem: Problem, name: str) -> None:
    if problem.grad is not None:
        raise Unavailable("measured in inference only")
    if problem.memory_format != "contiguous":
        raise Unavailable("has its own layouts")


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"not installed (pip install {name})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's log lines are about its own workings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _onnxruntime(problem: Problem) -> Contender:
    """The plain layers as ONNX, on the device of the input; results are bound to the device's memory."""
    _forward_only(problem, "onnxruntime")
    runtime = _import("onnxruntime")
    _import("onnxscript")
    first = problem.inputs[0]
    cuda = first.device.type == "cuda"
    provider = "CUDAExecutionProvider" if cuda else "CPUExecutionProvider"
    if provider not in runtime.get_available_providers():
        raise Unavailable(f"the installed onnxruntime has no {provider} (pip install onnxruntime-gpu)")
    if first.dtype == torch.bfloat16:
        raise Unavailable("NumPy, through which it takes its tensors, has no bfloat16")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    settings: Any = provider
    if cuda:
        settings = (provider, {"use_tf32": int(problem.precision == "tf32")})
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = str(Path(folder) / "plain.onnx")
        torch.onnx.export(problem.plain, (first,), path, dynamo=True, input_names=["x"], output_names=["y"])
        session = runtime.InferenceSession(path, options, providers=[settings])
    if not cuda:
        calls: list[Callable[[], Any]] = [
            partial(session.run, None, {"x": x.numpy()}) for x in problem.inputs
        ]
        return Contender(
            "onnxruntime",
            problem.memory_format,
            calls,
            outputs=lambda arrays: [torch.from_numpy(arrays[0])],
            synchronous=True,
        )
    output = torch.empty_like(problem.plain(first))

    def bound(x: Tensor) -> Callable[[], Tensor]:
        kind = str(x.dtype)[6:]
        binding = session.io_binding()
        binding.bind_input("x", "cuda", x.device.index or 0, kind, tuple(x.shape), x.data_ptr())
        binding.bind_output("y", "cuda", x.device.index or 0, kind, tuple(output.shape), output.data_ptr())

        def call() -> Tensor:
            session.run_with_iobinding(binding)
            return output

        return call

    return Contender(
        "onnxruntime",
        problem.memory_format,
        [bound(x) for x in problem.inputs],
        outputs=lambda y: [y.clone()],
        capturable=False,
        synchronous=True,
    )


def _jax(problem: Problem) -> Contender:
    _forward_only(problem, "jax")
    jax = _import("jax")
    first = problem.inputs[0]
    if first.dtype == torch.bfloat16:
        raise Unavailable("NumPy, through which it takes its tensors, has no bfloat16")
    if first.device.type == "cuda" and jax.default_backend() != "gpu":
        raise Unavailable('the installed JAX has no GPU (pip install "jax[cuda13]")')
    from styleforge.bench.jax_layers import translate

    device = jax.devices(None if first.device.type == "cuda" else "cpu")[0]
    compiled = jax.jit(translate(problem.plain, device, exact=problem.precision == "ieee"))
    arrays = [jax.device_put(x.detach().cpu().numpy(), device) for x in problem.inputs]

    def call(array: Any) -> Any:
        return compiled(array).block_until_ready()

    return Contender(
        "jax",
        problem.memory_format,
        [partial(call, array) for array in arrays],
        outputs=lambda array: [torch.tensor(importlib.import_module("numpy").asarray(array))],
        capturable=False,
        synchronous=True,
    )
