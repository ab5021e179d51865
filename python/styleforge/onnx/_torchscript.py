"""Translations for ``torch.onnx.export(dynamo=False)``, the older exporter, while PyTorch has it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from styleforge.onnx._graph import Graph, Value
from styleforge.onnx._translations import LEAST_OPSET, TRANSLATIONS

# By the type of a schema's argument: how torch.onnx.symbolic_helper.parse_args reads it. Tensors stay values.
_KINDS = {"int": "i", "float": "f", "str": "s", "bool": "b", "List[int]": "is", "Optional[float]": "f"}


class _TorchScriptGraph(Graph):
    """A ``torch.onnx`` graph context."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self.opset = context.opset

    def op(self, name: str, *inputs: Value | None, **attributes: Any) -> Value:
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        suffixed = {f"{key}_{_suffix(value)}": value for key, value in attributes.items()}
        return self._context.op(name, *(self._none() if v is None else v for v in given), **suffixed)

    def split(self, value: Value, parts: int, axis: int) -> Sequence[Value]:
        count = {"num_outputs_i": parts} if self.opset >= 18 else {}
        outputs: Sequence[Value] = self._context.op("Split", value, axis_i=axis, **count, outputs=parts)
        return outputs

    def constant(self, tensor: torch.Tensor) -> Value:
        return self._context.op("Constant", value_t=tensor)

    def reshape(self, value: Value, sizes: Sequence[int]) -> Value:
        # This exporter's shape inference fails on a 0 without a -1 beside it.
        return super().reshape(value, [*sizes[:-1], -1])

    def sizes(self, value: Value) -> list[int | None]:
        sizes: list[int | None] | None = value.type().varyingSizes()
        if sizes is None:
            raise RuntimeError(f"the shape of {value.debugName()} is not known; export with dynamo=True")
        return sizes

    def dtype(self, value: Value) -> torch.dtype:
        dtype: torch.dtype | None = value.type().dtype()
        if dtype is None:
            raise RuntimeError(f"the dtype of {value.debugName()} is not known; export with dynamo=True")
        return dtype

    def _none(self) -> Value:
        value = self._context.op("prim::Constant")
        value.setType(torch._C.OptionalType.ofTensor())
        return value


def _suffix(value: Any) -> str:
    first = value[0] if isinstance(value, list) else value
    return {int: "i", float: "f", str: "s"}[type(first)]


def register_symbolics() -> None:
    """Registers the operators with ``torch.onnx.export(..., dynamo=False)``; a second call changes nothing.

    For ``opset_version`` 15 to 20. Does nothing where PyTorch no longer has that exporter.
    """
    register = getattr(torch.onnx, "register_custom_op_symbolic", None)
    if register is None:
        return
    for name, translate in TRANSLATIONS.items():
        if hasattr(torch.ops.styleforge, name):
            register(f"styleforge::{name}", _symbolic(name, translate), LEAST_OPSET)


def _symbolic(name: str, translate: Callable[..., Any]) -> Callable[..., Any]:
    from torch.onnx.symbolic_helper import parse_args

    schema = getattr(torch.ops.styleforge, name).default._schema
    kinds: list[Any] = [_KINDS.get(str(argument.type), "v") for argument in schema.arguments]

    def function(g: Any, *args: Any) -> Any:
        given = [None if _is_none(argument) else argument for argument in args]
        return translate(_TorchScriptGraph(g), *given)

    # parse_args pairs the arguments with the names that it finds here.
    function.__signature__ = inspect.signature(translate)  # type: ignore[attr-defined]
    symbolic: Callable[..., Any] = parse_args(*kinds)(function)
    return symbolic


def _is_none(argument: Any) -> bool:
    return isinstance(argument, torch._C.Value) and argument.node().mustBeNone()
