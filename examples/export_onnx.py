"""A style as ONNX, run in ONNX Runtime: `python examples/export_onnx.py`.

Needs `pip install 'styleforge[onnx]' onnxruntime`.
The file holds standard operators only: what runs it needs neither PyTorch nor styleforge.
"""

from __future__ import annotations

import argparse

import onnxruntime
import torch

import styleforge
from styleforge.models import load_style


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "path", nargs="?", default="mosaic.onnx", help="the file to write, %(default)s by default"
    )
    path: str = parser.parse_args().path
    net = load_style("mosaic", device="cpu", dtype=torch.float32).eval()
    example = 255 * torch.rand(2, 3, 256, 256)
    sizes = {0: "batch", 2: "height", 3: "width"}
    styleforge.onnx.export(net, (example,), path, dynamic_shapes=(sizes,), input_names=["picture"])

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    picture = 255 * torch.rand(1, 3, 240, 320)
    (stylised,) = session.run(None, {"picture": picture.numpy()})
    with torch.no_grad():
        difference = (torch.from_numpy(stylised) - net(picture)).abs().max().item()
    print(
        f"wrote {path}; styleforge {styleforge.__version__}, largest difference from eager {difference:.1e}"
    )


if __name__ == "__main__":
    main()
