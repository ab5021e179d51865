"""A style as an AOTInductor package, any batch, height and width: `python examples/export_aoti.py`.

What loads it needs `import styleforge` in Python, libstyleforge.so in C++ (cpp/run_aoti.cpp).
"""

from __future__ import annotations

import argparse

import torch
from torch.export import Dim

import styleforge
from styleforge.models import load_style


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "path", nargs="?", default="mosaic.pt2", help="the file to write, %(default)s by default"
    )
    path: str = parser.parse_args().path
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = load_style("mosaic", device=device).eval()
    dtype = next(net.parameters()).dtype
    example = 255 * torch.rand(2, 3, 256, 256, device=device, dtype=dtype)
    with torch.no_grad():
        sizes = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
        program = torch.export.export(net, (example,), dynamic_shapes=(sizes,))
        torch._inductor.aoti_compile_and_package(program, package_path=path)

        loaded = torch._inductor.aoti_load_package(path)
        picture = 255 * torch.rand(1, 3, 240, 320, device=device, dtype=dtype)
        difference = (loaded(picture) - net(picture)).abs().max().item()
    print(
        f"wrote {path}; styleforge {styleforge.__version__}, largest difference from eager {difference:.1e}"
    )


if __name__ == "__main__":
    main()
