"""The C++ tests of tests/csrc, so that one command runs everything: CMake builds, each is a test.

The CUDA kernels on the CPU have a file of their own, test_simt.py.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "cmake"  # that of `make ctest`: what it has compiled is not compiled again
PROGRAMS = [p.stem for p in sorted((ROOT / "tests" / "csrc").glob("test_*.cpp"))]
if platform.machine() in ("x86_64", "AMD64"):  # those of products once more, AMX by tiles.h
    PROGRAMS += ["tiles_test_matmul", "tiles_test_linear_numerators"]

pytestmark = pytest.mark.slow


def run(*command: str | Path) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tool(name: str) -> str:
    """Of this environment first (`make venv` installs cmake), then of the system."""
    own = shutil.which(name, path=str(Path(sys.executable).parent))
    found = own or shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}, which is not installed: pip install {name}")
    return found


@pytest.fixture(scope="module")
def programs() -> Path:
    """The folder of compiled test programs."""
    cmake, ninja = tool("cmake"), tool("ninja")
    run(cmake, "-S", ROOT, "-B", BUILD, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}")
    run(cmake, "--build", BUILD, "--target", *PROGRAMS)
    return BUILD / "tests"


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program: str, programs: Path) -> None:
    said = run(programs / program)
    if program.startswith("tiles_") and "skipped amx" in said:
        pytest.skip("this CPU has no avx512_bf16, around which AMX is emulated")
