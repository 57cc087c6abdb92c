"""The compiled module: what it says of its making, that it is fresh, and what it links to."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fdpg_fast import _build
from fdpg_fast._version import __version__

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
C = _build.load()


def test_build_info() -> None:
    info = C.build_info()
    assert info["version"] == __version__
    assert re.fullmatch(r"[0-9a-f]{16}", info["source_hash"])
    assert re.match(r"2\.\d+", info["torch"])
    assert info["torch_abi"] == "2.11"
    assert info["compiler"].split()[0] in ("g++", "clang")
    assert isinstance(info["cuda"], bool)
    assert info["cuda_reason"], "the decision for or against CUDA has a reason"
    assert bool(info["cuda_archs"]) == info["cuda"]


@pytest.mark.parametrize(
    ("archs", "runs", "fails"),
    [
        ("7.5;8.0;8.6;9.0+PTX", [(7, 5), (8, 0), (8, 7), (8, 9), (9, 0), (12, 0)], [(7, 0)]),
        ("8.0 8.6", [(8, 0), (8, 9)], [(7, 5), (9, 0)]),
        ("8.6", [(8, 6)], [(8, 0), (9, 0)]),
        ("9.0a", [(9, 0)], [(9, 1), (10, 0)]),
        ("Hopper", [(9, 0)], []),
    ],
)
def test_what_gpus_code_runs_on(
    archs: str,
    runs: list[tuple[int, int]],
    fails: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    info = {"cuda": True, "cuda_archs": archs, "cuda_reason": "the test says so"}
    monkeypatch.setattr(_build, "load", lambda: SimpleNamespace(build_info=lambda: info))
    for capability in runs:
        assert _build.refusal_of_gpu(capability) is None
    for capability in fails:
        message = _build.refusal_of_gpu(capability)
        assert message is not None
        assert archs in message
        assert "TORCH_CUDA_ARCH_LIST={}.{}".format(*capability) in message
    info["cuda"] = False
    message = _build.refusal_of_gpu(runs[0])
    assert message is not None
    assert "compiled without CUDA (the test says so)" in message


def test_only_the_library_of_this_python_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout that two Pythons have been built for has two, of which one may be stale."""
    loaded: list[str] = []
    mine = EXTENSION_SUFFIXES[0]
    for suffix in (".cpython-309-x86_64-linux-gnu.so", mine, ".cpython-399-x86_64-linux-gnu.so"):
        (tmp_path / f"_C_cuda{suffix}").touch()
    monkeypatch.setattr(_build, "__file__", str(tmp_path / "_build.py"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    module = SimpleNamespace(
        build_info=lambda: {"cuda": True}, __file__=str(tmp_path / f"_C{mine}")
    )
    monkeypatch.setattr(_build.importlib, "import_module", lambda name: module)
    _build.load.__wrapped__()
    assert loaded == [str(tmp_path / f"_C_cuda{mine}")]


def test_instruction_sets_can_be_chosen() -> None:
    before = C.cpu_isa()
    try:
        assert C.set_cpu_isa("portable")
        assert C.cpu_isa() == "portable"
        assert not C.set_cpu_isa("mmx")
        assert C.cpu_isa() == "portable"
    finally:
        assert C.set_cpu_isa(before)


def test_only_the_stable_abi_is_used() -> None:
    """So that a module built against one torch loads in another."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm, which binutils has")
    out = subprocess.run(
        [nm, "-DC", "--undefined-only", C.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert "aoti_torch" in out
    unstable = re.findall(r".*\b(?:at|c10|torch|caffe2)::.*", out)
    assert not unstable


def copy_of_sources(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CSRC, tmp_path / "csrc"))


@pytest.mark.parametrize("changed", ["include/fdpg/params.h", "cpu/dispatch.cpp", "torch/check.h"])
def test_edited_source_makes_the_module_stale(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    csrc = copy_of_sources(tmp_path)
    info = {"source_hash": _build.source_hash(csrc, cuda=False), "cuda": False}
    _build.check_fresh(info, csrc)
    with (csrc / changed).open("a") as file:
        file.write("\n")
    monkeypatch.delenv("FDPG_ALLOW_STALE", raising=False)
    with pytest.raises(ImportError, match=r"Build it: make install.*FDPG_ALLOW_STALE=1"):
        _build.check_fresh(info, csrc)


def test_stale_module_can_be_used_knowingly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FDPG_ALLOW_STALE", "1")
    _build.check_fresh({"source_hash": "0", "cuda": False}, copy_of_sources(tmp_path))
    assert "used as it is" in capsys.readouterr().err


def test_cuda_sources_count_in_a_cuda_build_only(tmp_path: Path) -> None:
    csrc = copy_of_sources(tmp_path)
    before = [_build.source_hash(csrc, cuda=cuda) for cuda in (False, True)]
    (csrc / "cuda" / "new.cuh").write_text("// new\n")
    after = [_build.source_hash(csrc, cuda=cuda) for cuda in (False, True)]
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_installed_package_has_no_sources_to_compare_with(tmp_path: Path) -> None:
    _build.check_fresh({"source_hash": "0", "cuda": False}, tmp_path / "csrc")


def test_missing_module_says_how_to_build_it() -> None:
    code = "import sys, fdpg_fast._build as b; sys.modules['fdpg_fast._C'] = None; b.load()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "fdpg_fast._C is missing or does not load" in done.stderr
    assert "make install" in done.stderr


def test_wrong_wish_for_cuda_is_refused() -> None:
    def setup(wish: str) -> str:
        done = subprocess.run(
            [sys.executable, "setup.py", "--version"],
            cwd=ROOT,
            env=os.environ | {"FDPG_CUDA": wish},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stderr

    assert "FDPG_CUDA must be 0 or 1, got 'yes'" in setup("yes")
    if torch.version.cuda is None:
        assert "was built without CUDA. Install a CUDA build of torch" in setup("1")


@pytest.mark.slow
def test_wheel_holds_what_is_needed_and_no_more(tmp_path: Path) -> None:
    """Built from a copy of the tree, as from a fresh clone."""
    tree = tmp_path / "tree"
    skip = shutil.ignore_patterns(
        ".venv", ".git", "build", "runs", "*.so", "__pycache__", "*.egg-info"
    )
    shutil.copytree(ROOT, tree, ignore=skip)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"]
    subprocess.run([*pip, "-w", str(tmp_path / "dist"), "."], cwd=tree, check=True)
    (wheel,) = (tmp_path / "dist").glob("fdpg_fast-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(re.fullmatch(r"fdpg_fast/_C\..*so", n) for n in names)
    assert "fdpg_fast/py.typed" in names
    for path in (ROOT / "fdpg_fast").rglob("*"):
        relative = path.relative_to(ROOT).as_posix()
        if (
            path.suffix in (".py", ".yaml", ".json", ".safetensors")
            and "__pycache__" not in relative
        ):
            assert relative in names
    outside = [n for n in names if not n.startswith(("fdpg_fast/", "fdpg_fast-"))]
    assert not outside, "csrc, tests and benchmarks stay out of the wheel"
    assert not [n for n in names if n.endswith((".cpp", ".h", ".cu", ".cuh"))]
