"""Times every way to cut an instance norm or a convolution.

    python -m styleforge.bench.tune [norm] [conv]

What ``schedule.cu`` in ``csrc/cuda/instance_norm`` and ``csrc/cuda/conv_instance_norm`` chooses was read off
these tables. Run it again on another GPU and compare the line marked ``default`` with the best ones.
"""

from __future__ import annotations

import argparse
import itertools
import os
from functools import partial

import torch

import styleforge
from styleforge.bench.operators import CONV_CASES
from styleforge.bench.timing import graph_time
from styleforge.ops import fused_conv_instance_norm_relu, fused_instance_norm

NCHW = [(4, 64, 256, 256), (1, 3, 512, 512), (1, 64, 1024, 1024), (16, 128, 128, 128), (1, 128, 128, 128)]
CHANNELS_LAST = [
    (1, 64, 64, 64),
    (1, 128, 32, 32),
    (1, 256, 64, 64),
    (1, 128, 128, 128),
    (1, 64, 256, 256),
    (8, 128, 64, 64),
    (1, 32, 512, 512),
]


def _variants(channels_last: bool) -> list[tuple[str, str]]:
    """(STYLEFORGE_PATH, STYLEFORGE_TUNE) of each variant."""
    variants = [("", "")]
    if channels_last:
        for lanes, cluster, threads in itertools.product((4, 8, 16), (1, 2, 4, 8, 16), (128, 256, 512)):
            variants.append(("", f"lanes={lanes},cluster={cluster},threads={threads}"))
            if cluster > 1:
                variants.append(("", f"lanes={lanes},cluster={cluster},threads={threads},shared=118000"))
        variants.append(("split", ""))
        variants += [("stream", f"ahead={ahead}") for ahead in (2, 3, 4, 6, 8, 12)]
    else:
        for cluster, threads in itertools.product((1, 2, 4, 8, 16), (256, 512, 1024)):
            variants.append(("", f"cluster={cluster},threads={threads}"))
            if cluster > 1:
                variants.append(("", f"cluster={cluster},threads={threads},shared=118000"))
            variants.append(("plane", f"cluster={cluster},threads={threads}"))
        for cluster, copies in itertools.product((1, 2, 4, 8, 16), (1, 2)):
            variants.append(("plane", f"cluster={cluster},copies={copies},registers=2"))
        variants += [("split", f"tile={tile}") for tile in (512, 1024, 2048)]
        variants += [("ticket", f"lead={lead}") for lead in (132, 264, 528, 1056, 2112)]
        variants += [("plane", ""), ("split", ""), ("ticket", ""), ("stream", "")]
        for tile, stages, cache in itertools.product((8, 16, 24, 32), (1, 2, 4, 6, 7, 13), (1, 2, 3, 4)):
            if tile * stages <= 224:
                variants.append(("stream", f"bytes={tile * 1024},stages={stages},cache={cache}"))
        variants += [("stream", f"first={first}") for first in (1, 2, 3, 4, 6)]
        variants += [("stream", f"order={order}") for order in (1, 2)]
    return variants


def _print_best(results: list[tuple[float, str, str]]) -> None:
    default = next(r for r in results if r[1] == "default")
    seen: set[str] = set()
    for time, name, where in [default, *sorted(results)]:
        if name not in seen and len(seen) < 7 and time < float("inf"):
            seen.add(name)
            print(f"   {time:8.2f} us  {name:44s} {where}", flush=True)


def _conv() -> None:
    """Channels_last convolutions by columns and rows of a tile, stages, tiles of a block, passes."""
    kinds = ((torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee"))
    for case, (dtype, precision) in itertools.product(CONV_CASES, kinds):
        batch, cin, cout, size, kernel, stride = case
        shape = (batch, cin, size, size)
        x = torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(cout, cin, kernel, kernel, device="cuda", dtype=dtype) / (cin * kernel**2) ** 0.5
        weight = weight.contiguous(memory_format=torch.channels_last)
        call = partial(
            fused_conv_instance_norm_relu, x, weight, stride=stride, padding=kernel // 2, precision=precision
        )
        tunes = [""] + [
            f"columns={columns},height={height},weights={weights}"
            for columns, height, weights in itertools.product((32, 64, 128), (4, 8), (3, 4, 6, 8))
        ]
        tunes += [
            f"columns={columns},height={height},tiles={tiles}"
            for columns, height, tiles in itertools.product((32, 64, 128), (4, 8), (1, 2, 3, 4))
        ]
        tunes += [
            f"share=2,columns={columns},height={height}" for columns, height in ((32, 4), (64, 4), (64, 8))
        ]
        tunes += ["same_input=1", "split=1", "split=2"]
        results: list[tuple[float, str, str]] = []
        tiles = [("mma", f"tile={tile}" if tile else "") for tile in range(8)]
        for path, tune in [*itertools.product(("", "sm90:two_pass"), tunes), *tiles]:
            os.environ["STYLEFORGE_PATH"] = path
            os.environ["STYLEFORGE_CONV_TUNE"] = tune
            with torch.inference_mode():
                time = graph_time([call], repeats=10)
            results.append((time, f"{path} {tune}".strip() or "default", styleforge.last_path()))
        os.environ.pop("STYLEFORGE_PATH")
        os.environ.pop("STYLEFORGE_CONV_TUNE")
        print(f"conv {batch}x{cin}->{cout} @{size} k{kernel}s{stride} {str(dtype)[6:]} {precision}")
        _print_best(results)


def _norm() -> None:
    for channels_last, shapes in ((True, CHANNELS_LAST), (False, NCHW)):
        for shape, dtype in itertools.product(shapes, (torch.float16, torch.float32)):
            nbytes = torch.empty(shape, dtype=dtype, device="meta").nbytes
            # The convolution's result is in the L2 cache when the norm starts; large tensors are not.
            count = max(1, min(4, int(2e8 // nbytes))) if not channels_last else 1
            memory_format = torch.channels_last if channels_last else torch.contiguous_format
            xs = [
                torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=memory_format)
                for _ in range(count)
            ]
            weight = torch.randn(shape[1], device="cuda", dtype=dtype)

            calls = [partial(fused_instance_norm, x, weight, weight, activation="relu") for x in xs]
            results: list[tuple[float, str, str]] = []
            for path, tune in _variants(channels_last):
                os.environ["STYLEFORGE_PATH"] = path
                os.environ["STYLEFORGE_TUNE"] = tune
                try:
                    with torch.inference_mode():
                        time = graph_time(calls, repeats=10)
                except RuntimeError as error:
                    results.append((float("inf"), f"{tune}: {error}", ""))
                    torch.cuda.synchronize()
                    continue
                results.append((time, f"{path} {tune}".strip() or "default", styleforge.last_path()))
            rate = f"{2 * nbytes / min(results)[0] / 1e6:.2f} TB/s"
            layout = "nhwc" if channels_last else "nchw"
            print(f"{'x'.join(map(str, shape))} {str(dtype)[6:]} {layout}: best {rate}")
            _print_best(results)
    os.environ.pop("STYLEFORGE_PATH")
    os.environ.pop("STYLEFORGE_TUNE")


def main() -> None:
    """Prints the default and the best variants of each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", choices=("norm", "conv"), default=["norm", "conv"])
    groups = parser.parse_args().groups
    print(torch.cuda.get_device_name())
    if "norm" in groups:
        _norm()
    if "conv" in groups:
        _conv()


if __name__ == "__main__":
    main()
