"""Gives a module a forward of its own by a subclass of its class, and takes it away again.

The module stays what it is: its layers, parameters, buffers, hooks, methods and state dict are untouched, and
``isinstance`` holds. Only its class is exchanged for a subclass whose forward was written by ``torch.fx``,
which runs for the calls that it was traced for; any other call runs the forward of the class.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import linecache
import re
import types
from dataclasses import dataclass
from typing import Any

import torch.fx as fx
import torch.nn as nn
from torch import Tensor

from styleforge.fuse._trace import Signature

ORIGINAL = "_styleforge_original"
_counter = itertools.count()
_classes: dict[tuple[type, str], type] = {}


@dataclass(frozen=True)
class Variant:
    """A rewritten forward.

    Attributes:
        graph: its code.
        signature: the calls it is for.
        training: the mode it is for, None for both.
        modules: paths of the modules whose mode that is.
    """

    graph: fx.Graph
    signature: Signature
    training: bool | None = None
    modules: tuple[str, ...] = ()


def install(module: nn.Module, variants: list[Variant], note: str) -> None:
    """Exchanges the module's class for one whose forward takes ``variants``, the first that fits.

    Args:
        module: changed in place.
        variants: at least one.
        note: shown where the module is printed.
    """
    source, names = _source(type(module), variants)
    module.__class__ = _subclass(type(module), source, names, note)


def original_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that a module had before it was rewritten; None for one that was not."""
    return type(module).__dict__.get(ORIGINAL)


def _source(cls: type, variants: list[Variant]) -> tuple[str, dict[str, Any]]:
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]  # type: ignore[attr-defined]
    defaults = {p.name: p.default for p in parameters}
    names: dict[str, Any] = {"Tensor": Tensor}
    methods: list[str] = []
    choices: list[str] = []
    for index, variant in enumerate(variants):
        code = variant.graph.python_code(root_module="self")
        names.update(code.globals)
        method = f"_styleforge_forward_{index}"
        # The result's annotation is fx's own word for "anything", which TorchScript does not know.
        body = re.sub(r"def forward\((.*?)\)(?: ->.*?)?:", rf"def {method}(\1):", code.src.strip(), count=1)
        methods.append(body)
        condition = variant.signature.condition(defaults)
        if variant.training is not None:
            flags = [f"self.{path}.training" if path else "self.training" for path in variant.modules]
            condition += "".join(f" and {'' if variant.training else 'not '}{flag}" for flag in flags)
        passed: list[str] = []
        for name, kind in variant.signature.kinds:
            if kind == "tensor":
                passed.append(name)
            elif kind == "pair":
                passed += [f"{name}[0]", f"{name}[1]"]
        choices.append(f"    if {condition}:\n        return self.{method}({', '.join(passed)})")
    forward = [f"def forward({', '.join(['self', *_declared(parameters)])}):"]
    forward += choices
    original = ", ".join(f"{p.name}={p.name}" if _keyword(p) else p.name for p in parameters)
    forward.append(f"    return self._styleforge_as_written({original})")
    return "\n\n\n".join(["\n".join(forward), *methods]) + "\n", names


def _keyword(parameter: inspect.Parameter) -> bool:
    return parameter.kind is inspect.Parameter.KEYWORD_ONLY


def _declared(parameters: list[inspect.Parameter]) -> list[str]:
    declared: list[str] = []
    for index, parameter in enumerate(parameters):
        if _keyword(parameter) and not any(_keyword(p) for p in parameters[:index]):
            declared.append("*")
        has_default = parameter.default is not inspect.Parameter.empty
        declared.append(f"{parameter.name}={parameter.default!r}" if has_default else parameter.name)
    return declared


def _subclass(cls: type, source: str, names: dict[str, Any], note: str) -> type:
    """The same class for the same source, so that equal modules have equal types."""
    key = (cls, source + note)
    if key not in _classes:
        _classes[key] = _new_subclass(cls, source, names, note)
    return _classes[key]


def _new_subclass(cls: type, source: str, names: dict[str, Any], note: str) -> type:
    filename = f"<styleforge.fuse {cls.__qualname__} {next(_counter)}>"
    scope: dict[str, Any] = dict(names)  # without __name__: Dynamo would look for the names in that module
    functions: dict[str, Any] = {}
    exec(compile(source, filename, "exec"), scope, functions)
    # Tracebacks, debuggers and TorchScript read the source from here.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    recipe = (cls, source, {name: _stored(value) for name, value in names.items()}, note)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, recipe, self.__dict__

    def extra_repr(self: nn.Module) -> str:
        text: str = cls.extra_repr(self)  # type: ignore[attr-defined]
        return ", ".join(part for part in (text, note) if part)

    members = {
        **functions,
        ORIGINAL: cls,
        "_styleforge_as_written": cls.forward,  # type: ignore[attr-defined]
        "__reduce_ex__": reduce,
        "__module__": __name__,
        "__doc__": cls.__doc__,
        "extra_repr": extra_repr,
    }
    return type(f"Fused{cls.__name__}", (cls,), members)


def _stored(value: Any) -> Any:
    return ("module", value.__name__) if isinstance(value, types.ModuleType) else ("object", value)


def _rebuild(cls: type[nn.Module], source: str, names: dict[str, Any], note: str) -> nn.Module:
    """A module of the rewritten class without its state, for copies and pickles."""
    found = {n: importlib.import_module(v) if kind == "module" else v for n, (kind, v) in names.items()}
    fused = _subclass(cls, source, found, note)
    new: nn.Module = fused.__new__(fused)  # type: ignore[call-overload]
    return new
