"""Traces one module's forward symbolically, and refuses where the trace would not be the forward.

``torch.fx`` runs the forward once with stand-ins for tensors and writes down what is done to them. What
Python decides on the way is decided for good, so whatever could decide otherwise on another call is either
a condition of the trace (``Signature``: which arguments are tensors, which are left at their defaults) or a
reason not to trust it: attributes that the forward sets, random numbers, tensors that it makes.
"""

from __future__ import annotations

import builtins
import inspect
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn
from torch import Tensor

from styleforge.fuse import _in_place, _layers

_CONSTANTS = (type(None), bool, int, float, str)
_MOST_SIGNATURES = 8
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class NotTraceable(Exception):
    """Why a forward cannot be traced, in one line; ``where`` is the module, relative to the traced one."""

    def __init__(self, reason: str, where: str = "") -> None:
        super().__init__(reason)
        self.where = where


@dataclass(frozen=True)
class Signature:
    """What a trace holds for: every parameter of the forward as "tensor", "pair" of tensors or "default"."""

    kinds: tuple[tuple[str, str], ...]

    def condition(self, defaults: dict[str, Any]) -> str:
        """The Python expression that tells whether a call is of this kind."""
        terms: list[str] = []
        for name, kind in self.kinds:
            if kind == "tensor":
                terms.append(f"isinstance({name}, Tensor)")
            elif kind == "pair":
                terms.append(f"isinstance({name}, (tuple, list)) and len({name}) == 2")
            elif defaults[name] is None or isinstance(defaults[name], bool):
                terms.append(f"{name} is {defaults[name]}")
            else:
                terms.append(
                    f"type({name}) is {type(defaults[name]).__name__} and {name} == {defaults[name]!r}"
                )
        return " and ".join(terms) or "True"


@dataclass
class Trace:
    """A traced forward.

    Attributes:
        graph: attribute targets and layers are relative to the module.
        scopes: for each node, the modules that were entered when it was made, outermost first ("" is the
            traced module).
        entered: every module whose forward was followed.
        asked_for_pair: parameters of which the forward asked whether they are a list or tuple.
    """

    graph: fx.Graph
    scopes: dict[fx.Node, tuple[str, ...]]
    entered: set[str]
    asked_for_pair: set[str]


def parameters_of(module: nn.Module) -> list[inspect.Parameter]:
    """The parameters of a module's forward, without self.

    Raises:
        NotTraceable: it takes ``*args`` or ``**kwargs``, or has defaults that are no constants.
    """
    found = list(inspect.signature(type(module).forward).parameters.values())[1:]
    for parameter in found:
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            raise NotTraceable("its forward takes *args or **kwargs")
        if parameter.default is not inspect.Parameter.empty and not isinstance(parameter.default, _CONSTANTS):
            raise NotTraceable(f"the default of {parameter.name} is not a constant")
    return found


def signatures(parameters: Iterable[inspect.Parameter], pairs: Iterable[str] = ()) -> list[Signature]:
    """The kinds of calls to try: what has no default is a tensor, what may be None is one or is left out."""
    choices: list[list[tuple[str, str]]] = []
    for parameter in parameters:
        kinds = ["tensor"]
        if parameter.default is None:
            kinds = ["default", "tensor"]
        elif parameter.default is not inspect.Parameter.empty:
            kinds = ["default"]
        if parameter.name in pairs:
            kinds.append("pair")
        choices.append([(parameter.name, kind) for kind in kinds])
    return [Signature(kinds) for kinds in itertools.islice(itertools.product(*choices), _MOST_SIGNATURES)]


def trace(module: nn.Module, signature: Signature, leaf: Callable[[str, nn.Module], bool]) -> Trace:
    """Traces ``module``'s forward for calls of one kind.

    Args:
        module: not changed.
        signature: what the arguments are.
        leaf: whether a submodule, by path, stays a call; layers of PyTorch always do.

    Raises:
        NotTraceable: with the submodule in which it went wrong.
    """
    tracer = _Tracer(module, signature, leaf)
    with _no_traces_left(module):
        try:
            graph = tracer.trace(module)
        except NotTraceable as error:
            error.where = error.where or tracer.inside[-1]
            raise
        except Exception as error:
            line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise NotTraceable(f"its forward cannot be traced ({line})", tracer.inside[-1]) from error
    return Trace(graph, tracer.scopes, tracer.entered, tracer.asked_for_pair)


def _modes() -> tuple[Any, ...]:
    """What ``torch.no_grad``, ``torch.inference_mode`` and ``torch.autocast`` change."""
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


class _Value(fx.Proxy):
    """Stands for a result; ``+=`` is written down as what it is."""

    def _apply(self, function: Callable[[Any, Any], Any], other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._apply(_in_place.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._apply(_in_place.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._apply(_in_place.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._apply(_in_place.itruediv, other)

    def _unknown(self, other: Any) -> fx.Proxy:
        raise NotTraceable(
            "its forward has an assignment that is not followed (**=, //=, %=, &=, |=, ^=, ...)"
        )

    __ipow__ = __ifloordiv__ = __imod__ = __iand__ = __ior__ = __ixor__ = __imatmul__ = _unknown
    __ilshift__ = __irshift__ = _unknown


class _Argument(_Value):
    """Stands for an argument that is a tensor for sure."""


class _Tracer(fx.Tracer):
    def __init__(self, root: nn.Module, signature: Signature, leaf: Callable[[str, nn.Module], bool]) -> None:
        super().__init__()
        self.signature = signature
        self.leaf = leaf
        self.inside: list[str] = [""]
        self.scopes: dict[fx.Node, tuple[str, ...]] = {}
        self.entered: set[str] = {""}
        self.asked_for_pair: set[str] = set()
        self.modes = _modes()
        self._buffers: set[int] | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, _CONTAINERS) and _layers.is_torch(m):
            return _layers.has_hooks(m) or self.leaf(module_qualified_name, m)
        parametrized = type(m) is not _layers.layer_type(m)
        return (
            _layers.is_torch(m)
            or _layers.is_ours(m)
            or parametrized
            or isinstance(m, torch.jit.ScriptModule)
            or _layers.has_hooks(m)
            or self.leaf(module_qualified_name, m)
        )

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        self.inside.append(path)
        self.entered.add(path)
        with _isinstance_of_stand_ins(type(m).forward, self):
            result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()  # not where it raises: the last one entered is the one to blame
        return result

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:  # a context that the trace would not enter
            raise NotTraceable("its forward changes the gradient mode or autocast", self.inside[-1])
        node = super().create_node(*args, **kwargs)
        self.scopes[node] = tuple(self.inside)
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs:
            if self._buffers is None:
                self._buffers = {id(b) for b in self.root.buffers()}
            if id(a) not in self._buffers:
                raise NotTraceable("its forward makes tensors of its own", self.inside[-1])
        return super().create_arg(a)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        named: dict[str, Any] = {}
        for name, kind in self.signature.kinds:
            if kind == "tensor":
                named[name] = self._stand_in(name)
            elif kind == "pair":
                named[name] = [self._stand_in(f"{name}_{i}") for i in range(2)]
        function = type(self.root).forward
        defaults = inspect.signature(function).parameters
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        for name, kind in self.signature.kinds:
            value = defaults[name].default if kind == "default" else named[name]
            if defaults[name].kind is inspect.Parameter.KEYWORD_ONLY:
                keywords[name] = value
            else:
                positional.append(value)

        def forward(module: nn.Module) -> Any:
            with _isinstance_of_stand_ins(function, self):
                return function(module, *positional, **keywords)

        return forward, [self.root]

    def _stand_in(self, name: str) -> fx.Proxy:
        node = self.create_node("placeholder", name, (), {}, name=name)
        return _Argument(node, self)


@contextmanager
def _isinstance_of_stand_ins(function: Callable[..., Any], tracer: _Tracer) -> Iterator[None]:
    """While ``function`` runs, what its file calls ``isinstance`` takes stand-ins for what they stand for.

    An argument is a tensor, since that is a condition of the trace. Of a result nobody knows here.
    """
    names = function.__globals__
    # Inside of an outer call, a file that has its own, and PyTorch's own containers need nothing.
    if "isinstance" in names or function.__module__.startswith("torch."):
        yield
        return

    def isinstance_(value: Any, classes: Any) -> bool:
        if not builtins.isinstance(value, fx.Proxy):
            return builtins.isinstance(value, classes)
        flat = classes if builtins.isinstance(classes, tuple) else (classes,)
        if any(c in (list, tuple) for c in flat) and builtins.isinstance(value, _Argument):
            tracer.asked_for_pair.add(value.node.name)
        if builtins.isinstance(value, _Argument):
            return any(builtins.isinstance(c, type) and issubclass(Tensor, c) for c in flat)
        raise NotTraceable("its forward asks for the type of a result", tracer.inside[-1])

    names["isinstance"] = isinstance_
    try:
        yield
    finally:
        del names["isinstance"]


@contextmanager
def _no_traces_left(module: nn.Module) -> Iterator[None]:
    """Undoes what running the forward did besides its result, and refuses it for that."""
    modules = dict(module.named_modules())
    before = {path: _attributes(m) for path, m in modules.items()}
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    try:
        yield
    finally:
        changed = [path for path, m in modules.items() if _changed(before[path], m)]
        for path in changed:
            _restore(before[path], modules[path])
        drew = random.getstate() != python_state or not torch.equal(torch.get_rng_state(), torch_state)
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
    if changed:
        raise NotTraceable("its forward sets attributes", changed[-1])
    if drew:
        raise NotTraceable("its forward draws random numbers")


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Every attribute with a copy of it where it is a container that could be changed in place."""
    return {
        name: (value, value.copy() if isinstance(value, (list, dict, set)) else None)
        for name, value in vars(module).items()
    }


def _changed(before: dict[str, tuple[Any, Any]], module: nn.Module) -> bool:
    now = vars(module)
    if now.keys() != before.keys():
        return True
    return any(now[name] is not value or _differs(now[name], copy) for name, (value, copy) in before.items())


def _differs(value: Any, copy: Any) -> bool:
    """Whether a container has other contents, compared by identity: tensors have no other quick way."""
    if copy is None:
        return False
    if isinstance(value, dict):
        return value.keys() != copy.keys() or any(value[key] is not copy[key] for key in copy)
    if isinstance(value, list):
        return len(value) != len(copy) or any(a is not b for a, b in zip(value, copy, strict=True))
    return bool(value != copy)


def _restore(before: dict[str, tuple[Any, Any]], module: nn.Module) -> None:
    attributes = vars(module)
    attributes.clear()
    for name, (value, copy) in before.items():
        if copy is not None:
            value.clear()
            value.extend(copy) if isinstance(value, list) else value.update(copy)
        attributes[name] = value
