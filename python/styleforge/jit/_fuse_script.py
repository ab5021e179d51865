"""``styleforge.jit.fuse_script``: puts the fused operators into a TorchScript module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from styleforge.fuse import _graph
from styleforge.fuse._patterns import Finder, Site, Step
from styleforge.fuse._report import Fused, FusionReport, NotFused
from styleforge.jit import _callees, _nodes

_REPORT = "styleforge_report"


def fuse_script(
    module: torch.jit.ScriptModule, *, preserved_attrs: Sequence[str] = (), verbose: bool = False
) -> torch.jit.ScriptModule:
    """Puts the fused operators into a scripted, traced or loaded TorchScript module.

    The patterns are those of ``styleforge.fuse`` but attention. The module is inlined and its attributes
    become constants, as ``torch.jit.freeze`` does, except for parameters, which stay parameters: ``to`` and
    ``state_dict`` keep working, under the same names. The result saves and loads in programs that have
    loaded styleforge's library, in Python (``import styleforge``) or C++. Checks whose only effect is an
    error message about the size of a tensor between fused layers go with the layers. The precision of
    float32 on the GPU (``torch.backends``) is that of now.

    Args:
        module: in evaluation mode; not changed.
        preserved_attrs: further methods and attributes to keep, as for ``torch.jit.freeze``; without them
            only ``forward`` stays.
        verbose: print the report.

    Returns:
        A new module that shares its parameters with ``module``. ``styleforge_report``, a ``FusionReport``,
        says what was fused, what was not and why; it is not saved.

    Raises:
        TypeError: ``module`` is no ScriptModule.
        ValueError: it is in training mode.
    """
    if not isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"fuse_script: module must be a ScriptModule, got {type(module).__name__}; "
            "styleforge.fuse takes modules that are not scripted"
        )
    if getattr(module, "training", False):
        raise ValueError("fuse_script: module is in training mode; call module.eval() first")
    frozen: Any = torch._C._freeze_module(module._c, list(preserved_attrs), True, True)
    report = FusionReport()
    for name in ["forward", *preserved_attrs]:
        if frozen._has_method(name):
            _rewrite(frozen._get_method(name).graph, report)
    fused: torch.jit.ScriptModule = torch.jit._recursive.wrap_cpp_module(frozen)
    fused.__dict__[_REPORT] = report
    if verbose:
        print(report)
    return fused


def _rewrite(graph: Any, report: FusionReport) -> None:
    _hoist_parameters(graph)
    blocks = [graph.block()]
    while blocks:
        block = blocks.pop()
        _rewrite_block(graph, block, report)
        for node in block.nodes():
            blocks += list(node.blocks())
    torch._C._jit_pass_dce(graph)
    torch._C._jit_pass_lint(graph)


def _hoist_parameters(graph: Any) -> None:
    """Parameters are read in front of branches: freezing leaves that to each branch of a norm layer."""
    if graph.findNode("prim::SetAttr") is not None:
        return
    for node in graph.nodes():
        owners = {value.debugName() for inner in _nodes.inside(node) for value in inner.outputs()}
        for inner in list(_nodes.inside(node)):
            if inner.kind() == "prim::GetAttr" and inner.inputsAt(0).debugName() not in owners:
                inner.moveBefore(node)
    torch._C._jit_pass_cse(graph)


def _rewrite_block(graph: Any, block: Any, report: FusionReport) -> None:
    nodes = _nodes.nodes_of(block)
    sites, left = Finder(_nodes.steps_of(nodes)).find()
    scopes = {key: node.scopeName() for key, node in nodes.items()}
    report.not_fused += [NotFused(_part(e.step, scopes), e.kind, e.reason) for e in left]
    replaced: dict[str, Any] = {}  # a site may read what another one gave
    for site in sites:
        report.fused.append(Fused(site.operator, "", tuple(_part(step, scopes) for step in site.steps)))
        _replace(graph, site, nodes, replaced)


def _part(step: Step, scopes: dict[str, str]) -> str:
    """The operator, with the layer's path where TorchScript kept that (traced modules)."""
    path = scopes[str(step.key)].rsplit("/", 1)[-1].removeprefix("__module.")
    return f"{path} ({step.name})" if path else step.name


def _replace(graph: Any, site: Site, nodes: dict[str, Any], replaced: dict[str, Any]) -> None:
    """Puts the call for a site in front of its last node; without readers, the site's nodes go."""
    old = [nodes[str(step.key)] for step in site.steps]
    last = old[-1]
    read = [node for top in old for node in (top, *_nodes.inside(top))]
    values = {v.debugName(): v for node in read for v in node.inputs()} | replaced
    function, arguments = _graph.call_of(site)
    with graph.insert_point_guard(last):
        given: list[Any] = []
        for argument in arguments:
            if isinstance(argument, _nodes.Name):
                given.append(values[argument])
            elif isinstance(argument, torch._C.Value):
                given.append(argument)
            else:
                given.append(graph.insertConstant(argument))
        (result,) = graph.insertGraph(_callees.graph_of(function), given)
    replaced[str(site.steps[-1].key)] = result
    last.output().replaceAllUsesWith(result)
    gone = {id(check) for node in old for check in _nodes.checks_of(node.output(), nodes)}
    gone |= {id(node) for node in old}
    for name in [name for name, node in nodes.items() if id(node) in gone][::-1]:
        nodes.pop(name).destroy()
