"""Translations for ``torch.onnx.export(dynamo=True)``, which builds graphs through onnxscript."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from styleforge.onnx._graph import Graph, Value
from styleforge.onnx._packages import import_exporter
from styleforge.onnx._translations import TRANSLATIONS


class _DynamoGraph(Graph):
    """Records through the evaluator that the exporter has set for the operator at hand."""

    def __init__(self) -> None:
        import onnx_ir
        import onnxscript

        self._tensor = onnx_ir.tensor
        self._numbers = {getattr(onnx_ir.DataType, name): dtype for name, dtype in _DTYPES.items()}
        # The exporter records nodes in the version that its caller asked for.
        recorder = onnxscript.evaluator.default()
        self._opset = getattr(recorder, "opset", None) or onnxscript.values.Opset("", 20)
        self.opset = self._opset.version

    def op(self, name: str, *inputs: Value | None, **attributes: Any) -> Value:
        return getattr(self._opset, name)(*inputs, **attributes)

    def split(self, value: Value, parts: int, axis: int) -> Sequence[Value]:
        outputs: Sequence[Value] = self._opset.Split(value, num_outputs=parts, axis=axis)
        return outputs

    def constant(self, tensor: torch.Tensor) -> Value:
        return self._opset.Constant(value=self._tensor(tensor.numpy()))

    def sizes(self, value: Value) -> list[int | None]:
        return [size if isinstance(size, int) else None for size in value.shape]

    def dtype(self, value: Value) -> torch.dtype:
        return self._numbers[value.dtype]


_DTYPES = {
    "FLOAT": torch.float32,
    "FLOAT16": torch.float16,
    "DOUBLE": torch.float64,
    "BFLOAT16": torch.bfloat16,
}


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The ``custom_translation_table`` of ``torch.onnx.export(..., dynamo=True)``.

    Returns:
        From each operator's overload to the function that adds standard ONNX operators in its place. A table
        of one's own can be merged in: ``{**styleforge.onnx.translation_table(), my_op: my_function}``.

    Raises:
        MissingPackageError: ``onnx`` or ``onnxscript`` is not installed.
    """
    import_exporter()
    table: dict[Callable[..., Any], Callable[..., Any]] = {}
    for name, translate in TRANSLATIONS.items():
        if hasattr(torch.ops.styleforge, name):
            overload = getattr(torch.ops.styleforge, name).default
            table[overload] = _translation(name, translate)
    return table


def _translation(name: str, translate: Callable[..., Any]) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        return translate(_DynamoGraph(), *args, **kwargs)

    # The exporter reads names and parameters. Without annotations it passes every argument as it is.
    parameters = list(inspect.signature(translate).parameters.values())[1:]
    function.__name__ = function.__qualname__ = name
    function.__annotations__ = {}
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    )
    return function
