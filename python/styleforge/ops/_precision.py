"""Which arithmetic float32 convolutions and matrix products take on the GPU when the caller does not say."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_get_cublas_allow_tf32 = torch._C._get_cublas_allow_tf32
_get_cudnn_allow_tf32 = torch._C._get_cudnn_allow_tf32


def conv_precision(precision: str | None = None) -> str:
    """``precision`` where given; else "tf32" if PyTorch's cuDNN convolutions may use TF32, "ieee" if not.

    Follows ``torch.backends.cudnn.allow_tf32`` or, once somebody has set it, the newer
    ``torch.backends.cudnn.conv.fp32_precision``.

    Args:
        precision: "ieee", "tf32" or None.

    Returns:
        "ieee" or "tf32", the ``precision`` that the operators take by schema.
    """
    if precision is not None:
        return precision
    try:
        # Both read the same flag: the property is what torch.compile knows, the function takes no time.
        compiling = _is_dynamo_compiling()
        tf32: bool = torch.backends.cudnn.allow_tf32 if compiling else _get_cudnn_allow_tf32()
    except RuntimeError:
        # The newer flags were set, and convolutions differ from RNNs: the older one has no answer.
        tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if tf32 else "ieee"


class _Flag:
    """One of PyTorch's precisions, which is the whole process's: threads that set it share it.

    The user's comes back after the last of them, and while any has set it nobody may take it for the user's:
    it would change under a call. Threads that ask for different precisions at the same time cannot both
    have theirs.
    """

    def __init__(self, flags: Any) -> None:
        self._flags = flags
        self._lock = threading.Lock()
        self._users = ""
        self.taken: list[str] = []

    @contextmanager
    def taking(self, precision: str) -> Iterator[None]:
        with self._lock:
            if not self.taken:
                self._users = self._flags.fp32_precision
            self.taken.append(precision)
            self._flags.fp32_precision = precision
        try:
            yield
        finally:
            with self._lock:
                self.taken.reverse()  # of equal ones the last
                self.taken.remove(precision)
                self.taken.reverse()
                self._flags.fp32_precision = self.taken[-1] if self.taken else self._users


_convolutions = _Flag(torch.backends.cudnn.conv)  # type: ignore[attr-defined]
_matmuls = _Flag(torch.backends.cuda.matmul)


def convolutions_are_in(precision: str) -> bool:
    """Whether PyTorch's own convolutions take this precision anyway, by the user's flags."""
    return not _convolutions.taken and precision == conv_precision()


def convolutions_in(precision: str) -> AbstractContextManager[None]:
    """PyTorch's own convolutions take this precision inside; the user's flags come back afterwards."""
    return _convolutions.taking(precision)


def matmul_precision(precision: str | None = None) -> str:
    """``precision`` where given; else "tf32" if PyTorch's cuBLAS products may use TF32, "ieee" if not.

    Follows ``torch.set_float32_matmul_precision`` and ``torch.backends.cuda.matmul``, by its older
    ``allow_tf32`` or, once somebody has set it, the newer ``fp32_precision``.

    Args:
        precision: "ieee", "tf32" or None.

    Returns:
        "ieee" or "tf32", the ``precision`` that the operators take by schema.
    """
    if precision is not None:
        return precision
    try:
        compiling = _is_dynamo_compiling()
        tf32: bool = torch.backends.cuda.matmul.allow_tf32 if compiling else _get_cublas_allow_tf32()
    except RuntimeError:
        # The newer flags were set, and the older ones have no answer.
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def precision_of_products(asked: str | None, input: Tensor) -> str | None:
    """The ``precision`` of a call past autograd; None where PyTorch's products, which it may take, differ."""
    if input.dtype is not torch.float32:
        return "ieee"
    if asked is None:
        return matmul_precision()
    return asked if not _matmuls.taken and asked == matmul_precision() else None


def matmuls_in(precision: str) -> AbstractContextManager[None]:
    """PyTorch's own CUDA products take this precision inside; the user's flags come back afterwards."""
    return _matmuls.taking(precision)


_as_they_are: AbstractContextManager[None] = nullcontext()


def matmuls_of(input: Tensor, precision: str) -> AbstractContextManager[None]:
    """Context in which PyTorch's own products of float32 CUDA tensors take this precision.

    The user's flags come back afterwards. Where they say so anyway, and for other tensors, nothing happens.
    """
    if not input.is_cuda or input.dtype != torch.float32 or precision not in ("ieee", "tf32"):
        return _as_they_are
    by_the_user = not _matmuls.taken and precision == matmul_precision()
    return _as_they_are if by_the_user else matmuls_in(precision)


def matmuls_of_module(input: Tensor, precision: str) -> AbstractContextManager[None]:
    """``matmuls_of`` where a module has to ask for it: in inference mode.

    Elsewhere the operators' autograd kernels do, which inference mode goes past.
    """
    if _is_dynamo_compiling() or not torch.is_inference_mode_enabled():
        return _as_they_are
    return matmuls_of(input, precision)
