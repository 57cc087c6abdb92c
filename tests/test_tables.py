"""The tables of benchmarks/README.md say what was measured, and nobody has written in them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
spec = importlib.util.spec_from_file_location("tables", BENCHMARKS / "tables.py")
assert spec is not None
assert spec.loader is not None
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)

CPU = {"brand_raw": "A CPU", "family": 1, "model": 2}
FAST = "benchmarks/bench_op.py::test_fast[{}-cpu-fp32]"


def row(name: str, seconds: float, other: float, **info: Any) -> dict[str, Any]:
    """One case against one contender, which takes ``other`` seconds."""
    return {
        "fullname": FAST.format(name),
        "params": {"name": name, "device": "cpu", "dtype": "fp32"},
        "stats": {"median": seconds, "iqr": 0.04 * seconds},
        "extra_info": {
            "dtype": "fp32",
            "speedup": {"eager": other / seconds},
            "bars": {"eager": 2.0},
            **info,
        },
    }


def write(folder: Path, commit: str, day: int, *rows: dict[str, Any], **machine: Any) -> None:
    facts = {"device": "A CPU avx2 4 threads", "cpu_isa": "avx2", "cpu": CPU, "threads": 4}
    content = {
        "datetime": f"2026-01-{day:02}T00:00:00",
        "commit_info": {"id": commit},
        "machine_info": {**facts, "torch": "2.13.0", **machine},
        "benchmarks": list(rows),
    }
    path = folder / "device" / f"{commit}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def test_nobody_has_written_in_them() -> None:
    text = tables.README.read_text()
    found = tables.with_sections(text, tables.measured())
    assert found == text, "run: python benchmarks/tables.py"


def test_of_each_case_the_newest_counts(tmp_path: Path) -> None:
    write(tmp_path, "new0000", 3, row("a", 2e-3, 3e-3))
    write(tmp_path, "older00", 2, row("a", 9e-3, 9e-3), row("b", 0.5, 1.5))
    found = tables.measured(tmp_path)
    assert list(found) == ["A CPU, family 1 model 2, 4 threads"]
    assert tables.section(*found.values()).split("\n") == [
        "",
        "**`op`, fast, fp32**",
        "",
        "| | a | b |",
        "|---|---|---|",
        "| ours, ms | 2.00 | 500 |",
        "| interquartile range, % | 4.00 | 4.00 |",
        "| eager | **1.50 x** (2.00) | 3.00 x (2.00) |",
        "| commit | new0000 | older00 |",
    ]


def test_what_is_not_known_of_a_machine_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, "", 1, row("a", 1.0, 1.0), cpu={})
    (name,) = tables.measured(tmp_path)
    assert name == "a CPU, 4 threads"
    assert "| commit | unknown |" in tables.section(tables.measured(tmp_path)[name])


def test_every_bar_is_said_and_what_falls_short_is_bold(tmp_path: Path) -> None:
    limits = {"tokens_per_second_bar": 1000, "microseconds_bar": 20, "calls": 10}
    limits["memory_bars"] = {"eager": 0.5}
    bad = row("a", 3e-4, 3e-4, tokens_per_second=999, **limits)
    bad["extra_info"]["extra_bytes"] = {"ours": 6e6, "eager": 1e7}
    good = row("b", 1e-4, 3e-4, tokens_per_second=1000, **limits)
    good["extra_info"]["extra_bytes"] = {"ours": 5e6, "eager": 1e7}
    write(tmp_path, "c", 1, bad, good)
    lines = tables.section(*tables.measured(tmp_path).values())
    assert tables.short_of({**good, "commit": "c"}) == []
    assert len(tables.short_of({**bad, "commit": "c"})) == 4
    for line in (
        "| ours, ms | **0.0300** (0.0200) | 0.0100 (0.0200) |",
        "| tokens/s | **999** (1,000) | 1,000 (1,000) |",
        "| eager | **1.00 x** (2.00) | 3.00 x (2.00) |",
        "| extra MB | 6.00 | 5.00 |",
        "| memory, of that of eager | **0.600** (0.500) | 0.500 (0.500) |",
    ):
        assert line in lines


@pytest.mark.parametrize("strict", ["0", "1"])
def test_a_missed_bar_fails_if_it_shall(strict: str, tmp_path: Path) -> None:
    """And what was measured is kept."""
    (tmp_path / "bench_op.py").write_text(
        "def nothing(): pass\n"
        "def work(): sum(range(20000))\n"
        "def test_slow(contest): contest.run(work, {'it': nothing}, bars={'it': 1.0})\n"
        "def test_fast(contest): contest.run(nothing, {'it': work}, bars={'it': 1.0})\n"
    )
    # Beside others, as pytest-xdist says in them, nothing is timed.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    words = ["-p", "conftest", "-o", "python_files=bench_*.py", "--benchmark-json=found.json"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "bench_op.py"],
        cwd=tmp_path,
        env={
            **outside,
            "CUDA_VISIBLE_DEVICES": "",  # or only what runs on a GPU would be timed
            "FDPG_BENCH_SECONDS": "0.01",
            "FDPG_BENCH_STRICT": strict,
            "PYTHONPATH": os.pathsep.join((str(BENCHMARKS), str(BENCHMARKS.parent))),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == int(strict), done.stdout + done.stderr
    assert ("not what was asked for:" in done.stdout) == (strict == "1")
    assert done.stdout.count("BELOW") == 1
    assert len(json.loads((tmp_path / "found.json").read_text())["benchmarks"]) == 2


def test_wide_tables_are_split_and_cases_of_earlier_days_left_out(tmp_path: Path) -> None:
    def case(name: str, dtype: str, keep: str) -> dict[str, Any]:
        found = row(name, 1.0, 1.0)
        found["params"] |= {"dtype": dtype, "keep": keep}
        found["extra_info"]["dtype"] = dtype
        return found | {"fullname": f"benchmarks/bench_op.py::test_fast[{name}-{dtype}-{keep}]"}

    before = row("a", 1.0, 1.0)  # when the test had no `keep`
    now = [case(n, d, k) for n in "abcd" for d in ("fp32", "bf16") for k in ("kept", "not")]
    write(tmp_path, "c", 1, before, *now)
    found = tables.section(*tables.measured(tmp_path).values()).split("\n")
    titles = [line for line in found if line.startswith("**")]
    whose = [
        f"**`op`, fast, {keep}, {dtype}**" for keep in ("kept", "not") for dtype in ("fp32", "bf16")
    ]
    assert titles == whose
    assert found.count("| | a | b | c | d |") == 4


def test_who_took_no_part_is_named(tmp_path: Path) -> None:
    out = row("a", 1.0, 1.0, took_no_part={"vllm": "ValueError: no such family"})
    write(tmp_path, "c", 1, out, row("b", 1.0, 1.0))
    found = tables.section(*tables.measured(tmp_path).values())
    assert "vllm took no part in a: `ValueError: no such family`" in found


def test_sections_are_filled_or_made(tmp_path: Path) -> None:
    write(tmp_path, "c", 1, row("a", 1.0, 1.0))
    write(tmp_path, "g", 1, row("a", 1.0, 1.0), device="A GPU")
    mine = "<!-- results: A GPU -->"
    before = (
        f"# Title\n\n## On a GPU\n\nProse.\n\n{mine}\nold\n<!-- end of results -->\n\n## Tried\n"
    )
    text = tables.with_sections(before, tables.measured(tmp_path))
    assert text.startswith(f"# Title\n\n## On a GPU\n\nProse.\n\n{mine}\n\ntorch 2.13.0.\n\n**`op`")
    assert "old" not in text
    assert "## Tried\n\n## A CPU, family 1 model 2, 4 threads\n\n<!-- results: A CPU" in text
    assert tables.with_sections(text, tables.measured(tmp_path)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, ""), (0.0181, "0.0181"), (2.5, "2.50"), (99.96, "100."), (1234.5, "1,234")],
)
def test_three_digits_count(value: float, text: str) -> None:
    assert tables.number(value) == text.rstrip(".")
