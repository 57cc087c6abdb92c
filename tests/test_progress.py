"""What a person sees while a run trains, in a terminal and without one."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from fdpg_fast.progress import PlainDisplay, SilentDisplay, TerminalDisplay, joined, one_line

RECORD: dict[str, Any] = {
    "step": 3,
    "divergence": 0.312,
    "divergence_se": 0.021,
    "moment: contains 'dog'": 0.72,
    "moment_se: contains 'dog'": 0.03,
    "moment: length in words": 31.0,
    "moment_se: length in words": float("nan"),
    "kl_to_base": 4.2,
    "kl_target_base": 3.7,
    "entropy_per_token": 1.9,
    "target_ess": 141.0,
    "log_z": -3.7,
    "gap_mean": 2e-7,
    "n_skipped": 0.0,
}
TIMING = {"step": 3, "samples": 256, "sample": 2.0, "score": 0.5, "train": 2.5}
ROW = {
    "step": 3,
    "prompt": "Once",
    "text": "there was a\ndog",
    "log_base": -60.25,
    "log_score": float("-inf"),
    "log_pi": -58.5,
    "weight": -0.5,
}
RUN: dict[str, Any] = {
    "steps": 10,
    "done": 0,
    "divergence": "js",
    "goals": {"contains 'dog'": 1.0},
}
SHOWN = (
    *("js", "0.312±0.021", "0.720±0.030 (goal 1)", "31.000", "4.20 (target 3.70)", "1.90", "141"),
    *("2e-07", "51.2 samples/s (sample 40% score 10% train 50%)", "model", "tiny"),
    *("-60.2", "-∞", "-58.5", "-0.500", "Once there was a dog", "careful"),
)


def show(display: PlainDisplay | TerminalDisplay) -> None:
    display.start({"model": "tiny"}, **RUN)
    display.step(RECORD, TIMING)
    display.samples(3, [ROW])
    display.warn("careful")
    display.stop()


def test_in_a_terminal() -> None:
    screen = io.StringIO()
    show(TerminalDisplay(Console(file=screen, force_terminal=True, width=120, color_system=None)))
    for words in (*SHOWN, "3/10"):
        assert words in screen.getvalue(), words


def test_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show(PlainDisplay())
    seen = capsys.readouterr()
    for words in (*SHOWN, "step 3/10"):
        assert words in seen.out + seen.err, words
    assert "\x1b" not in seen.out  # no colours in a log file


def test_prompts_whose_z_is_zero_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    display = PlainDisplay()
    display.start({}, **RUN)
    nan = float("nan")
    display.step({**RECORD, "n_skipped": 64.0, "divergence": nan, "log_z": nan}, TIMING)
    line = capsys.readouterr().out
    assert "skipped 64 samples with Z = 0" in line
    assert "nan" not in line
    assert "js n/a" in line


def test_silence_is_broken_by_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    display = SilentDisplay()
    display.start({"model": "tiny"}, **RUN)
    display.step(RECORD, TIMING)
    display.samples(3, [ROW])
    display.note("nothing")
    assert capsys.readouterr() == ("", "")
    display.warn("careful")
    assert capsys.readouterr().err == "warning: careful\n"


def test_samples_on_one_line() -> None:
    assert one_line("a\n  b") == "a b"
    assert one_line("x" * 50, 10) == "x" * 9 + "…"
    assert joined("Once", ", there") == "Once, there"
    assert joined("Once", " there") == "Once there"
    assert joined("Once", "there") == "Once there"
    assert joined("", "there") == "there"
