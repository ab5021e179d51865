"""A style as a TorchScript file, loaded again: `python examples/export_torchscript.py`.

What loads it needs `import styleforge` in Python, libstyleforge.so in C++ (cpp/run_torchscript.cpp).
"""

from __future__ import annotations

import argparse

import torch

import styleforge  # registers the operators: needed to load the file as well
from styleforge.models import load_style


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "path", nargs="?", default="mosaic.pt", help="the file to write, %(default)s by default"
    )
    path: str = parser.parse_args().path
    net = load_style("mosaic", device="cpu", dtype=torch.float32).eval()
    torch.jit.script(net).save(path)

    loaded = torch.jit.load(path)
    picture = 255 * torch.rand(1, 3, 240, 320)  # any size
    with torch.no_grad():
        difference = (loaded(picture) - net(picture)).abs().max().item()
    print(
        f"wrote {path}; styleforge {styleforge.__version__}, largest difference from eager {difference:.1e}"
    )


if __name__ == "__main__":
    main()
