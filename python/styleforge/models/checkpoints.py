"""Checkpoints of the style-transfer network: ``.pth``, ``.pt``, ``.model``, ``.safetensors``."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .transformer_net import TransformerNet

__all__ = [
    "CheckpointError",
    "check_state_dict",
    "clean_state_dict",
    "infer_base_channels",
    "load_checkpoint",
    "read_metadata",
    "read_state_dict",
    "save_checkpoint",
]

_PICKLE_SUFFIXES = (".pth", ".pt", ".model")
_SUFFIXES = (*_PICKLE_SUFFIXES, ".safetensors")
# Checkpoints written before PyTorch 0.4 carry the statistics that InstanceNorm2d kept but never used.
_UNUSED_SUFFIXES = (".running_mean", ".running_var", ".num_batches_tracked")
_NESTED_KEYS = ("state_dict", "model_state_dict", "model", "net")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with the reason in one line.

    Attributes:
        missing: names of parameters that the network needs and the checkpoint lacks.
        unexpected: names in the checkpoint that the network does not have.
        mismatched: names whose shapes differ.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        mismatched: Iterable[str] = (),
    ) -> None:
        super().__init__(message)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.mismatched = tuple(mismatched)


def _listing(names: Iterable[str], limit: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def clean_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Unwraps nested dicts, strips ``module.`` and ``_orig_mod.`` prefixes, drops unused running statistics.

    Args:
        state_dict: what a checkpoint file held: parameters, or a dict with them under ``state_dict``,
            ``model_state_dict``, ``model`` or ``net``.

    Returns:
        Parameter name to tensor, in the order of the file.

    Raises:
        CheckpointError: where an entry is not a tensor.
    """
    entries: Mapping[str, Any] = state_dict
    nested = next((key for key in _NESTED_KEYS if isinstance(entries.get(key), Mapping)), None)
    while nested is not None:
        entries = entries[nested]
        nested = next((key for key in _NESTED_KEYS if isinstance(entries.get(key), Mapping)), None)
    tensors: dict[str, Tensor] = {}
    for key, value in entries.items():
        name = str(key)
        # DataParallel and torch.compile each add a prefix; a training script may have used both.
        while name.startswith(("module.", "_orig_mod.")):
            name = name.split(".", 1)[1]
        if name.endswith(_UNUSED_SUFFIXES):
            continue
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"checkpoint entry {key!r} must be a tensor, got {type(value).__name__}; "
                "save model.state_dict() instead of the training state"
            )
        tensors[name] = value
    return tensors


def infer_base_channels(state_dict: Mapping[str, Tensor], source: str = "state dict") -> int:
    """Reads the network's width off the first convolution's weight ``[base_channels, 3, 9, 9]``.

    Raises:
        CheckpointError: where that weight is missing or has another shape.
    """
    name = "conv1.conv2d.weight"
    weight = state_dict.get(name)
    if weight is None:
        raise CheckpointError(
            f"{source}: {name} is missing, so this is no TransformerNet checkpoint "
            f"(found: {_listing(state_dict) or 'nothing'})",
            missing=[name],
        )
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (3, 9, 9) or weight.shape[0] < 1:
        raise CheckpointError(
            f"{source}: {name} must have shape [base_channels, 3, 9, 9], got {list(weight.shape)}",
            mismatched=[name],
        )
    return int(weight.shape[0])


def check_state_dict(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str = "state dict"
) -> None:
    """Compares names and shapes with those that the network has.

    Args:
        tensors: cleaned parameters of a checkpoint.
        expected: the network's own state dict (meta tensors will do).
        source: what the message calls the checkpoint.

    Raises:
        CheckpointError: one line naming what is missing, unexpected or of another shape.
    """
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    mismatched = [
        name for name in expected if name in tensors and tensors[name].shape != expected[name].shape
    ]
    parts = []
    if missing:
        parts.append(f"missing {_listing(missing)}")
    if unexpected:
        parts.append(f"unexpected {_listing(unexpected)}")
    if mismatched:
        shapes = (f"{n} {list(tensors[n].shape)} instead of {list(expected[n].shape)}" for n in mismatched)
        parts.append(f"wrong shape: {_listing(shapes)}")
    if parts:
        raise CheckpointError(
            f"{source} does not fit TransformerNet: " + "; ".join(parts),
            missing=missing,
            unexpected=unexpected,
            mismatched=mismatched,
        )


def _check_path(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise CheckpointError(f"{path}: a checkpoint must end in one of {', '.join(_SUFFIXES)}")
    return path


def read_state_dict(
    path: str | os.PathLike[str], map_location: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Reads the parameters of a checkpoint file; no code in the file is ever run.

    Args:
        path: ``.pth``, ``.pt`` or ``.model`` (PyTorch, read with ``weights_only=True``) or ``.safetensors``.
        map_location: device to put the tensors on.

    Returns:
        Parameter name to tensor, cleaned as ``clean_state_dict`` says.

    Raises:
        FileNotFoundError: where there is no such file.
        CheckpointError: where the file is of another type, broken, or holds more than tensors.
    """
    path = _check_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    if path.suffix.lower() == ".safetensors":
        try:
            return clean_state_dict(safetensors.torch.load_file(path, device=str(map_location)))
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:  # whose text is advice to run what the file holds
        raise CheckpointError(
            f"{path}: not a PyTorch checkpoint, or it holds more than tensors; "
            "a pickled module has to be saved again as model.state_dict()"
        ) from error
    except (EOFError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: not a readable PyTorch checkpoint: {reason}") from error
    if isinstance(state, nn.Module) or not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: must hold a state dict, got {type(state).__name__}")
    return clean_state_dict(state)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Reads the text that is stored beside the tensors.

    Args:
        path: ``.safetensors``, or another format of checkpoints, which has none.

    Returns:
        Key to text; empty where there is none.

    Raises:
        FileNotFoundError: where there is no such file.
    """
    path = _check_path(path)
    if path.suffix.lower() != ".safetensors":
        return {}
    with safetensors.safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def load_checkpoint(path: str | os.PathLike[str], map_location: str | torch.device = "cpu") -> TransformerNet:
    """Loads a style checkpoint, such as the public ones of pytorch/examples, into a fused network.

    Args:
        path: ``.pth``, ``.pt``, ``.model`` or ``.safetensors``.
        map_location: device of the network.

    Returns:
        The network in evaluation mode, in the dtype that the file has.

    Raises:
        FileNotFoundError: where there is no such file.
        CheckpointError: where the file cannot be read or does not fit, naming the parameters.
    """
    from .transformer_net import TransformerNet

    return TransformerNet.from_state_dict(read_state_dict(path, map_location), source=str(path)).eval()


def save_checkpoint(
    model: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a network's parameters; the file appears whole or not at all.

    Args:
        model: the network or its state dict.
        path: ``.pth``, ``.pt``, ``.model`` or ``.safetensors``, which also decides the format.
        dtype: convert floating-point parameters to this dtype first, such as ``torch.float16``.
        metadata: text to store beside the tensors; ``.safetensors`` only.

    Raises:
        CheckpointError: for another file ending, or metadata in a format that has none.
    """
    path = _check_path(path)
    is_safetensors = path.suffix.lower() == ".safetensors"
    if metadata and not is_safetensors:
        raise CheckpointError(f"{path}: metadata can only be stored in a .safetensors file")
    state = clean_state_dict(model.state_dict() if isinstance(model, nn.Module) else model)
    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in state.items()
    }
    # Written beside the target and renamed, so that an interrupted run leaves the old file intact.
    part = path.with_name(path.name + ".part")
    if is_safetensors:
        # Not save_file: it makes files that only their owner may read.
        part.write_bytes(safetensors.torch.save(tensors, dict(metadata) if metadata else None))
    else:
        torch.save(tensors, part)
    os.replace(part, path)
