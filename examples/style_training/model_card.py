#!/usr/bin/env python3
"""Writes the model card of a style beside its weights, from the settings that ``train_style.py`` stored.

    model_card.py mosaic.safetensors --description "..." --license "..." --style-credit "..." ...

What is given here is stored with the weights as well, so that a second call without it writes the same card.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from string import Template
from typing import Any

import safetensors.torch
from safetensors import safe_open

CREDITS = ("description", "license", "style_credit", "data_credit", "vgg_credit")

_CARD = Template("""\
# Style `$name`

$description

| | |
|---|---|
| network | TransformerNet (Johnson et al., 2016), $parameters parameters, float16 safetensors ($size MB) |
| input and output | RGB `[N, 3, H, W]` in 0..255; the output is not clamped |
| style picture | $style_credit |
| content pictures | $data_credit |
| perceptual network | $vgg_credit |
| licence of the weights | $license |

## Training

$steps steps of $batch_size random crops of $image_size x $image_size px ($pictures photos, mirrored and
scaled at random), Adam, learning rate $lr ($lr_schedule, warm-up of 100 steps), $arithmetic, seed $seed,
$seconds s. The style picture was scaled to a long side of $style_size px, which sets the size of the
texture on the photo.

| term | definition | weight | value at the end (weighted) |
|---|---|---|---|
| content | squared error of VGG-19 $content_layer, over the target's mean square | $content_weight | \
$content_loss |
| style | squared error of the Gram matrices of $style_layers, over the targets' squared norms, averaged | \
$style_weight | $style_loss |
| total variation | mean squared difference of neighbouring pixels, in 0..1 | $tv_weight | $variation_loss |

## Use

```python
net = styleforge.models.load_style("$name", device="cuda")
```

```sh
styleforge stylize photo.jpg out.png --style $name
```

The texture has a fixed size in pixels: photos of 512 to 1280 px a side suit it best. It was trained on
photos of landscapes, buildings, animals, plants and things; faces are recognisable at most in outline.
""")


def card_values(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """Collects what the card shows.

    Raises:
        ValueError: where the file was not written by ``train_style.py``, or a credit is missing.
    """
    if "training" not in metadata:
        raise ValueError(f"{path}: has no training settings; was it written by train_style.py?")
    missing = [name for name in CREDITS if not metadata.get(name)]
    if missing:
        raise ValueError(f"{path}: give --{', --'.join(name.replace('_', '-') for name in missing)}")
    settings = json.loads(metadata["training"])
    losses = settings.pop("final_losses")
    parameters = sum(tensor.numel() for tensor in safetensors.torch.load_file(path).values())
    return {
        **settings,
        **{name: metadata[name] for name in CREDITS},
        **{f"{term}_loss": f"{value:.4f}" for term, value in losses.items()},
        "style_layers": settings["style_layers"].replace(",", ", "),
        "arithmetic": "bfloat16 autocast with float32 Gram matrices" if settings["amp"] else "float32",
        "name": path.stem,
        "parameters": f"{parameters:,}",
        "size": f"{path.stat().st_size / 1e6:.1f}",
        "steps": f"{settings['steps']:,}",
    }


def write_card(path: Path, credits: dict[str, str]) -> Path:
    """Stores the credits with the weights and writes the card; returns the card's path.

    Args:
        path: the weights, ``.safetensors``.
        credits: texts to add or replace, under the names in ``CREDITS``.

    Raises:
        ValueError: as ``card_values``.
    """
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
    metadata |= credits
    values = card_values(path, metadata)
    if credits:
        part = path.with_name(path.name + ".part")
        part.write_bytes(safetensors.torch.save(safetensors.torch.load_file(path), metadata))
        part.replace(path)
    card = path.with_suffix(".md")
    card.write_text(_CARD.substitute(values), encoding="utf-8")
    return card


def main() -> None:
    """Reads the command line and writes the card."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", type=Path)
    for name in CREDITS:
        parser.add_argument(f"--{name.replace('_', '-')}")
    options = vars(parser.parse_args())
    path = options.pop("weights")
    try:
        print(write_card(path, {name: text for name, text in options.items() if text}))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
