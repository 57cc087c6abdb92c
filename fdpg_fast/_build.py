"""Which sources the compiled modules were made from, and loading them.

setup.py runs this file by path before the package exists, so it imports nothing but the standard
library at the top.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import re
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
        # Of the same Python: a checkout that several have been built for has several.
        path = Path(str(module.__file__))
        suffix = path.name.removeprefix("_C")
        torch.ops.load_library(str(path.with_name(f"_C_cuda{suffix}")))
    return module


def refusal_of_gpu(capability: tuple[int, int]) -> str | None:
    """Why no kernel of ours runs on a GPU of that compute capability, and the way out."""
    info = load().build_info()
    if not info["cuda"]:
        return (
            f"fdpg_fast was compiled without CUDA ({info['cuda_reason']}). Way out: install it "
            "again where nvcc is, with FDPG_CUDA=1"
        )
    archs = str(info["cuda_archs"])
    if _covers(archs, capability):
        return None
    of_it = "{}.{}".format(*capability)
    return (
        f"fdpg_fast was compiled for GPUs of compute capability {archs}, and this one has {of_it}. "
        f"Way out: install it again with TORCH_CUDA_ARCH_LIST={of_it}"
    )


def _covers(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``archs``, as TORCH_CUDA_ARCH_LIST has them, runs on a GPU: binaries on a
    later minor version, PTX on all later ones."""
    for arch in re.split(r"[;\s]+", archs):
        known = re.fullmatch(r"(\d+)\.(\d)(\D?)(\+PTX)?", arch)
        if known is None:  # a name, such as Hopper: torch knows
            return True
        major, minor, ptx = int(known[1]), int(known[2]), known[4] is not None
        exact = known[3] == "a"  # for this one and no later one
        if (major, minor) == capability or (
            not exact and (major, minor) <= capability and (ptx or major == capability[0])
        ):
            return True
    return False


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
