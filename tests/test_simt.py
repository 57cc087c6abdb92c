"""CUDA kernels run on the CPU: see tests/csrc/simt/README.md.

Three builds of the same tests: plain, with AddressSanitizer and UndefinedBehaviorSanitizer, and
with the emulator's race detector. CMakeLists.txt says how each is compiled.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "cmake"  # that of `make ctest`: what it has compiled is not compiled again
BUILDS = ("plain", "asan", "race")
PROGRAMS = sorted(p.stem for p in (ROOT / "tests" / "csrc" / "simt").glob("test_*.cpp"))

# A planted bug (test_planted.cpp), the builds that must report it, and a part of what they say. The
# others may miss it: a plain build has no red zones, and only the race detector sees order.
PLANTED = {
    "global_oob": (("asan",), "heap-buffer-overflow"),
    "misaligned_vector": (("asan",), "misaligned address"),
    "static_shared_oob": (("asan",), "out of bounds"),
    "dynamic_shared_oob": (("asan",), "use-after-poison"),
    "missing_syncthreads": (("race",), "race on shared memory"),
    "missing_syncwarp": (("race",), "race on shared memory"),
    "missing_threadfence": (("race",), "race on global memory"),
    "missing_barrier_before_counter": (("race",), "race on global memory"),
    "two_blocks_write": (("race",), "race on global memory"),
    "missing_copy_wait": (("race",), "uninitialised shared memory"),
    "uninitialised_shared": (("race",), "uninitialised shared memory"),
    "divergent_barrier": (BUILDS, "divergent barrier"),
    "deadlock": (BUILDS, "deadlock"),
    "shuffle_from_returned_lane": (BUILDS, "does not take part"),
    "write_before_previous_has_ended": (("race",), "race on global memory"),
    "missing_after_previous": (("plain", "asan"), "returned without after_previous"),
    "next_begins_too_soon": (BUILDS, "let_next_begin() before after_previous"),
}


def run(*command: str | Path, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def tool(name: str) -> str:
    """Of this environment first (`make venv` installs cmake), then of the system."""
    own = shutil.which(name, path=str(Path(sys.executable).parent))
    found = own or shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}, which is not installed: pip install {name}")
    return found


@pytest.fixture(scope="module")
def programs() -> Path:
    """The folder of compiled test programs, simt_<build>_<test>."""
    cmake, ninja = tool("cmake"), tool("ninja")
    configure = run(cmake, "-S", ROOT, "-B", BUILD, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}")
    assert configure.returncode == 0, configure.stdout + configure.stderr
    if "Not g++" in configure.stdout:
        pytest.skip("the emulator's three builds need g++ (CMAKE_CXX_COMPILER is another compiler)")
    targets = [f"simt_{build}_{program}" for build in BUILDS for program in PROGRAMS]
    build = run(cmake, "--build", BUILD, "--target", *targets, timeout=900)
    assert build.returncode == 0, build.stdout + build.stderr
    return BUILD / "tests"


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_kernels(programs: Path, program: str, build: str) -> None:
    result = run(programs / f"simt_{build}_{program}")
    assert result.returncode == 0, (result.stdout + result.stderr)[:4000]


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_caught(programs: Path, bug: str) -> None:
    builds, words = PLANTED[bug]
    for build in builds:
        result = run(programs / f"simt_{build}_test_planted", bug)
        assert result.returncode != 0, f"the {build} build missed it"
        assert words in result.stdout + result.stderr


def test_every_planted_bug_is_listed() -> None:
    source = (ROOT / "tests" / "csrc" / "simt" / "test_planted.cpp").read_text()
    planted = {
        line.split("(")[1].split(")")[0] for line in source.splitlines() if "    PLANTED(" in line
    }
    assert planted == set(PLANTED)
