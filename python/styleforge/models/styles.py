"""The trained styles that ship with the package."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from .checkpoints import load_checkpoint, read_metadata
from .transformer_net import TransformerNet

__all__ = ["StyleInfo", "UnknownStyleError", "available_styles", "load_style", "style_path"]

_FOLDER = Path(__file__).resolve().parent.parent / "styles"


class UnknownStyleError(ValueError):
    """There is no style of that name; the message lists those that exist."""


@dataclass(frozen=True)
class StyleInfo:
    """One style of the package.

    Attributes:
        name: what ``load_style`` takes.
        description: one line about its look.
        path: the weights, float16 safetensors.
        card: the model card (data, steps, losses, licence), Markdown.
        metadata: the text stored with the weights: training settings, source of the style picture, licence.
    """

    name: str
    description: str
    path: Path
    card: Path
    metadata: dict[str, str] = field(default_factory=dict, hash=False, compare=False)


def available_styles() -> list[StyleInfo]:
    """Lists the styles of the package.

    Returns:
        One entry a style, sorted by name.
    """
    styles = []
    for path in sorted(_FOLDER.glob("*.safetensors")):
        metadata = read_metadata(path)
        styles.append(
            StyleInfo(
                path.stem, metadata.get("description", ""), path, path.with_suffix(".md"), metadata=metadata
            )
        )
    return styles


def style_path(name: str) -> Path:
    """Returns the weights file of a style.

    Raises:
        UnknownStyleError: where there is no such style, listing those that exist.
    """
    names = [path.stem for path in sorted(_FOLDER.glob("*.safetensors"))]
    if name not in names:
        raise UnknownStyleError(f"unknown style {name!r}; available: {', '.join(names) or 'none'}")
    return _FOLDER / f"{name}.safetensors"


def load_style(
    name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> TransformerNet:
    """Loads a style of the package.

    Args:
        name: one of ``available_styles()``.
        device: where to put the network; the default device where None.
        dtype: dtype of its parameters; float16 (as stored) on an accelerator and float32 on the CPU where
            None, since half precision is slow there.

    Returns:
        The network in evaluation mode; it takes and gives RGB ``[N, 3, H, W]`` in 0..255.

    Raises:
        UnknownStyleError: where there is no such style, listing those that exist.
    """
    path = style_path(name)
    target = torch.get_default_device() if device is None else torch.device(device)
    if dtype is None:
        dtype = torch.float32 if target.type == "cpu" else torch.float16
    return load_checkpoint(path).to(device=target, dtype=dtype)
