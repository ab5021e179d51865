"""How far from float64 a result may be: no further than PyTorch's own, up to a factor.

With E the error against float64, of styleforge and of PyTorch in the same dtype and precision:

- RMS(E of styleforge) <= 2 RMS(E of PyTorch) + floor: the RMS estimates the size of the rounding errors;
- max(E of styleforge) <= 4 max(E of PyTorch) + 4 floor + 2 eps max|reference|: one wrong element shows, too.
  This is the tolerance that the tables show beside the largest difference.

``eps`` is that of the dtype, 2^-11 for float32 in TF32. ``floor`` is what counts as exact, since on a small
tensor PyTorch's error can be nearly nothing by luck: n eps RMS(reference), n being 4 in float32, 3 in TF32,
which PyTorch's libraries do not take for every shape that allows it, and 1 in half precision. On CUDA, where
libraries choose the order of a sum of k products by its sizes, sqrt(k) / 2 is added to n in float32. The
gradient of a bias or of a norm's parameter adds up many terms of size 1: the root of their number takes
the place of RMS(reference) there, where that is smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FACTOR = 2.0
_TF32_EPS = 2.0**-11


@dataclass(frozen=True)
class Comparison:
    """Errors against float64, and what they may be."""

    max_difference: float
    tolerance: float
    rms_difference: float
    rms_tolerance: float
    pytorch_max_difference: float

    @property
    def passed(self) -> bool:
        """Whether both errors are within their bounds; NaN is not."""
        return self.max_difference <= self.tolerance and self.rms_difference <= self.rms_tolerance

    @property
    def share(self) -> float:
        """The larger of the two errors as a part of its bound; infinite for NaN."""
        shares = (self.max_difference / self.tolerance, self.rms_difference / self.rms_tolerance)
        return max(float("inf") if share != share else share for share in shares)


def _epsilon(dtype: torch.dtype, precision: str) -> float:
    """The rounding unit that counts, of the dtype or of TF32."""
    return _TF32_EPS if dtype == torch.float32 and precision == "tf32" else torch.finfo(dtype).eps


def compare(
    result: Tensor,
    yardstick: Tensor,
    reference: Tensor,
    *,
    precision: str = "ieee",
    terms: int = 1,
    scale: float = 0.0,
) -> Comparison:
    """Holds ``result`` against ``reference`` (float64), with PyTorch's ``yardstick`` in the result's dtype.

    Args:
        result: any shape, finite or not.
        yardstick: shape and dtype of ``result``.
        reference: float64, the same shape.
        precision: "ieee" or "tf32", of float32 on CUDA.
        terms: products in the longest sum.
        scale: least size that ``reference`` counts as having, where what was added up is larger than the sum.

    Raises:
        ValueError: shape or dtype of the result is not that of PyTorch's.
    """
    if result.shape != reference.shape or result.dtype != yardstick.dtype:
        raise ValueError(
            f"the result is {list(result.shape)} {result.dtype}, PyTorch's {list(reference.shape)} "
            f"{yardstick.dtype}"
        )
    if precision == "tf32" and not result.is_cuda:
        precision = "ieee"
    eps = _epsilon(result.dtype, precision)
    units = 1.0
    if result.dtype == torch.float32:
        units = 4.0 if precision == "ieee" else 3.0
    if result.is_cuda and result.dtype == torch.float32 and precision == "ieee":
        units += terms**0.5 / 2
    floor = units * eps * max(_rms(reference), scale) + torch.finfo(result.dtype).tiny
    ours, theirs = result.double() - reference, yardstick.double() - reference
    their_max = theirs.abs().max().item()
    return Comparison(
        max_difference=ours.abs().max().item(),
        tolerance=2 * _FACTOR * their_max + 4 * floor + 2 * eps * reference.abs().max().item(),
        rms_difference=_rms(ours),
        rms_tolerance=_FACTOR * _rms(theirs) + floor,
        pytorch_max_difference=their_max,
    )


def _rms(x: Tensor) -> float:
    return x.pow(2).mean().sqrt().item()
