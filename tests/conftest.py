"""What every test may ask for.

Tests run on the CPU, whatever the machine has, but for those marked `gpu`: `make gpu` says
FDPG_TEST_GPU=1, and without it there is no GPU to be seen.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Processes of pytest-xdist share the cores; torch reads this when it is imported.
if (processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))

if not os.environ.get("FDPG_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from versions import TRANSFORMERS, UNFIT

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    for kind in set(UNFIT.values()):
        warning = f"ignore:.*which is right but slow. {kind}:RuntimeWarning"
        config.addinivalue_line("filterwarnings", warning)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if UNFIT:
        terminalreporter.write_line(
            f"transformers {TRANSFORMERS} does not fit our attention in {', '.join(UNFIT)}, as "
            "expected: these were tested with its own"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU: make gpu"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hands tests to processes by the file, for those of a file share fixtures.

    All that compile C++ go to one process, for they share a build folder; whole runs, to whoever is
    free. Said here and not by marks: --dist loadgroup reads them from the ids of tests, which it
    cannot change since pytest 9.2 (pytest-xdist issue 1386).
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            name = Path(nodeid.split("::")[0]).stem
            if name == "test_end_to_end":
                return nodeid
            return "compiled" if name in ("test_csrc", "test_simt") else name

    return ByFile(config, log)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real models and text, in a folder beside the checkout; without it the test skips."""
    path = Path(os.environ.get("FDPG_SHARED", ROOT.parent / "shared"))
    if not (path / "models").is_dir():
        pytest.skip(f"needs the real models and text of {path.name}/ beside the checkout")
    return path


@pytest.fixture(scope="session")
def stories_3m(shared: Path) -> Path:
    """A GPT-2-architecture story model, 3.4 M parameters."""
    return shared / "models" / "tinystories-instruct-3M-chat-gpt2"


@pytest.fixture(scope="session")
def stories_260k(shared: Path) -> Path:
    """A Llama-architecture story model with grouped queries, 260 K parameters."""
    return shared / "models" / "stories260K"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of tiny models: handing their products to threads takes longer than doing them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
