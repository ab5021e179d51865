"""Runs a style network on 8-bit pictures of any size."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from styleforge.cli._errors import UsageError, one_line

UInt8Array = npt.NDArray[np.uint8]

# A TransformerNet halves the picture twice; other sizes would come back up to 3 pixels larger.
_MULTIPLE = 4
# Below this a reflection pad of the first 9x9 convolution, or of a 3x3 one at a quarter of the size, has
# nothing to reflect.
_SMALLEST = 16

_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|bad_alloc", re.IGNORECASE)


class PictureTooLargeError(Exception):
    """The network's intermediate results do not fit into memory."""


class NotFiniteError(Exception):
    """The network's result holds NaN or infinite values."""


def choose_device(name: str) -> torch.device:
    """Turns ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device that is there.

    Raises:
        UsageError: another name, or no such device.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, got '{name}'")
    if torch.version.cuda is None:
        raise UsageError(f"--device {name}: the installed PyTorch {torch.__version__} was built without CUDA")
    if not torch.cuda.is_available():
        raise UsageError(f"--device {name}: PyTorch finds no usable CUDA device (see `styleforge info`)")
    index = int(match.group(1) or 0)
    if index >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: the devices are cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return torch.device("cuda", index)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turns ``auto``, ``float32``, ``float16`` or ``bfloat16`` into a dtype.

    ``auto`` is float16 on CUDA and float32 elsewhere.

    Raises:
        UsageError: another name.
    """
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    try:
        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]
    except KeyError:
        raise UsageError(f"--dtype must be auto, float32, float16 or bfloat16, got '{name}'") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of PyTorch, CUDA or Python says that memory ran out."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """First pixels of equal, evenly spread tiles that cover ``length`` and overlap by ``overlap`` or more."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(index * (length - tile) / (count - 1)) for index in range(count)]


def tile_windows(length: int, tile: int, starts: list[int], overlap: int) -> Tensor:
    """Blending weights along one axis.

    Each is a raised cosine over ``overlap`` pixels at either end, so that a tile counts little where its own
    padding shows. At every pixel the weights of the tiles that cover it add up to 1; two axes' weights can
    therefore be multiplied and need no further normalisation.

    Returns:
        float32 ``[len(starts), min(tile, length)]``.
    """
    tile = min(tile, length)
    position = torch.arange(tile, dtype=torch.float64) + 0.5
    edge = torch.minimum(position, tile - position)
    shape = 0.5 - 0.5 * torch.cos(math.pi * (edge / max(overlap, 1)).clamp(max=1.0))
    total = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        total[start : start + tile] += shape
    return torch.stack([shape / total[start : start + tile] for start in starts]).float()


class Stylizer:
    """Applies a style network to batches of equally sized pictures; each result has its picture's size.

    Args:
        network: takes and returns RGB ``[N, 3, H, W]`` in 0..255; already on ``device`` and in ``dtype``.
        device: where it runs.
        dtype: of the network's input.
        tile: side of the overlapping tiles in pixels that pictures are cut into, or None to take them whole.
            Memory then depends on the tile and not on the picture, but instance norm sees each tile alone:
            colours and contrast differ from those of the whole picture and may drift across it.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Tensor] | nn.Module,
        *,
        device: torch.device,
        dtype: torch.dtype,
        tile: int | None = None,
    ) -> None:
        self._network = network
        self.device = device
        self.dtype = dtype
        self.tile = tile

    def __call__(self, pictures: UInt8Array) -> UInt8Array:
        """Stylises a batch.

        Args:
            pictures: uint8 ``[N, H, W, 3]``.

        Returns:
            uint8 ``[N, H, W, 3]``.

        Raises:
            PictureTooLargeError: memory ran out, with N > 1 perhaps only for the whole batch at once.
            NotFiniteError: the network gave NaN or infinite values.
        """
        try:
            with torch.inference_mode():
                if self.tile is not None and max(pictures.shape[1:3]) > self.tile:
                    return np.stack([self._in_tiles(picture, self.tile) for picture in pictures])
                result = self._run(torch.from_numpy(pictures))
                return self._to_uint8(result)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            message = _what_was_asked(error)
        # Outside of the except block, where the traceback no longer keeps the tensors alive.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        raise PictureTooLargeError(message)

    def _run(self, pictures: Tensor) -> Tensor:
        """uint8 ``[N, H, W, 3]`` to the network's result, ``[N, 3, H, W]`` of its dtype, on its device."""
        # Bytes cross the bus, not floats; the permuted tensor is channels_last, the layout CUDA convolutions
        # like.
        x = pictures.to(self.device, non_blocking=True).permute(0, 3, 1, 2).to(self.dtype)
        if self.device.type == "cpu":
            x = x.contiguous()
        height, width = x.shape[2:]
        bottom = max(_SMALLEST, -(-height // _MULTIPLE) * _MULTIPLE) - height
        right = max(_SMALLEST, -(-width // _MULTIPLE) * _MULTIPLE) - width
        if bottom or right:
            # Reflection, as inside the network, unless the picture is smaller than what has to be added.
            mode = "reflect" if bottom < height and right < width else "replicate"
            x = functional.pad(x, (0, right, 0, bottom), mode=mode)
        y = self._network(x)
        if y.shape[0] != x.shape[0] or y.shape[1] != 3 or y.shape[2] < height or y.shape[3] < width:
            raise RuntimeError(
                f"the network must return [{x.shape[0]}, 3, {x.shape[2]}, {x.shape[3]}], got {list(y.shape)}"
            )
        return y[:, :, :height, :width]

    def _to_uint8(self, result: Tensor) -> UInt8Array:
        """Rounds ``[N, 3, H, W]`` to uint8 ``[N, H, W, 3]`` in host memory."""
        finite = torch.isfinite(result).all()
        rounded = result.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
        if not bool(finite):
            advice = "; try --dtype float32" if self.dtype != torch.float32 else ""
            raise NotFiniteError(f"the network gave NaN or infinite values in {str(self.dtype)[6:]}{advice}")
        array: UInt8Array = rounded.numpy()
        return array

    def _in_tiles(self, picture: UInt8Array, tile: int) -> UInt8Array:
        """Stylises uint8 ``[H, W, 3]`` tile by tile and blends the overlaps."""
        height, width = picture.shape[:2]
        overlap = tile // 4
        rows, columns = tile_starts(height, tile, overlap), tile_starts(width, tile, overlap)
        row_windows = tile_windows(height, tile, rows, overlap)
        column_windows = tile_windows(width, tile, columns, overlap)
        source = torch.from_numpy(picture)
        # In host memory: the sum is small beside the network's needs, but must not compete with them on the
        # GPU.
        blended = torch.zeros(3, height, width)
        for row, row_window in zip(rows, row_windows, strict=True):
            for column, column_window in zip(columns, column_windows, strict=True):
                part = source[row : row + tile, column : column + tile].unsqueeze(0)
                result = self._run(part)[0].float().cpu()
                window = row_window.unsqueeze(1) * column_window
                blended[:, row : row + part.shape[1], column : column + part.shape[2]] += result * window
        stylised: UInt8Array = self._to_uint8(blended.unsqueeze(0))[0]
        return stylised


def _what_was_asked(error: BaseException) -> str:
    """The telling part of an out-of-memory message; PyTorch's goes on for a paragraph."""
    asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    if asked is not None:
        return f"tried to allocate {asked.group(1)}"
    return one_line(error)[:200]
