"""What a translation needs of the exporter that calls it: both build graphs, each in its own way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

Value = Any
"""A tensor of the graph being built; its type is the exporter's."""

# onnx.TensorProto.DataType; the package is not needed for these.
_ONNX_TYPES = {torch.float32: 1, torch.float16: 10, torch.float64: 11, torch.bfloat16: 16}


class Graph(ABC):
    """A graph under construction, in one version of the standard operator set.

    Attributes:
        opset: that version.
    """

    opset: int

    @abstractmethod
    def op(self, name: str, *inputs: Value | None, **attributes: Any) -> Value:
        """Adds a standard operator with one output; None leaves an optional input out."""

    @abstractmethod
    def split(self, value: Value, parts: int, axis: int) -> Sequence[Value]:
        """Adds a Split into equal parts."""

    @abstractmethod
    def constant(self, tensor: torch.Tensor) -> Value:
        """Adds a constant."""

    @abstractmethod
    def sizes(self, value: Value) -> list[int | None]:
        """Sizes of an argument of the operator being translated, None for those that are dynamic."""

    @abstractmethod
    def dtype(self, value: Value) -> torch.dtype:
        """Data type of an argument of the operator being translated."""

    def integers(self, values: Sequence[int]) -> Value:
        """Adds a constant vector of int64."""
        return self.constant(torch.tensor(list(values), dtype=torch.int64))

    def reshape(self, value: Value, sizes: Sequence[int]) -> Value:
        """Adds a Reshape; 0 keeps a size."""
        return self.op("Reshape", value, self.integers(sizes))

    def cast(self, value: Value, from_dtype: torch.dtype, to_dtype: torch.dtype) -> Value:
        """The value in another data type; itself where it has that already."""
        return value if from_dtype == to_dtype else self.op("Cast", value, to=_ONNX_TYPES[to_dtype])

    def cast_argument(self, value: Value, dtype: torch.dtype) -> Value:
        """An argument of the operator being translated in this data type."""
        return self.cast(value, self.dtype(value), dtype)
