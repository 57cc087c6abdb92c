"""Which CUDA toolkits setup.py builds with, and what it says of the others."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

SETUP = Path(__file__).resolve().parents[1] / "setup.py"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, where torch, as if built with CUDA 13.0, looks for the toolkit."""
    monkeypatch.setenv("FDPG_CUDA", "1")
    monkeypatch.delenv("CUDA_INC_PATH", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    return tmp_path


def add_nvcc(home: Path) -> None:
    """Of a version that is not torch's: where all is found, setup.py ends there."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho release 12.9\n")
    nvcc.chmod(0o755)


def said() -> str:
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SETUP))
    return str(stopped.value)


def test_no_toolkit(home: Path) -> None:
    assert "no nvcc was found. Set CUDA_HOME" in said()


def test_a_compiler_without_headers(home: Path) -> None:
    add_nvcc(home)
    message = said()
    assert f"the toolkit in {home} has nvcc and no headers" in message
    assert "CUDA_INC_PATH" in message


@pytest.mark.parametrize("where", ["include", "targets/x86_64-linux/include", "elsewhere"])
def test_headers_where_toolkits_have_them(
    where: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_nvcc(home)
    (home / where).mkdir(parents=True)
    (home / where / "cuda_runtime_api.h").touch()
    if where == "elsewhere":
        monkeypatch.setenv("CUDA_INC_PATH", str(home / where))
    assert "nvcc is 12.9, torch was built with CUDA 13.0" in said()
