"""The CUDA library, built on the user's machine from the sources that the package carries.

An installed styleforge without a CUDA library that fits (a wheel built for the CPU, say, or another CUDA
major version) builds one when it is first imported on a machine with a GPU and nvcc, for that machine's GPUs.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
import time
from pathlib import Path

import torch

from styleforge import _library
from styleforge._version import __version__
from styleforge.build import cache, compiler
from styleforge.build.errors import StyleforgeBuildError
from styleforge.build.progress import Progress

_WHAT = "the CUDA library"
_FILE = "libstyleforge_cuda.so"
_PACKAGE = Path(__file__).resolve().parents[1]


def cuda_library(*, archs: str | None = None, verbose: bool = True) -> Path:
    """Builds the CUDA library, or takes it from the cache, and loads it where PyTorch has CUDA.

    Does nothing where a CUDA library is loaded already. Takes minutes the first time. Where styleforge was
    imported without one, PyTorch warns once that kernels are overridden: the composites, by the real ones.

    Args:
        archs: CUDA architectures, "80;90a" say; by default ``STYLEFORGE_CUDA_ARCHS``, else
            ``TORCH_CUDA_ARCH_LIST``, else those of this machine's GPUs.
        verbose: Whether to print progress on the standard error stream.

    Returns:
        The library's path.

    Raises:
        CompilerError: nvcc or CMake failed; the message has the first error and the log's path.
        StyleforgeBuildError: Something that is needed is missing, or building is forbidden.
        StyleforgeLibraryError: The library was built and cannot be loaded.
    """
    if _library.cuda_available and _library.cuda_library_path is not None:
        return _library.cuda_library_path
    sources = _checkout() or _installed()
    if sources is None:
        raise StyleforgeBuildError(
            f"{_WHAT} was not built: its sources are not in {_PACKAGE}; install styleforge"
        )
    path = _build(sources, _archs(archs), Progress(_WHAT, verbose), retry=True)
    if torch.version.cuda is not None:
        _library.use_cuda(path)
    return path


def at_import() -> Path | None:
    """The CUDA library for the import of an installed package: from the cache, or built now.

    What a compiler refused once is not tried again, so that only one import waits for it.

    Returns:
        The library's path; None where first-use building does not apply: ``STYLEFORGE_LIBRARY_PATH`` names
        the one folder to use, or the package lies in a checkout.

    Raises:
        StyleforgeBuildError: It could not be built, with the reason.
    """
    sources = _installed()
    if os.environ.get("STYLEFORGE_LIBRARY_PATH") or _checkout() or sources is None:
        return None
    gpus = compiler.gpu_archs()
    if not gpus:
        raise StyleforgeBuildError("there is no GPU here (nvidia-smi lists none)")
    return _build(sources, _archs(None, gpus), Progress(_WHAT, True), retry=False)


def _build(sources: Path, archs: str, progress: Progress, *, retry: bool) -> Path:
    assert _library.library_path is not None
    main = _library.library_path
    cuda = torch.version.cuda
    # The major version decides which PyTorch can load the result; with one that has no CUDA any will do.
    major = cuda.partition(".")[0] if cuda else compiler.find_nvcc().major
    prefix = f"cuda{major}-{__version__}-{cache.key(_digest(sources), platform.machine())}-"
    found = _covering(prefix, _tokens(archs))
    if found is not None:
        return found
    entry = cache.Entry(prefix + "_".join(sorted(_tokens(archs))), _FILE)

    def build(work: Path, log: Path) -> Path:
        nvcc = compiler.find_nvcc(cuda)
        cmake, ninja = compiler.find_tool("cmake"), compiler.find_tool("ninja")
        progress.say(
            f"building {_WHAT} for CUDA {nvcc.version}, architectures {archs}: once, this takes minutes "
            f"(log: {log})"
        )
        begin = time.monotonic()
        try:
            compiler.run(
                [
                    *(str(cmake), "-G", "Ninja", "-S", str(sources), "-B", str(work)),
                    f"-DCMAKE_MAKE_PROGRAM={ninja}",
                    f"-DPython_EXECUTABLE={sys.executable}",
                    f"-DCMAKE_CUDA_COMPILER={nvcc.path}",
                    f"-DSTYLEFORGE_MAIN_LIBRARY={main}",
                    *("-DSTYLEFORGE_CUDA=ON", f"-DSTYLEFORGE_CUDA_ARCHS={archs}"),
                ],
                log,
                what=_WHAT,
            )
            jobs = [f"-j{os.environ['MAX_JOBS']}"] if os.environ.get("MAX_JOBS") else []
            command = [str(ninja), "-C", str(work), *jobs, "styleforge_cuda"]
            compiler.run(command, log, what=_WHAT, on_line=progress.line)
        finally:
            progress.end()
        progress.say(f"built {_WHAT} in {time.monotonic() - begin:.0f} s")
        return work / _FILE

    return cache.build_once(entry, build, what=_WHAT, say=progress.say, retry=retry)


def _archs(requested: str | None, gpus: list[str] | None = None) -> str:
    """The architectures to build for, ";" between them."""
    for text in (requested, os.environ.get("STYLEFORGE_CUDA_ARCHS"), os.environ.get("TORCH_CUDA_ARCH_LIST")):
        if text and text.strip():
            return ";".join(re.split(r"[;, ]+", text.strip()))
    found = compiler.gpu_archs() if gpus is None else gpus
    if not found:
        raise StyleforgeBuildError(
            f"{_WHAT} was not built: there is no GPU here to build for; name its architectures: "
            'cuda_library(archs="80;90a")'
        )
    return ";".join(found)


def _tokens(archs: str) -> set[str]:
    """Architectures as the folders in the cache name them: {"80", "90a"}."""
    return {re.sub(r"[^0-9a-zA-Z]", "", arch) for arch in archs.split(";") if arch}


def _covering(prefix: str, wanted: set[str]) -> Path | None:
    """A library in the cache that was built for all these architectures, and maybe for more."""
    for root in cache.roots():
        for path in sorted(root.glob(f"{prefix}*/{_FILE}")):
            if wanted <= set(path.parent.name.removeprefix(prefix).split("_")):
                return path
    return None


def _digest(sources: Path) -> str:
    """A hash of all files that the library is built from."""
    digest = hashlib.sha256()
    files = [sources / "CMakeLists.txt"]
    for folder in ("cmake", "csrc", "ops"):
        files += sorted(path for path in (sources / folder).rglob("*") if path.is_file())
    for path in files:
        digest.update(f"{path.relative_to(sources)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _installed() -> Path | None:
    """The sources inside the installed package."""
    import styleforge

    folders = [_PACKAGE, *map(Path, styleforge.__path__)]
    return next(
        (path / "_sources" for path in folders if (path / "_sources" / "CMakeLists.txt").is_file()), None
    )


def _checkout() -> Path | None:
    """The checkout that the package lies in."""
    root = _PACKAGE.parents[1]
    return root if (root / "CMakeLists.txt").is_file() and (root / "ops" / "library.cpp").is_file() else None
