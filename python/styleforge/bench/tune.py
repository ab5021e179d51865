"""Times every way to cut an instance norm: ``python -m styleforge.bench.tune``.

What ``csrc/cuda/instance_norm/schedule.cu`` chooses was read off this table. Run it again on another GPU and
compare the line marked ``default`` with the best ones.
"""

from __future__ import annotations

import itertools
import os
from functools import partial

import torch

import styleforge
from styleforge.bench.timing import graph_time
from styleforge.ops import fused_instance_norm

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
    else:
        for cluster, threads in itertools.product((1, 2, 4, 8, 16), (256, 512, 1024)):
            variants.append(("", f"cluster={cluster},threads={threads}"))
            if cluster > 1:
                variants.append(("", f"cluster={cluster},threads={threads},shared=118000"))
            variants.append(("plane", f"cluster={cluster},threads={threads}"))
        variants += [("split", f"tile={tile}") for tile in (512, 1024, 2048)]
        variants += [("ticket", f"lead={lead}") for lead in (132, 264, 528, 1056, 2112)]
        variants += [("plane", ""), ("split", ""), ("ticket", ""), ("stream", "")]
        for tile, stages, cache in itertools.product((8, 16, 24, 32), (1, 2, 4, 6, 7, 13), (1, 2, 3, 4)):
            if tile * stages <= 224:
                variants.append(("stream", f"bytes={tile * 1024},stages={stages},cache={cache}"))
        variants += [("stream", f"first={first}") for first in (1, 2, 3, 4, 6)]
        variants += [("stream", f"order={order}") for order in (1, 2)]
    return variants


def main() -> None:
    """Prints the default and the five best variants of each case."""
    print(torch.cuda.get_device_name())
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
            default = next(r for r in results if r[1] == "default")
            seen: set[str] = set()
            for time, name, where in [default, *sorted(results)]:
                if name not in seen and len(seen) < 7 and time < float("inf"):
                    seen.add(name)
                    print(f"   {time:8.2f} us  {name:44s} {where}", flush=True)
    os.environ.pop("STYLEFORGE_PATH")
    os.environ.pop("STYLEFORGE_TUNE")


if __name__ == "__main__":
    main()
