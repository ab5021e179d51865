"""Checks ONNX files and runs them.

A GPU machine may lack the packages, and its tests are skipped then; elsewhere they are required.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


def needs_onnx() -> None:
    """Skips on a GPU machine that lacks the packages."""
    if torch.cuda.is_available():
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")


def load(path: Path) -> Any:
    """A model, once onnx.checker and we know that it holds standard operators only."""
    import onnx

    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    assert [opset.domain for opset in model.opset_import if opset.domain] == []
    assert {node.domain for node in model.graph.node} <= {""}
    assert not model.functions
    return model


def nodes(model: Any) -> Counter[str]:
    """Operators, without what PyTorch's own exporters leave behind."""
    return Counter(node.op_type for node in model.graph.node if node.op_type not in ("Constant", "Identity"))


def run(path: Path, *inputs: Tensor) -> Tensor:
    """The only output of a model in ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    fed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    (output,) = session.run(None, fed)
    return torch.from_numpy(output)
