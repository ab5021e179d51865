"""The network that a command works with: a style of the package or a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from styleforge.cli._errors import UsageError, WorkError, one_line


def load_network(
    style: str | None, checkpoint: Path | None, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """The network in evaluation mode, of the one of ``style`` and ``checkpoint`` that is given.

    Raises:
        UsageError: there is no such style.
        WorkError: the checkpoint cannot be loaded.
    """
    from styleforge.models import available_styles, load_checkpoint, load_style

    if checkpoint is not None:
        try:
            network: nn.Module = load_checkpoint(checkpoint, map_location="cpu")
        except Exception as error:  # whatever a broken or foreign file makes the unpickler raise
            reason = one_line(error).removeprefix(f"{checkpoint}: ")
            raise WorkError(f"cannot load the checkpoint {checkpoint}: {reason}") from error
        network = network.to(device=device, dtype=dtype)
    else:
        assert style is not None  # checked with the options
        names = [entry.name for entry in available_styles()]
        if style not in names:
            import difflib

            close = difflib.get_close_matches(style, names, n=1)
            meant = f"; did you mean '{close[0]}'?" if close else ""
            known = f"the styles are {', '.join(names)}" if names else "no styles are installed"
            raise UsageError(f"unknown style '{style}': {known}{meant}")
        network = load_style(style, device=device, dtype=dtype)
    return network.eval()
