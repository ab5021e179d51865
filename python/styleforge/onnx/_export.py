"""``styleforge.onnx.export``."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from styleforge.onnx._dynamo import translation_table
from styleforge.onnx._packages import import_exporter
from styleforge.onnx._torchscript import register_symbolics

# A protobuf file ends at 2 GiB; beyond this the weights go to a second file beside it.
_LARGEST_FILE = 1_900_000_000
# What PyTorch's own translations are written in.
LEAST_OPSET = 18


def export(
    model: nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...],
    path: str | os.PathLike[str] | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: dict[str, Any] | tuple[Any, ...] | list[Any] | None = None,
    input_names: list[str] | None = None,
    output_names: list[str] | None = None,
    opset_version: int = 20,
) -> torch.onnx.ONNXProgram:
    """Writes a model with styleforge's operators as ONNX, in standard operators only.

    The model needs no change: its styleforge operators become Conv, InstanceNormalization, Gemm and so on.
    What it computes is the inference result (call ``model.eval()`` first), in the model's dtype.

    Args:
        model: a module, or what ``torch.export.export`` made of one.
        args: example inputs, a tuple. Where a dimension is dynamic, its example size should be at least 2.
        path: the ``.onnx`` file, overwritten; None writes nothing. Weights above 1.9 GB go to a second file,
            ``<path>.data``.
        kwargs: example inputs by name.
        dynamic_shapes: which dimensions vary, as in ``torch.export.export``; names work too, such as
            ``({0: "batch", 2: "height", 3: "width"},)``.
        input_names: names of the graph's inputs.
        output_names: names of the graph's outputs.
        opset_version: of the standard operator set, 18 or newer. GELU is one operator from 20 on.

    Returns:
        PyTorch's ``ONNXProgram``; its ``model`` is the graph.

    Raises:
        ValueError: ``opset_version`` is below 18.
        MissingPackageError: ``onnx`` or ``onnxscript`` is not installed.
        torch.onnx.OnnxExporterError: the model cannot be exported.
    """
    if opset_version < LEAST_OPSET:
        raise ValueError(
            f"styleforge.onnx.export: opset_version must be at least {LEAST_OPSET}, got {opset_version}"
        )
    import_exporter()
    register_symbolics()
    with torch.no_grad():
        program = torch.onnx.export(
            model,
            args,
            kwargs=kwargs,
            dynamic_shapes=dynamic_shapes,
            input_names=input_names,
            output_names=output_names,
            opset_version=opset_version,
            custom_translation_table=translation_table(),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    if path is not None:
        tensors = [value.const_value for value in program.model.graph.initializers.values()]
        weights = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        program.save(path, external_data=weights > _LARGEST_FILE)
    return program
