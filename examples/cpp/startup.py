"""Start to first output: the C++ programs against Python, each a process of its own, on the same picture.

python examples/cpp/startup.py build/examples        after building examples/cpp there
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import styleforge
from styleforge.models import load_style

TORCHSCRIPT = """
import sys, torch, styleforge
with torch.no_grad():
    torch.save(torch.jit.load(sys.argv[1])(torch.load(sys.argv[2])), sys.argv[3])
"""
AOTI = """
import sys, torch, styleforge
with torch.no_grad():
    torch.save(torch._inductor.aoti_load_package(sys.argv[1])(torch.load(sys.argv[2])), sys.argv[3])
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("programs", type=Path, help="the folder with run_torchscript and run_aoti")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--size", type=int, default=256, help="side of the picture in pixels")
    arguments = parser.parse_args()

    net = load_style("mosaic", device="cpu", dtype=torch.float32)
    x = 255 * torch.rand(1, 3, arguments.size, arguments.size)
    libraries = Path(styleforge.diagnostics()["library"]).parent
    environment = dict(os.environ, STYLEFORGE_LIBRARY_PATH=str(libraries))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        work = Path(folder)
        torch.save(x, work / "x.pt")
        torch.jit.script(net).save(str(work / "net.pt"))
        program = torch.export.export(net, (x,))
        torch._inductor.aoti_compile_and_package(program, package_path=str(work / "net.pt2"))
        for name, model, script in (
            ("run_torchscript", "net.pt", TORCHSCRIPT),
            ("run_aoti", "net.pt2", AOTI),
        ):
            files = [str(work / name) for name in (model, "x.pt", "y.pt")]
            commands = {
                "C++": [str(arguments.programs / name), *files],
                "Python": [sys.executable, "-c", script, *files],
            }
            for language, command in commands.items():
                seconds = []
                for _ in range(arguments.runs + 1):  # the first one fills the file cache
                    start = time.perf_counter()
                    subprocess.run(command, check=True, capture_output=True, env=environment)
                    seconds.append(time.perf_counter() - start)
                print(f"{name:16} {language:7} {statistics.median(seconds[1:]):.2f} s", flush=True)


if __name__ == "__main__":
    main()
