"""The optional packages behind ONNX export."""

from __future__ import annotations

from importlib.util import find_spec

from styleforge.io.errors import MissingPackageError


def import_exporter() -> None:
    """Makes sure that what ``torch.onnx.export(dynamo=True)`` needs is there.

    Raises:
        MissingPackageError: naming what is not, and how to install it.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"ONNX export needs {' and '.join(missing)}, not installed here: pip install 'styleforge[onnx]'"
        )
