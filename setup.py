"""Compiles fdpg_fast._C (CPU, always) and fdpg_fast._C_cuda (where CUDA is chosen).

Everything else about the package is in pyproject.toml. Nothing is downloaded here.

Environment:
    FDPG_CUDA=1|0          build the CUDA extension, or do not; unset: when a toolkit is found and
                           torch was built with CUDA. Never decided by the presence of a GPU.
    TORCH_CUDA_ARCH_LIST   architectures, as torch spells them; default: those of
                           DEFAULT_CUDA_ARCHS that the toolkit knows, the newest with PTX.
    MAX_JOBS               compilers at once; default min(cores, free memory in GB / 4).
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CONFIG_DIR = ROOT / "build" / "config"
CUDA_HOME = Path(cpp_extension.CUDA_HOME or "/nonexistent")
DEFAULT_CUDA_ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

# The stable ABI of torch 2.11: what was compiled against one torch >= 2.11 loads in another.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# No -march (instruction sets are chosen at run time) and no fast-math (minus infinity is a value).
# On CPUs a multiply and an add stay two roundings unless the source says fma, so that instruction
# sets and compilers can be compared; nvcc fuses some.
CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", TORCH_TARGET]
# g++ 12 says of its own AVX-512 headers that they read what they did not write (GCC bug 105593).
CXX_FLAGS += ["-Wno-unknown-warning-option", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fvisibility=hidden"]

package = runpy.run_path(str(ROOT / "fdpg_fast" / "_build.py"))
version = runpy.run_path(str(ROOT / "fdpg_fast" / "_version.py"))["__version__"]


def sources(folder: str, *suffixes: str) -> list[str]:
    """The sources directly in csrc/<folder>, sorted, relative to the root as setuptools wants."""
    found = sorted(p for p in (CSRC / folder).iterdir() if p.suffix in suffixes)
    return [str(p.relative_to(ROOT)) for p in found]


def max_jobs() -> int:
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    try:
        meminfo = Path("/proc/meminfo").read_text()
        free_gb = int(re.search(r"MemAvailable:\s+(\d+)", meminfo)[1]) / 2**20
    except (OSError, TypeError):
        return cores
    return max(1, min(cores, int(free_gb / 4)))


def toolkit_version() -> str | None:
    """Such as 13.0, of the compiler of the toolkit torch would use, None if there is none."""
    nvcc = CUDA_HOME / "bin" / "nvcc"
    if not nvcc.exists():
        return None
    out = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", out)
    return found[1] if found else None


def conda_includes() -> list[Path]:
    """Where a toolkit of conda's has its headers; nvcc knows, torch does not."""
    return sorted(CUDA_HOME.glob("targets/*/include"))


def has_cuda_headers() -> bool:
    folders = [CUDA_HOME / "include", Path(os.environ.get("CUDA_INC_PATH", "")), *conda_includes()]
    return any((folder / "cuda_runtime_api.h").exists() for folder in folders)


def cuda_archs() -> str:
    nvcc = CUDA_HOME / "bin" / "nvcc"
    out = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, check=True).stdout
    known = set(re.findall(r"compute_(\d+)", out.decode()))
    archs = [a for a in DEFAULT_CUDA_ARCHS if a.replace(".", "") in known]
    return ";".join(archs) + "+PTX"


def decide_cuda() -> tuple[bool, str]:
    """Whether to build _C_cuda, and the reason, which build_info() repeats."""
    wish = os.environ.get("FDPG_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"fdpg_fast: FDPG_CUDA must be 0 or 1, got {wish!r}")
    if wish == "0":
        return False, "FDPG_CUDA=0"
    if torch.version.cuda is None:
        if wish == "1":
            sys.exit(
                f"fdpg_fast: FDPG_CUDA=1, but torch {torch.__version__} was built without CUDA. "
                "Install a CUDA build of torch and pass --no-build-isolation."
            )
        return False, f"torch {torch.__version__} was built without CUDA"
    toolkit = toolkit_version()
    if toolkit is None:
        if wish == "1":
            sys.exit("fdpg_fast: FDPG_CUDA=1, but no nvcc was found. Set CUDA_HOME to the toolkit.")
        return False, "no CUDA toolkit found"
    if not has_cuda_headers():
        if wish == "1":
            sys.exit(
                f"fdpg_fast: FDPG_CUDA=1, but the toolkit in {CUDA_HOME} has nvcc and no headers "
                "(cuda_runtime_api.h). Install them, or set CUDA_INC_PATH to their folder."
            )
        return False, f"nvcc found in {CUDA_HOME}, but not CUDA's headers"
    if toolkit.split(".")[0] != torch.version.cuda.split(".")[0]:
        sys.exit(
            f"fdpg_fast: nvcc is {toolkit}, torch was built with CUDA {torch.version.cuda}: "
            "set CUDA_HOME to a toolkit of torch's version, or set FDPG_CUDA=0."
        )
    why = "FDPG_CUDA=1" if wish == "1" else "toolkit found and torch has CUDA"
    return True, f"{why} (nvcc {toolkit}, torch CUDA {torch.version.cuda})"


def write_config(cuda: bool, reason: str) -> None:
    """The facts that build_info() reports, in a header that module.cpp alone includes.

    Not -D flags: ninja recompiles every file whose command line has changed.
    """
    facts = {
        "VERSION": version,
        "SOURCE_HASH": package["source_hash"](CSRC, cuda=cuda),
        "TORCH_VERSION": torch.__version__,
        "CUDA_REASON": reason,
        "CUDA_ARCHS": os.environ["TORCH_CUDA_ARCH_LIST"] if cuda else "",
    }
    lines = ["// Written by setup.py.", "#pragma once"]
    lines += [f'#define FDPG_BUILD_{name} "{value}"' for name, value in facts.items()]
    lines += [f"#define FDPG_BUILD_CUDA {int(cuda)}", ""]
    header = CONFIG_DIR / "fdpg_build_config.h"
    header.parent.mkdir(parents=True, exist_ok=True)
    if not header.exists() or header.read_text() != "\n".join(lines):
        header.write_text("\n".join(lines))


def extension(name: str, files: list[str], libraries: list[str], cuda: bool = False) -> Extension:
    return Extension(
        f"fdpg_fast.{name}",
        files,
        include_dirs=[
            str(CSRC / "include"),
            str(CONFIG_DIR),
            *cpp_extension.include_paths(device_type="cuda" if cuda else "cpu"),  # and pybind11
            *(map(str, conda_includes()) if cuda else []),
        ],
        library_dirs=cpp_extension.library_paths(device_type="cuda" if cuda else "cpu"),
        libraries=libraries,
        define_macros=[("USE_CUDA", None)] if cuda else [],  # torch's headers then show streams
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": [*NVCC_FLAGS, TORCH_TARGET]},
        language="c++",
    )


class BuildExtension(cpp_extension.BuildExtension):
    """torch's, with ninja demanded and objects kept between editable installs."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if not self.use_ninja:
            sys.exit("fdpg_fast: building needs ninja: pip install ninja")
        if self.inplace or getattr(self, "editable_mode", False):
            # pip gives each editable install a fresh temporary folder: a full compile.
            self.build_temp = str(ROOT / "build" / f"editable-{sys.implementation.cache_tag}")


cuda, reason = decide_cuda()
print(f"fdpg_fast: CUDA extension {'on' if cuda else 'off'}: {reason}", file=sys.stderr)
os.environ.setdefault("MAX_JOBS", str(max_jobs()))
if cuda:
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", cuda_archs())
write_config(cuda, reason)

# Listed by folder: a glob over all of csrc once pulled cuda.cpp into a CPU build.
extensions = [
    extension(
        "_C",
        [
            "csrc/torch/library.cpp",
            "csrc/torch/cpu.cpp",
            "csrc/torch/module.cpp",
            *sources("cpu", ".cpp"),
        ],
        libraries=["torch", "torch_cpu"],
    )
]
if cuda:
    extensions.append(
        extension(
            "_C_cuda",
            ["csrc/torch/cuda.cpp", *sources("cuda", ".cu")],
            libraries=["torch", "torch_cpu", "torch_cuda", "c10_cuda", "cudart"],
            cuda=True,
        )
    )

setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})
