"""Makes the picture at the top of the README: a photo and two styles side by side.

    python docs/picture.py docs/picture.jpg

The photo and the styles are those that ship with the sources; `styleforge stylize` paints them.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

PHOTO = Path(__file__).resolve().parents[1] / "examples" / "photos" / "photo.jpg"
STYLES = ("mosaic", "brush")
WIDTH, GAP = 480, 6  # pixels: of each of the three, and white between them


def main(target: str) -> None:
    """Writes the picture as JPEG, below 200 KB."""
    with tempfile.TemporaryDirectory() as folder:
        files = [PHOTO]
        for style in STYLES:
            painted = Path(folder) / f"{style}.png"
            command = ["stylize", str(PHOTO), str(painted), "--style", style, "--size", "768"]
            subprocess.run([sys.executable, "-m", "styleforge", *command], check=True)
            files.append(painted)
        pictures = [Image.open(file).convert("RGB") for file in files]
        height = round(WIDTH * pictures[0].height / pictures[0].width)
        row = Image.new("RGB", (len(pictures) * (WIDTH + GAP) - GAP, height), "white")
        for place, picture in enumerate(pictures):
            small = picture.resize((WIDTH, height), Image.Resampling.LANCZOS)
            row.paste(small, (place * (WIDTH + GAP), 0))
    row.save(target, quality=80, optimize=True, progressive=True)
    print(f"wrote {target}: {row.width}x{row.height}, {Path(target).stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
