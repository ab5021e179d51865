"""``styleforge.fuse`` and ``styleforge.unfuse``: whose forward is rewritten, and which layers change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn as nn

from styleforge.fuse import _forward, _graph, _layers, _swap
from styleforge.fuse._forward import Variant
from styleforge.fuse._patterns import Finder, Left, Site
from styleforge.fuse._report import Fused, FusionReport, NotFused
from styleforge.fuse._trace import NotTraceable, Signature, Trace, parameters_of, signatures, trace

M = TypeVar("M", bound=nn.Module)
_REPORT = "styleforge_report"


def fuse(model: M, *, inplace: bool = False, verbose: bool = False) -> M:
    """Puts the fused operators into an existing model.

    Fused are: padding (``ReflectionPad2d``, ``ReplicationPad2d``, ``ZeroPad2d``, ``padding_mode``,
    ``F.pad``) and nearest upsampling by two, ``Conv2d``, ``InstanceNorm2d``, activation, with the addition
    of a shortcut before the activation; ``InstanceNorm2d`` alone or with what follows it; Linear,
    GELU/ReLU/SiLU, (Dropout,) Linear, with the addition after it; ``nn.MultiheadAttention`` and the
    feed-forward part of transformer layers. A reflection-padded convolution to a few channels, the last
    layer of picture networks, has a kernel too. Layers and their functional forms are alike. What cannot be
    proven equal stays as it is.

    The result is of the same class (a subclass of it), with the same submodules, parameter names, hooks and
    methods; state dicts fit either way, and parameters are shared with ``model``. Forwards are read once, by
    ``torch.fx``. Plain Python attributes that they read (a flag, a factor) are fixed from then on. A forward
    that cannot be followed is left, and its submodules are treated one by one. Hooks on a layer keep it from
    being fused; hooks that are added later to a layer inside of a fused place do not run.

    Args:
        model: any module, in either mode, on any device, in any dtype; not a ScriptModule
            (``styleforge.jit.fuse_script``).
        inplace: change ``model`` itself; else a copy that shares parameters and buffers.
        verbose: print the report.

    Returns:
        The fused model. ``styleforge_report``, a ``FusionReport``, says what was fused, what was not and why.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or a ScriptModule.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("fuse: model is a ScriptModule; use styleforge.jit.fuse_script for it")
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model must be an nn.Module, got {type(model).__name__}")
    fused: M = model if inplace else _copy(model)
    report = _Fusion(fused).run()
    fused.__dict__[_REPORT] = report
    if verbose:
        print(report)
    return fused


def unfuse(model: M) -> M:
    """Takes back what ``fuse`` did, in place: classes and forwards are those from before.

    Parameters, buffers, hooks and mode stay as they are now.

    Args:
        model: what ``fuse`` returned; others stay as they are.

    Returns:
        ``model``.
    """
    for module in model.modules():
        module.__dict__.pop(_REPORT, None)
        original = _forward.original_class(module)
        if original is not None:
            module.__class__ = original
    return model


def _copy(model: Any) -> Any:
    """The same tree of modules with the same parameters and buffers; other attributes are shared as well.

    As ``torch.nn.parallel.replicate`` makes its replicas. Plain lists, tuples and dictionaries of modules
    hold the copies.
    """
    copies: dict[int, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):  # its state is not in Python
            copies[id(module)] = module
            continue
        copies[id(module)] = module.__new__(type(module))
    for module in model.modules():
        new = copies[id(module)]
        if new is not module:
            for name, value in vars(module).items():
                new.__dict__[name] = _attribute(name, value, copies)
    return copies[id(model)]


def _attribute(name: str, value: Any, copies: dict[int, nn.Module]) -> Any:
    if name == "_modules":
        return {key: child if child is None else copies[id(child)] for key, child in value.items()}
    if name in ("_parameters", "_buffers", "_non_persistent_buffers_set") or "_hooks" in name:
        return value.copy()
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if type(value) in (list, tuple) and any(isinstance(v, nn.Module) for v in value):
        return type(value)(_attribute("", v, copies) for v in value)
    if type(value) is dict and any(isinstance(v, nn.Module) for v in value.values()):
        return {key: _attribute("", v, copies) for key, v in value.items()}
    return value


@dataclass
class _Plan:
    """What one trace of a module, with everything followed, showed.

    Attributes:
        owners: the modules whose forward has to be rewritten, each with the submodules that its sites reach
            into, by path.
        followed: every module that was entered.
        called: every layer that was seen.
        left: with the paths of the whole model.
    """

    owners: dict[str, set[str]] = field(default_factory=dict)
    followed: set[str] = field(default_factory=set)
    called: set[str] = field(default_factory=set)
    left: list[NotFused] = field(default_factory=list)


class _Fusion:
    """One call of ``fuse``."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.report = FusionReport()
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.called: set[str] = set()

    def run(self) -> FusionReport:
        done: set[str] = set()
        for path, module in list(self.model.named_modules()):
            if path in done or not _readable(module):
                continue
            try:
                plan = self._plan(path, module)
            except NotTraceable as error:
                self.report.not_fused.append(NotFused(path or "the model", type(module).__name__, str(error)))
                continue
            done |= plan.followed
            self.called |= plan.called
            self.report.not_fused += plan.left
            for owner, reach in plan.owners.items():
                self._rewrite(owner, reach)
        self._swap_layers()
        order = {path: index for index, path in enumerate(self.paths.values())}
        self.report.fused.sort(key=lambda entry: min(order.get(part, len(order)) for part in entry.parts))
        return self.report

    # --- planning -------------------------------------------------------------------------------

    def _plan(self, path: str, module: nn.Module) -> _Plan:
        found, traced = self._follow(module)
        plan = _Plan()
        reach: dict[str, set[str]] = {}
        for site in found.sites:
            scopes = [traced.scopes[step.key] for step in site.steps]  # type: ignore[index]
            common = _common(scopes)
            inside = reach.setdefault(common[-1], set())
            inside.update(*(scope[len(common) :] for scope in scopes))
        for node in _graph.with_unread_weights(traced.graph, module):
            reach.setdefault(traced.scopes[node][-1], set())
        _close(reach)
        inner = set().union(*reach.values())
        for owner, inside in reach.items():
            if owner not in inner:
                plan.owners[_join(path, owner)] = {_join(path, p) for p in inside}
        plan.followed = {_join(path, p) for p in traced.entered}
        calls = [node for node in traced.graph.nodes if node.op == "call_module"]
        plan.called = {_join(path, str(node.target)) for node in calls}
        plan.left = [self._left(path, left) for left in found.left]
        return plan

    def _left(self, path: str, left: Left) -> NotFused:
        is_layer = left.step.key.op == "call_module"  # type: ignore[attr-defined]
        name = _join(path, left.step.name) if is_layer else left.step.name
        return NotFused(name, left.kind, left.reason)

    def _follow(self, module: nn.Module) -> tuple[Finder, Trace]:
        """Traces with everything followed that can be; what cannot stays a call."""
        opaque: set[str] = set()
        while True:
            error = None
            for signature in _all_signatures(module, opaque):
                try:
                    traced = trace(module, signature, lambda path, _: path in opaque)
                except NotTraceable as problem:
                    error = error or problem
                    continue
                finder = Finder(_graph.steps_of(traced.graph, module))
                finder.find()
                return finder, traced
            if error is None or error.where == "" or error.where in opaque:
                raise error or NotTraceable("its forward cannot be traced")
            opaque.add(error.where)

    # --- rewriting ------------------------------------------------------------------------------

    def _rewrite(self, path: str, reach: set[str]) -> None:
        module = self.model.get_submodule(path)
        prefix = f"{path}." if path else ""
        inside = {p.removeprefix(prefix) for p in reach}
        variants: list[Variant] = []
        sites: list[Site] = []
        problem: NotTraceable | None = None
        for signature in _all_signatures(module, set(), inside):
            try:
                for variant, found in _variants(module, signature, inside):
                    variants.append(variant)
                    sites = found if len(found) > len(sites) else sites
            except NotTraceable as error:
                problem = problem or error
        if not variants:
            reason = str(problem) if problem else "nothing left to fuse in its own forward"
            self.report.not_fused.append(NotFused(path or "the model", type(module).__name__, reason))
            return
        for site in sites:
            parts = tuple(
                _join(path, step.name) if step.key.op == "call_module" else step.name  # type: ignore[attr-defined]
                for step in site.steps
            )
            self.report.fused.append(Fused(site.operator, path, parts))
        _forward.install(module, variants, f"fused={len(sites)}" if sites else "")

    def _swap_layers(self) -> None:
        for path, module in list(self.model.named_modules()):
            operator, reason = _swap.swap(module)
            if operator is not None:
                part = path or type(module).__name__
                self.report.fused.append(Fused(operator, path, (part,)))
            elif reason is not None:
                kind = type(module).__name__
                self.report.not_fused.append(NotFused(path or "the model", kind, reason))
            elif type(module) is nn.InstanceNorm2d and path not in self.called:
                if not module.track_running_stats:
                    module.__class__ = _swap.FusedLoneInstanceNorm2d
                    self.report.fused.append(Fused("fused_instance_norm", path, (path or "InstanceNorm2d",)))
                else:
                    entry = NotFused(path or "the model", "InstanceNorm2d", "track_running_stats=True")
                    self.report.not_fused.append(entry)


def _readable(module: nn.Module) -> bool:
    """Whether the module's forward is code to be read, not a layer of PyTorch or of this package."""
    if isinstance(module, torch.jit.ScriptModule) or _layers.is_ours(module):
        return False
    if type(module) is nn.Sequential:
        return True
    return not _layers.is_torch(module) and "forward" not in vars(module)


def _all_signatures(
    module: nn.Module, opaque: set[str], inside: set[str] | None = None
) -> Iterator[Signature]:
    """The kinds of calls to try; pairs of tensors for what the forward asks whether it is a list."""
    parameters = parameters_of(module)
    pairs: set[str] = set()
    for signature in signatures(parameters):
        with suppress(NotTraceable):
            pairs |= trace(module, signature, _leaf(opaque, inside)).asked_for_pair
        yield signature
    for signature in signatures(parameters, pairs) if pairs else ():
        if any(kind == "pair" for _, kind in signature.kinds):
            yield signature


def _leaf(opaque: set[str], inside: set[str] | None) -> Any:
    return lambda path, _: path in opaque or (inside is not None and path not in inside)


def _variants(
    module: nn.Module, signature: Signature, inside: set[str]
) -> Iterator[tuple[Variant, list[Site]]]:
    """The rewritten forward for one kind of call: one for both modes, or one for each."""
    traced: list[tuple[Variant, list[Site], str]] = []
    for training in (False, True):
        with _mode(module, training):
            result = trace(module, signature, lambda path, _: path not in inside)
        changes = bool(_graph.with_unread_weights(result.graph, module))
        sites, _ = _graph.rewrite(result.graph, module)
        modules = tuple(sorted(result.entered))
        code = result.graph.python_code(root_module="self").src
        if sites or changes:
            traced.append((Variant(result.graph, signature, training, modules), sites, code))
    if len(traced) == 2 and traced[0][2] == traced[1][2]:
        yield Variant(traced[0][0].graph, signature), traced[0][1]
        return
    for variant, sites, _ in traced:
        yield variant, sites


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    before = [(m, m.training) for m in module.modules()]
    for m, _ in before:
        m.__dict__["training"] = training
    try:
        yield
    finally:
        for m, flag in before:
            m.__dict__["training"] = flag


def _join(path: str, rest: str) -> str:
    return f"{path}.{rest}" if path and rest else path or rest


def _common(scopes: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The modules that all of them are inside of."""
    common = scopes[0]
    for scope in scopes[1:]:
        length = 0
        while length < min(len(common), len(scope)) and common[length] == scope[length]:
            length += 1
        common = common[:length]
    return common


def _close(reach: dict[str, set[str]]) -> None:
    """A module that another's site reaches into is rewritten there, with all that its own sites reach."""
    changed = True
    while changed:
        changed = False
        for inside in reach.values():
            more = set().union(*(reach[p] for p in inside if p in reach)) - inside
            inside |= more
            changed = changed or bool(more)
