"""Finds and loads the operator libraries, and says what was found.

``libstyleforge.so`` (schemas, CPU kernels) must load, or the import fails with one message that says where it
was looked for. ``libstyleforge_cuda.so`` is loaded only where PyTorch has CUDA; if it is missing or does not
fit, an installed package builds it (:mod:`styleforge.build`), or one :class:`StyleforgeCudaWarning` says why
not and everything else works.
"""

from __future__ import annotations

import ctypes
import json
import logging
import mmap
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from styleforge._version import __version__

_logger = logging.getLogger("styleforge")

_MAIN = "libstyleforge.so"
_CUDA = "libstyleforge_cuda.so"
_MARKER = b"STYLEFORGE_BUILD_INFO="
_PACKAGE = Path(__file__).resolve().parent


class StyleforgeLibraryError(ImportError):
    """``libstyleforge.so`` is missing or cannot be loaded; nothing works without it."""


class StyleforgeCudaWarning(RuntimeWarning):
    """``libstyleforge_cuda.so`` is missing or does not fit; CUDA tensors take the slower composite path."""


class _CudaLibraryError(Exception):
    """Why the CUDA library was not loaded."""


cuda_available: bool = False
"""Whether the CUDA kernels are registered. Says nothing about a GPU being there."""

cuda_error: str | None = None
"""Why they are not; None where they are, and where PyTorch has no CUDA."""

library_path: Path | None = None
"""The ``libstyleforge.so`` in use; None before :func:`load`."""

cuda_library_path: Path | None = None
"""The ``libstyleforge_cuda.so`` in use, or found and refused; None where there is none."""

_main: ctypes.CDLL | None = None


def load() -> None:
    """Loads the libraries into this process; does nothing the second time.

    Raises:
        StyleforgeLibraryError: ``libstyleforge.so`` is missing or cannot be loaded.

    Warns:
        StyleforgeCudaWarning: PyTorch has CUDA and ``libstyleforge_cuda.so`` is missing or does not fit.
    """
    global _main, library_path, cuda_library_path, cuda_available, cuda_error
    if _main is not None:
        return
    library_path = _already_loaded(_MAIN) or _find_main()
    _main = _open_main(library_path)

    if torch.version.cuda is None:
        _logger.debug("PyTorch %s has no CUDA: %s is not looked for", torch.__version__, _CUDA)
        return
    if os.environ.get("STYLEFORGE_DISABLE_CUDA", "0") not in ("", "0"):
        cuda_error = "disabled by STYLEFORGE_DISABLE_CUDA"
        _logger.debug("%s: %s", _CUDA, cuda_error)
        return
    try:
        cuda_library_path = _already_loaded(_CUDA)
        if cuda_library_path is None:
            _find_or_build_cuda()
        cuda_available = True
    except _CudaLibraryError as error:
        cuda_error = str(error)
        warnings.warn(
            f"styleforge runs without its CUDA kernels: {cuda_error}; operators on CUDA tensors take the "
            "slower composite path (STYLEFORGE_DISABLE_CUDA=1 silences this, `styleforge info` shows more)",
            StyleforgeCudaWarning,
            stacklevel=4,  # the line that imports styleforge: load, ops, styleforge, the user
        )


def use_cuda(path: Path) -> None:
    """Loads a CUDA library that was built after the import.

    Raises:
        StyleforgeLibraryError: It does not fit.
    """
    global cuda_library_path, cuda_available, cuda_error
    try:
        _open_cuda(path)
    except _CudaLibraryError as error:
        raise StyleforgeLibraryError(str(error), name="styleforge", path=str(path)) from error
    cuda_library_path, cuda_available, cuda_error = path, True, None


def folders() -> list[Path]:
    """Where the libraries are looked for, first hit wins.

    ``STYLEFORGE_LIBRARY_PATH`` alone if it is set; else ``lib`` in the installed package (for an editable
    install that is another folder than the sources'), then the build folders of a checkout.
    """
    override = os.environ.get("STYLEFORGE_LIBRARY_PATH")
    if override:
        return [Path(override).expanduser().absolute()]
    import styleforge

    found = [_PACKAGE / "lib", *(Path(entry) / "lib" for entry in styleforge.__path__)]
    checkout = _PACKAGE.parents[1]
    if (checkout / "CMakeLists.txt").is_file() and (checkout / "ops" / "library.cpp").is_file():
        found += [checkout / "build", checkout / "build" / "cuda"]
    return list(dict.fromkeys(found))


def cmake_prefix_path() -> str:
    """The folder for ``CMAKE_PREFIX_PATH``: ``find_package(styleforge)`` then finds the libraries in use.

    Next to them in an installation, in the sources for a checkout.
    """
    nearby = [library_path.parent] if library_path is not None else []
    found = [folder / "cmake" for folder in [*nearby, *folders()]]
    found.append(_PACKAGE.parents[1] / "cmake")
    config = Path("styleforge", "styleforge-config.cmake")
    return str(next((folder for folder in found if (folder / config).is_file()), found[0]))


def last_path() -> str:
    """Which path the most recent operator call in this process took.

    Returns:
        Operator, device and kernel with colons between them, "ffn:cuda:sm90:tf32" say; "" before the first
        call.
    """
    return _c_string("styleforge_last_path")


def build_info(path: Path) -> dict[str, str]:
    """What a library was built from, read from the file without loading it.

    Returns:
        The fields ``styleforge``, ``pytorch``, ``compiler``, ``build_type`` and, for the CUDA library,
        ``cuda`` (the toolkit's version) and ``cuda_archs`` (blank-separated, ``-virtual`` for PTX); empty
        for a file without them.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            start = content.find(_MARKER + b"{")
            if start >= 0:
                text = content[start + len(_MARKER) : content.find(b"\0", start)]
                fields: dict[str, str] = json.loads(text)
                return fields
    except (OSError, ValueError) as error:  # an empty file cannot be mapped: ValueError
        _logger.debug("no build information in %s: %s", path, error)
    return {}


def diagnostics() -> dict[str, Any]:
    """What a bug report needs to know about the libraries; does not initialise CUDA.

    Returns:
        ``version``, ``library``, ``library_build``, ``cuda_library``, ``cuda_library_build``, ``cuda_archs``,
        ``cuda_available``, ``cuda_error``, ``searched``, ``torch``, ``torch_cuda``, ``last_path``,
        ``environment`` (the ``STYLEFORGE_*`` variables).
    """
    cuda_build = build_info(cuda_library_path) if cuda_library_path else {}
    return {
        "version": __version__,
        "library": str(library_path) if library_path else None,
        "library_build": build_info(library_path) if library_path else {},
        "cuda_library": str(cuda_library_path) if cuda_library_path else None,
        "cuda_library_build": cuda_build,
        "cuda_archs": cuda_build.get("cuda_archs", "").split(),
        "cuda_available": cuda_available,
        "cuda_error": cuda_error,
        "searched": [str(folder) for folder in folders()],
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "last_path": last_path() if _main is not None else "",
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith("STYLEFORGE_")
        },
    }


def _already_loaded(name: str) -> Path | None:
    """A library that the program loaded itself with ``torch.ops.load_library``: a second one would abort."""
    return next((Path(path) for path in torch.ops.loaded_libraries if Path(path).name == name), None)


def _find_main() -> Path:
    searched = folders()
    for folder in searched:
        if (folder / _MAIN).is_file():
            return folder / _MAIN
    places = ", ".join(map(str, searched))
    raise StyleforgeLibraryError(
        f"{_MAIN} was not found in {places}; build it with `pip install --no-build-isolation .` in the "
        "checkout, or set STYLEFORGE_LIBRARY_PATH to the folder that holds it",
        name="styleforge",
    )


def _open_main(path: Path) -> ctypes.CDLL:
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
    except OSError as error:
        built = build_info(path).get("pytorch", "an unknown PyTorch")
        raise StyleforgeLibraryError(
            f"{path} cannot be loaded (built with PyTorch {built}, this is {torch.__version__}; PyTorch >= "
            f"2.10 is needed): {error.__cause__ or error}",
            name="styleforge",
            path=str(path),
        ) from error
    _logger.debug("loaded %s", path)
    return library


def _find_cuda() -> Path:
    assert library_path is not None
    searched = list(dict.fromkeys([library_path.parent, *folders()]))
    for folder in searched:
        if (folder / _CUDA).is_file():
            return folder / _CUDA
    raise _CudaLibraryError(
        f"{_CUDA} was not found in {', '.join(map(str, searched))}; build it for CUDA {torch.version.cuda} "
        "with `STYLEFORGE_CUDA=ON pip install --no-build-isolation .` (needs nvcc)"
    )


def _find_or_build_cuda() -> None:
    """Opens the library that is there; where none fits, an installed package builds one."""
    global cuda_library_path
    try:
        cuda_library_path = _find_cuda()
        _open_cuda(cuda_library_path)
    except _CudaLibraryError as error:
        from styleforge.build import StyleforgeBuildError, first_use

        try:
            built = first_use.at_import()
        except (StyleforgeBuildError, OSError) as reason:
            raise _CudaLibraryError(f"{error}; not built on first use: {reason}") from reason
        if built is None:
            raise
        cuda_library_path = built
        _open_cuda(built)


def _open_cuda(path: Path) -> None:
    built = build_info(path)
    found = f"PyTorch {torch.__version__} with CUDA {torch.version.cuda}"
    if not built:
        raise _CudaLibraryError(f"{path} is not a CUDA library of styleforge; found {found}")
    built_for = f"CUDA {built.get('cuda', 'unknown')} (styleforge {built.get('styleforge')})"
    same_major = built.get("cuda", "").partition(".")[0] == str(torch.version.cuda).partition(".")[0]
    if not same_major or built.get("styleforge") != __version__:
        raise _CudaLibraryError(f"{path} was built for {built_for}, found {found} (styleforge {__version__})")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise _CudaLibraryError(
            f"{path} cannot be loaded: {error.__cause__ or error}; built for {built_for}, found {found}"
        ) from error
    _logger.debug("loaded %s, built for %s", path, built_for)


def _c_string(function: str) -> str:
    if _main is None:
        raise StyleforgeLibraryError(f"{_MAIN} is not loaded: import styleforge first", name="styleforge")
    call = getattr(_main, function)
    call.restype = ctypes.c_char_p
    text: bytes = call()
    return text.decode()
