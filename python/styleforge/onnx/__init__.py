"""ONNX: the operators as standard ONNX operators, for both of PyTorch's exporters.

``styleforge.onnx.export`` writes a file. ``translation_table`` is for callers of
``torch.onnx.export(dynamo=True, custom_translation_table=...)``, ``register_symbolics`` for the older
``dynamo=False``. Needs the packages ``onnx`` and ``onnxscript``: ``pip install 'styleforge[onnx]'``.
"""

from __future__ import annotations

from styleforge.onnx._dynamo import translation_table
from styleforge.onnx._export import export
from styleforge.onnx._torchscript import register_symbolics

__all__ = ["export", "register_symbolics", "translation_table"]
