"""Writes the tables of README.md from the files in results/: nobody copies a number by hand.

    python benchmarks/tables.py

Each device has a section, between two comments that this script looks for, with the newest
measurement of each case; what is said about it stands above them. A device without a section gets
one at the end. A table has a case per column and a contender per row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README, RESULTS = HERE / "README.md", HERE / "results"
MOST_COLUMNS = 6
BEGIN, END = "<!-- results: {} -->", "<!-- end of results -->"

Row = dict[str, Any]  # of pytest-benchmark, with `commit` and `torch`


def device(machine: dict[str, Any]) -> str:
    """What was measured on: CPUs of one name may be different ones."""
    if "cpu_isa" not in machine or machine["cpu_isa"] not in machine["device"]:
        return str(machine["device"])  # a GPU
    cpu = machine["cpu"]
    parts = [f"{key} {cpu[key]}" for key in ("family", "model") if key in cpu]  # ARM has none
    name = ", ".join([cpu.get("brand_raw", "a CPU"), *([" ".join(parts)] if parts else [])])
    return f"{name}, {machine['threads']} threads"


def measured(results: Path = RESULTS) -> dict[str, dict[str, Row]]:
    """Device -> full name of a case -> its newest measurement."""
    files = [json.loads(path.read_text()) for path in results.glob("*/*.json")]
    found: dict[str, dict[str, Row]] = {}
    for file in sorted(files, key=lambda file: file["datetime"]):
        commit = file["commit_info"].get("id") or "unknown"  # of a tree without its history
        facts = {"commit": commit[:7], "torch": file["machine_info"]["torch"]}
        rows = found.setdefault(device(file["machine_info"]), {})
        rows.update({row["fullname"]: {**row, **facts} for row in file["benchmarks"]})
    return found


def section(rows: dict[str, Row]) -> str:
    """The tables of one device."""
    by_test: dict[str, list[Row]] = {}
    for name, row in rows.items():
        by_test.setdefault(name.partition("[")[0], []).append(row)
    lines = []
    for test, cases in sorted(by_test.items()):
        of_today = set(cases[-1]["params"] or {})  # what a test takes may have changed
        for suffix, part in split([c for c in cases if set(c["params"] or {}) == of_today]):
            lines += ["", f"**{title(test)}{suffix}**", "", *table(part)]
    return "\n".join(lines)


def title(test: str) -> str:
    """Of benchmarks/bench_token_logprob.py::test_forward: `token_logprob`, forward."""
    op, what = re.fullmatch(r".*bench_(\w+)\.py::test_(\w+)", test).groups()
    return f"`{op}`" if what == op else f"`{op}`, {what.replace('_', ' ')}"


def split(cases: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Tables narrow enough to read, and what their cases have in common."""
    by = [key for key in cases[0]["params"] or {} if key not in ("name", "device")]
    by.sort(key=lambda key: key == "dtype")  # dtypes stay beside each other, if there is room
    parts = {(): cases}
    for key in by:
        if max(map(len, parts.values())) <= MOST_COLUMNS:
            break
        wider, parts = parts, {}
        for before, part in wider.items():
            for case in part:
                parts.setdefault((*before, param(case, key)), []).append(case)
    for values, part in parts.items():
        dtypes = {case["extra_info"].get("dtype", "") for case in part}
        common = [*values, *(dtypes - set(values) if len(dtypes) == 1 else ())]
        yield "".join(f", {value}" for value in common), part


def table(cases: list[Row]) -> list[str]:
    infos = [case["extra_info"] for case in cases]
    lines: list[str] = []

    def add(name: str, cell: Callable[[Row], str]) -> None:
        cells = [cell(case) for case in cases]
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")

    def add_each(key: str, name: str, cell: Callable[[Row, str], str]) -> None:
        for other in dict.fromkeys(other for info in infos for other in info.get(key, {})):
            add(name.format(other), lambda case, other=other: cell(case["extra_info"], other))

    heads = column_heads(cases)
    lines.append(f"| | {' | '.join(heads[case['fullname']] for case in cases)} |")
    lines.append("|---" * (1 + len(cases)) + "|")
    add("shape", lambda case: case["extra_info"].get("shape", ""))
    add("ours, ms", own_time)
    add("interquartile range, %", spread)
    add("GB/s", lambda case: number(case["extra_info"].get("gigabytes_per_second", 0)))
    add("TFLOP/s", lambda case: number(case["extra_info"].get("gigaflops_per_second", 0) / 1e3))
    add("tokens/s", tokens)
    add_each("speedup", "{}", speedup)
    add(
        "extra MB",
        lambda case: number(case["extra_info"].get("extra_bytes", {}).get("ours", 0) / 1e6),
    )
    add_each("memory_bars", "memory, of that of {}", memory)
    add("commit", lambda case: case["commit"])
    for case in cases:
        for name, why in case["extra_info"].get("took_no_part", {}).items():
            where = heads[case["fullname"]]
            lines += [
                "",
                f"{name} took no part{where and ' in '}{where}: `{why.strip(' ,:')[:80]}`",
            ]
    return lines


def short_of(case: Row) -> list[str]:
    """The rows of a case's table in which it falls short of what was asked for."""
    return [line for line in table([case]) if "**" in line]


def column_heads(cases: list[Row]) -> dict[str, str]:
    """Full name -> the values of the parameters in which the cases differ."""
    keys = [
        key
        for key in cases[0]["params"] or {}
        if key != "device" and len({param(case, key) for case in cases}) > 1
    ]
    return {case["fullname"]: " ".join(param(case, key) for key in keys) for case in cases}


def param(case: Row, key: str) -> str:
    """Its value, or what pytest-benchmark makes of a dtype: UNSERIALIZABLE[torch.float32]."""
    return re.sub(r".*\[torch\.(\w+)\]", r"\1", str(case["params"][key]))


def own_time(case: Row) -> str:
    info = case["extra_info"]
    milliseconds = 1e3 * case["stats"]["median"] / info.get("calls", 1)
    most = (info.get("microseconds_bar") or 0) / 1e3
    return barred(number(milliseconds), most, milliseconds <= most)


def spread(case: Row) -> str:
    """The interquartile range of the rounds, in percent of their median."""
    return number(100 * case["stats"]["iqr"] / case["stats"]["median"])


def tokens(case: Row) -> str:
    info = case["extra_info"]
    least, got = info.get("tokens_per_second_bar") or 0, info.get("tokens_per_second", 0)
    return barred(f"{got:,.0f}" if got else "", least, got >= least)


def speedup(info: Row, name: str) -> str:
    least, got = info["bars"].get(name, 0), info["speedup"].get(name, 0)
    return barred(f"{number(got)} x" if got else "", least, got >= least)


def memory(info: Row, name: str) -> str:
    most, extra = info.get("memory_bars", {}).get(name, 0), info.get("extra_bytes", {})
    if not most or not extra.get(name):
        return ""
    share = extra["ours"] / extra[name]
    return barred(number(share), most, share <= most)


def barred(text: str, bar: float, held: bool) -> str:
    """With what was asked for in brackets; bold where it was not reached."""
    if not bar or not text:
        return text
    asked = f"{bar:,.0f}" if bar >= 100 else number(bar)
    return f"{text} ({asked})" if held else f"**{text}** ({asked})"


def number(value: float) -> str:
    """Three digits that count; nothing for 0."""
    if not value:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def with_sections(text: str, found: dict[str, dict[str, Row]]) -> str:
    """The README with a section for each device, as far as it has results."""
    for name in sorted(found):
        begin = BEGIN.format(name)
        if begin not in text:
            text = f"{text.rstrip()}\n\n## {name}\n\n{begin}\n{END}\n"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(END)
        torch = ", ".join(sorted({row["torch"] for row in found[name].values()}))
        text = f"{before}{begin}\n\ntorch {torch}.\n{section(found[name])}\n\n{END}{after}"
    return text


if __name__ == "__main__":
    README.write_text(with_sections(README.read_text(), measured()))
