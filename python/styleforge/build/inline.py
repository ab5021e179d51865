"""A user's own operators, compiled from source text and loaded."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from styleforge.build import cache, compiler
from styleforge.build.errors import StyleforgeBuildError
from styleforge.build.progress import Progress

# CMakeLists.txt builds with the same: a library for every PyTorch >= 2.10.
_TARGET_VERSION = "0x020a000000000000"
_ARCH_FLAG = re.compile(r"^(-arch|-gencode|--gpu-architecture|--generate-code|-gpu-architecture)\b")

_loaded: dict[str, str] = {}  # namespaces to entries of the cache


def compile_inline(
    name: str,
    cuda_source: str = "",
    *,
    cpp_source: str = "",
    functions: Sequence[str] = (),
    extra_cflags: Sequence[str] = (),
    extra_cuda_cflags: Sequence[str] = (),
    verbose: bool = True,
) -> Any:
    """Compiles operators from source text into a library of PyTorch's stable ABI and loads it.

    The sources register their operators with ``STABLE_TORCH_LIBRARY(<name>, m)``; for fast builds leave the
    kernels in ``cuda_source`` without a torch header and register in ``cpp_source``. The same text is
    compiled once for a PyTorch version and a compiler, also by concurrent processes. CUDA code is compiled
    for ``TORCH_CUDA_ARCH_LIST``, else the GPUs of this machine, else nvcc's default, whose PTX every later
    GPU runs.

    Args:
        name: The namespace of the operators, an identifier.
        cuda_source: A CUDA file; compiled with nvcc, no GPU needed.
        cpp_source: A C++ file; without a ``cuda_source`` no nvcc is needed.
        functions: Operators that have to be registered afterwards.
        extra_cflags: More flags for the C++ file.
        extra_cuda_cflags: More flags for the CUDA file.
        verbose: Whether to print progress on the standard error stream.

    Returns:
        The namespace ``torch.ops.<name>``.

    Raises:
        ValueError: The name is no identifier, or there is no source.
        CompilerError: A compiler failed; the message has its first error and the log's path.
        StyleforgeBuildError: A compiler is missing, building is forbidden, the namespace is taken in this
            process, or the library cannot be loaded or does not register what it should.
    """
    if not name.isidentifier():
        raise ValueError(f"compile_inline: the name is the operators' namespace, an identifier, got {name!r}")
    sources = {".cu": cuda_source, ".cpp": cpp_source}
    sources = {suffix: text for suffix, text in sources.items() if text.strip()}
    if not sources:
        raise ValueError("compile_inline: cuda_source or cpp_source is needed")
    if isinstance(functions, str):
        functions = [functions]

    what = f"{name} (compile_inline)"
    flags = {".cu": [*_cuda_flags(extra_cuda_cflags), *extra_cuda_cflags], ".cpp": list(extra_cflags)}
    flags = {suffix: flags[suffix] for suffix in sources}
    try:
        if ".cu" in sources:
            nvcc = compiler.find_nvcc(torch.version.cuda)
            driver, version = nvcc.path, f"nvcc {nvcc.version} {os.environ.get('NVCC_CCBIN', '')}"
        else:
            driver, version = compiler.find_cxx()
    except StyleforgeBuildError as error:
        raise StyleforgeBuildError(f"{what} was not built: {error}") from error
    key = cache.key(sources, flags, torch.__version__, torch.version.cuda, str(driver), version)
    entry = cache.Entry(f"inline-{name}-{key}", f"{name}.so")
    progress = Progress(what, verbose)

    def build(work: Path, log: Path) -> Path:
        begin = time.monotonic()
        progress.say(f"building {what} (log: {log})")
        objects = []
        for suffix, text in sources.items():
            # The sources stay beside the log: compilers name them in their messages.
            file = log.with_name(name + suffix)
            file.write_text(text)
            objects.append(str(work / f"{name}{suffix}.o"))
            arguments = [
                *_compile_flags(".cu" in sources),
                *flags[suffix],
                "-c",
                str(file),
                "-o",
                objects[-1],
            ]
            compiler.run([str(driver), *arguments], log, what=what)
        library = work / entry.file
        command = [str(driver), *_link_flags(".cu" in sources), *objects, *_libraries(".cu" in sources)]
        compiler.run([*command, "-o", str(library)], log, what=what)
        progress.say(f"built {what} in {time.monotonic() - begin:.1f} s")
        return library

    if _loaded.get(name, entry.name) != entry.name:
        raise StyleforgeBuildError(
            f"torch.ops.{name} was loaded from another source in this process, and operators cannot be "
            "replaced: take another name or start Python anew"
        )
    if name not in _loaded and _operators(name):
        raise StyleforgeBuildError(
            f"{what} was not built: torch.ops.{name} has operators already; take another name"
        )
    library = cache.build_once(entry, build, what=what, say=progress.say)
    if name not in _loaded:
        _load(library)
        _loaded[name] = entry.name
    missing = [
        f"{name}::{function}" for function in functions if f"{name}::{function}" not in _operators(name)
    ]
    if missing or not _operators(name):
        raise StyleforgeBuildError(
            f"{what} was built, but registers no operator {', '.join(missing) or f'{name}::*'}: the source "
            f"needs STABLE_TORCH_LIBRARY({name}, m) with an m.def for it"
        )
    return getattr(torch.ops, name)


def _load(library: Path) -> None:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        hint = "" if torch.version.cuda else " (this PyTorch has no CUDA, so no streams and no devices)"
        raise StyleforgeBuildError(f"{library} cannot be loaded: {error.__cause__ or error}{hint}") from error


def _operators(name: str) -> set[str]:
    """The operators of a namespace, without their overloads."""
    names = torch._C._dispatch_get_all_op_names()
    return {operator.partition(".")[0] for operator in names if operator.startswith(f"{name}::")}


def _compile_flags(cuda: bool) -> list[str]:
    include = Path(torch.__file__).parent / "include"
    flags = [
        "-std=c++20",
        "-O3",
        "-DNDEBUG",
        f"-DTORCH_TARGET_VERSION={_TARGET_VERSION}",
        "-isystem",
        str(include),
    ]
    if cuda:  # with nvcc for the C++ file too: it knows where the toolkit's headers are
        return [*flags, "-DUSE_CUDA", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    return [*flags, "-fPIC", "-fvisibility=hidden"]


def _link_flags(cuda: bool) -> list[str]:
    # The CUDA runtime is inside, and not exported: it would be taken for PyTorch's own.
    return ["-shared", "-cudart=static", "-Xlinker", "--exclude-libs,ALL"] if cuda else ["-shared"]


def _libraries(cuda: bool) -> list[str]:
    found = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    if cuda and torch.version.cuda is not None:
        # Python loads torch's libraries with local symbols: the stream shim's has to be named as needed.
        return ["-Xlinker", "--no-as-needed", *found, "-ltorch_cuda"]
    return found


def _cuda_flags(given: Sequence[str]) -> list[str]:
    """The flags for the architectures, where the caller names none."""
    if any(_ARCH_FLAG.match(flag) for flag in given):
        return []
    listed = re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    flags = []
    for arch in [arch for arch in listed if arch] or compiler.gpu_archs():
        found = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", arch)
        if found is None:
            raise StyleforgeBuildError(
                f"TORCH_CUDA_ARCH_LIST: {arch!r} is not understood; write 8.0, 9.0a or 9.0+PTX"
            )
        number = f"{found[1]}{found[2]}{found[3]}"
        code = f"[sm_{number},compute_{number}]" if found[4] else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags
