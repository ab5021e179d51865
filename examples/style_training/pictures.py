"""Content pictures: a folder decoded once into memory, random crops made on the training device."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def read_picture(path: str | Path, *, short_side: int | None = None, long_side: int | None = None) -> Tensor:
    """Decodes a picture to RGB uint8 ``[3, H, W]``, turned upright, scaled down to at most the side given.

    Raises:
        OSError: where the file is missing or no picture.
    """
    with Image.open(path) as opened:
        scale = 1.0
        if short_side is not None:
            scale = min(scale, short_side / min(opened.size))
        if long_side is not None:
            scale = min(scale, long_side / max(opened.size))
        size = (max(1, round(opened.width * scale)), max(1, round(opened.height * scale)))
        opened.draft("RGB", size)  # lets the JPEG decoder skip detail that scaling would drop
        picture = opened.convert("RGB")
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        # The orientation tag is read from `opened`; `convert` keeps a copy of it.
        picture = ImageOps.exif_transpose(picture)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def write_picture(picture: Tensor, path: str | Path) -> None:
    """Writes RGB ``[3, H, W]`` in 0..255, clamped and rounded, in the format of the file's ending."""
    pixels = picture.detach().float().clamp(0, 255).round().to("cpu", torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)


class ContentPictures:
    """All pictures of a folder, decoded, from which batches of random crops are drawn.

    Args:
        folder: searched with its subfolders for jpg, png and webp files.
        image_size: side of the crops in pixels.
        device: where the decoded pictures live and the crops are made.
        seed: of the choice of pictures and crops.
        max_pictures: decode at most this many, chosen at random.

    Attributes:
        skipped: files that could not be used, with the reason.

    Raises:
        ValueError: where the folder has no usable picture.
    """

    def __init__(
        self, folder: str | Path, image_size: int, device: torch.device, seed: int, max_pictures: int = 4000
    ) -> None:
        paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
        self.random = random.Random(seed)
        if len(paths) > max_pictures:
            paths = sorted(self.random.sample(paths, max_pictures))
        self.image_size = image_size
        self.device = device
        self.skipped: list[str] = []
        with ThreadPoolExecutor() as pool:
            decoded = list(pool.map(self._decode, paths))
        self.pictures = [picture.to(device) for picture in decoded if picture is not None]
        if not self.pictures:
            raise ValueError(
                f"{folder}: no picture ({', '.join(SUFFIXES)}) of at least {image_size} px a side found"
            )

    def _decode(self, path: Path) -> Tensor | None:
        try:
            # Twice the crop's side keeps enough detail for the largest crops below.
            picture = read_picture(path, short_side=2 * self.image_size)
        except (OSError, UnidentifiedImageError, ValueError) as error:
            self.skipped.append(f"{path}: {error}")
            return None
        if min(picture.shape[1:]) < self.image_size:
            self.skipped.append(f"{path}: smaller than {self.image_size} px")
            return None
        return picture

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, batch_size: int) -> Tensor:
        """Draws crops of random place and scale, half mirrored: float32 ``[N, 3, S, S]`` in 0..255."""
        crops = []
        size = self.image_size
        for _ in range(batch_size):
            picture = self.random.choice(self.pictures)
            height, width = picture.shape[1:]
            side = self.random.randint(size, min(height, width, 2 * size))
            top, left = self.random.randint(0, height - side), self.random.randint(0, width - side)
            crop = picture[None, :, top : top + side, left : left + side].float()
            if side != size:
                crop = F.interpolate(
                    crop, size=(size, size), mode="bilinear", antialias=True, align_corners=False
                )
            crops.append(crop.flip(3) if self.random.random() < 0.5 else crop)
        return torch.cat(crops)

    def state(self) -> str:
        """The random state as text, for a checkpoint."""
        version, internal, gauss = self.random.getstate()
        return f"{version};{','.join(map(str, internal))};{'' if gauss is None else gauss}"

    def restore(self, state: str) -> None:
        """Takes up a random state of ``state()``."""
        version, internal, gauss = state.split(";")
        numbers = tuple(int(number) for number in internal.split(","))
        self.random.setstate((int(version), numbers, float(gauss) if gauss else None))
