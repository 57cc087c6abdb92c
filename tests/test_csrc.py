"""The C++ tests, so that one command runs everything: CMake builds them, each is a test here.

tests/csrc/test_*.cpp are programs; tests/csrc/simt/test_*.cpp run the CUDA kernels on the CPU:
plain, under sanitizers, and under the emulator's race detector.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "cmake"
PROGRAMS = [p.stem for p in sorted((ROOT / "tests" / "csrc").glob("test_*.cpp"))]
EMULATED = [
    f"simt_{mode}_{p.stem}"
    for p in sorted((ROOT / "tests" / "csrc" / "simt").glob("test_*.cpp"))
    for mode in ("plain", "asan", "race")
]

pytestmark = pytest.mark.slow


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built() -> Path:
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}: pip install {tool}")
    run("cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja")
    run("cmake", "--build", str(BUILD), "-j", os.environ.get("MAX_JOBS", str(os.cpu_count() or 1)))
    return BUILD


def test_every_program_is_a_test(built: Path) -> None:
    """What is listed here is what CMake knows, so none is silently left out."""
    listed = re.findall(r"Test +#\d+: (\S+)", run("ctest", "--test-dir", str(built), "-N"))
    if "simt_asan" not in " ".join(listed):
        pytest.skip("not g++: no sanitizers for the emulated CUDA kernels")
    assert sorted(listed) == sorted(PROGRAMS + EMULATED)


@pytest.mark.parametrize("program", PROGRAMS + EMULATED)
def test_program(program: str, built: Path) -> None:
    path = built / "tests" / program
    if program.startswith("simt_") and not path.exists():
        pytest.skip("not g++: this build of the emulated CUDA kernels does not exist")
    run(str(path))
