"""``torch.compile(model, backend="styleforge")``: fused operators in what Dynamo captured, Inductor for the
rest.

Installed, the backend is found by its entry point (group ``torch_dynamo_backends`` in pyproject.toml) without
an import; ``import styleforge`` registers it too, for source trees that are not installed.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.fx as fx

from styleforge.fuse._graph import rewrite

_REGISTRY = "torch._dynamo.backends.registry"
NAME = "styleforge"


def styleforge(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend: rewrites the captured graph, then compiles it with Inductor.

    The precision of float32 on the GPU (``torch.backends``) is read when a graph is compiled.

    Args:
        gm: torch-level graph from Dynamo; changed in place.
        example_inputs: its inputs, with symbolic sizes where they are dynamic.
        mode: of Inductor, as in ``torch.compile`` ("reduce-overhead", "max-autotune", ...).
        options: of Inductor, as in ``torch.compile``.

    Returns:
        The compiled function.
    """
    rewrite_captured(gm)
    inductor = torch._TorchCompileInductorWrapper(mode if mode or options else "default", options, None)
    compiled: Callable[..., Any] = inductor(gm, example_inputs)
    return compiled


def rewrite_captured(gm: fx.GraphModule) -> int:
    """Puts the fused operators into a graph that Dynamo captured, in place; also into the graphs it holds.

    Returns:
        How many sites were fused.
    """
    count = 0
    for module in gm.modules():  # bodies of checkpoints, conditions and loops are modules of the graph
        if isinstance(module, fx.GraphModule):
            sites, _ = rewrite(module.graph, module)
            if sites:
                _drop_unused_numbers(module.graph)
                module.graph.lint()
                module.recompile()
            count += len(sites)
    return count


def _drop_unused_numbers(graph: fx.Graph) -> None:
    """Numbers (eps, slopes) that dynamic shapes made inputs and that are constants of the operators now."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_method" and node.target == "item" and not node.users:
            graph.erase_node(node)


def register() -> None:
    """Makes the name known to torch.compile, now if Dynamo is there, else as soon as it is.

    Importing Dynamo takes as long as everything else together, and most programs do not compile.
    """
    registry = sys.modules.get(_REGISTRY)
    if registry is not None:
        _register_in(registry)
    elif not any(isinstance(finder, _WhenDynamoComes) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenDynamoComes())


def _register_in(registry: ModuleType) -> None:
    # As the entry point of an installed package would be, which may come before this or later: registering
    # the function itself twice, once by either way, is an error in PyTorch.
    from importlib.metadata import EntryPoint  # as slow to import as everything here together

    value = f"{__name__}:{styleforge.__name__}"
    registry._BACKENDS.setdefault(NAME, EntryPoint(NAME, value, "torch_dynamo_backends"))


class _WhenDynamoComes(importlib.abc.MetaPathFinder):
    """Lets Dynamo's registry be found as always, and adds the backend once it has run; then goes away."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                _register_in(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
