"""Which sources the compiled modules were made from, and loading them.

setup.py runs this file by path before the package exists, so it imports nothing but the standard
library at the top.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

REMEDY = "Build it: make install, or pip install --no-build-isolation -e . in the checkout"
SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}


def source_hash(csrc: Path, *, cuda: bool) -> str:
    """Fingerprint of the names and contents of the sources a build is made from.

    Args:
        csrc: the folder of that name.
        cuda: whether the build includes the CUDA sources; those that it does not are left out,
            so that editing a kernel does not make a CPU build stale.
    """
    folders = ["include", "cpu", "torch", *(["cuda"] if cuda else [])]
    files = [p for f in folders for p in (csrc / f).rglob("*") if p.suffix in SUFFIXES]
    digest = hashlib.sha256()
    for path in sorted(files):
        name = path.relative_to(csrc).as_posix()
        if name == "torch/cuda.cpp" and not cuda:
            continue
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def load() -> ModuleType:
    """The compiled module; importing it registers the CPU ops. Loads the CUDA ops where they exist.

    Raises:
        ImportError: it is missing, does not load, or (in a checkout) was compiled from other
            sources than those beside the package. FDPG_ALLOW_STALE=1 turns the last into a line
            on stderr, for someone who is editing C++ and knows.
    """
    import torch  # before _C, whose symbols it brings

    try:
        module = importlib.import_module("fdpg_fast._C")
    except ImportError as error:
        raise ImportError(
            f"fdpg_fast: the compiled module fdpg_fast._C is missing or does not load ({error}). "
            f"{REMEDY}"
        ) from error
    info = module.build_info()
    check_fresh(info, Path(__file__).resolve().parents[1] / "csrc")
    if info["cuda"] and torch.version.cuda is not None:
        for library in sorted(Path(__file__).parent.glob("_C_cuda*.so")):
            torch.ops.load_library(str(library))
    return module


def check_fresh(info: dict[str, object], csrc: Path) -> None:
    """Raises ImportError if ``csrc`` exists and is not what ``info`` says was compiled."""
    if not (csrc / "torch" / "module.cpp").is_file():
        return  # an installed package: no sources beside it
    if info["source_hash"] == source_hash(csrc, cuda=bool(info["cuda"])):
        return
    message = f"fdpg_fast: the compiled module was not made from the sources in {csrc}. {REMEDY}"
    if os.environ.get("FDPG_ALLOW_STALE") != "1":
        raise ImportError(f"{message}. To use it as it is: FDPG_ALLOW_STALE=1")
    print(f"{message}. FDPG_ALLOW_STALE=1: used as it is", file=sys.stderr)
