"""How a benchmark here is run, and where its numbers go.

``contest`` runs contenders in turn, round after round, so that what else the machine does falls on
all of them alike; read ratios, not times. pytest-benchmark times our own entry; the others' times
stand beside it in ``extra_info``. A run with timing on writes
``benchmarks/results/<device>/<commit>.json`` (pytest-benchmark's format, less the raw rounds and
the machine's name); ``--benchmark-json=PATH`` sends it elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# As libgomp itself has it: nobody else is here, and a thread that sleeps takes as long to wake as
# the smallest ops take. Before torch loads libgomp, and before fdpg_fast makes it less.
os.environ.setdefault("GOMP_SPINCOUNT", "300000")

import peers
import pytest
import torch
from memory import peak_extra_bytes
from tables import short_of

from fdpg_fast import _build

RESULTS = Path(__file__).parent / "results"
SECONDS = float(os.environ.get("FDPG_BENCH_SECONDS", "4"))  # of one contest, all contenders
STRICT = os.environ.get("FDPG_BENCH_STRICT") == "1"  # a bar that is not reached fails
MOST_ROUNDS = 200

Contenders = Mapping[str, Callable[[], object]]


# --------------------------------------------------------------------------------------------------
# The contest


def seconds_of(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def finished(function: Callable[[], object], calls: int) -> Callable[[], None]:
    """The function so many times, until a GPU has done them too."""

    def run() -> None:
        for _ in range(calls):
            function()
        if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()

    return run


def captured(entry: Callable[[], None]) -> Callable[[], None]:
    """The same as one CUDA graph: what the GPU takes for it, not what it takes to ask for it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        entry()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        entry()
    return finished(graph.replay, 1)


class Contest:
    """Times our entry against others in interleaved rounds."""

    def __init__(self, benchmark: Any) -> None:
        self._benchmark = benchmark

    def run(
        self,
        ours: Callable[[], object],
        others: Contenders,
        *,
        bytes_moved: float = 0,
        flops: float = 0,
        tokens: int = 0,
        bars: Mapping[str, float] | None = None,
        prepare: Callable[[], object] = lambda: None,
        least_rounds: int = 7,
        calls: int = 1,
        graph: bool = False,
        memory_bars: Mapping[str, float] | None = None,
        **info: Any,
    ) -> None:
        """Runs and records.

        Args:
            ours: our entry.
            others: name -> entry; what is to be beaten, and ``read``: reading the input alone.
            bytes_moved, flops: the least that ours must move and compute, counted by hand in the
                benchmark; 0 where the other is what it waits for.
            tokens: how many a call samples, where that is what it does.
            bars: name -> the speed-up over it that is asked for.
            prepare: runs, untimed, before every entry, so that all find the caches alike.
            calls: how many calls of a round are timed as one, for ops of microseconds; all that is
                recorded in ``extra_info`` is per call.
            graph: the calls of a round are one CUDA graph. A call that takes one of several inputs
                in turn, more than its cache holds, finds none of them there.
            memory_bars: name -> the share of its peak extra memory that ours may take. With it, if
                empty, everybody's peak is recorded, after the timing; None: it is not.
            info: what else to record, such as shape and dtype.
        """
        calls = calls if self._benchmark.enabled else 1
        entries = {name: finished(other, calls) for name, other in others.items()}
        our_entry = finished(ours, calls)
        if graph and self._benchmark.enabled:
            entries = {name: captured(entry) for name, entry in entries.items()}
            our_entry = captured(our_entry)
        times: dict[str, list[float]] = {name: [] for name in others}

        def others_in_turn() -> None:
            for name, entry in entries.items():
                prepare()
                times[name].append(seconds_of(entry))
            prepare()

        rounds = least_rounds
        if self._benchmark.enabled:
            others_in_turn()  # warms up: first touch of memory, compilation
            our_entry()
            for values in times.values():
                values.clear()
            others_in_turn()
            one = sum(values[0] for values in times.values()) + seconds_of(our_entry)
            rounds = max(least_rounds, min(MOST_ROUNDS, round(SECONDS / one)))
        self._benchmark.pedantic(our_entry, setup=others_in_turn, rounds=rounds)
        if not self._benchmark.enabled:
            return
        median = self._benchmark.stats.stats.median / calls
        others_medians = {n: statistics.median(values) / calls for n, values in times.items()}
        if memory_bars is not None:
            info["extra_bytes"] = {
                name: peak_extra_bytes(entry) for name, entry in {"ours": ours, **others}.items()
            }
            info["memory_bars"] = dict(memory_bars)
        self._benchmark.extra_info.update(
            info,
            bytes=bytes_moved,
            flops=flops,
            gigabytes_per_second=bytes_moved / median / 1e9,
            gigaflops_per_second=flops / median / 1e9,
            tokens_per_second=tokens / median,
            milliseconds={name: 1e3 * seconds for name, seconds in others_medians.items()},
            speedup={name: seconds / median for name, seconds in others_medians.items()},
            calls=calls,
            bars=dict(bars or {}),
        )
        if STRICT:
            stats = {name: getattr(self._benchmark.stats.stats, name) for name in ("median", "iqr")}
            facts = {"fullname": "", "params": None, "commit": "", "stats": stats}
            if short := short_of({**facts, "extra_info": self._benchmark.extra_info}):
                pytest.fail("\n".join(("not what was asked for:", *short)), pytrace=False)


@pytest.fixture
def contest(benchmark: Any) -> Contest:
    return Contest(benchmark)


# --------------------------------------------------------------------------------------------------
# Where the numbers go


def device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    import cpuinfo  # pytest-benchmark brings it

    cpu = cpuinfo.get_cpu_info()  # a virtual machine may call different ones alike
    known = [str(cpu[key]) for key in ("brand_raw", "family", "model") if key in cpu]
    name = " ".join(known) or "cpu"
    return f"{name} {_build.load().cpu_isa()} {torch.get_num_threads()} threads"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm|c)\)", "", text.lower())).strip("-")


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads the option
def pytest_configure(config: pytest.Config) -> None:
    # torch.compile's own imports.
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit.*:DeprecationWarning")
    if config.option.benchmark_disable or config.option.benchmark_json:
        return
    from pytest_benchmark.utils import get_commit_info

    commit = get_commit_info()
    name = (commit.get("id") or "unversioned")[:10] + ("-dirty" if commit.get("dirty") else "")
    path = RESULTS / slug(device()) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    config.option.benchmark_json = str(path)


def of_gpu(item: pytest.Item) -> bool:
    return any("CUDA" in mark.kwargs["reason"] for mark in item.iter_markers("skipif"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where there is a GPU it is what is measured: its table is no place for rows of the CPU, which
    are measured where it is hidden (CUDA_VISIBLE_DEVICES=)."""
    if config.option.benchmark_disable or not torch.cuda.is_available():
        return
    config.hook.pytest_deselected(items=[item for item in items if not of_gpu(item)])
    items[:] = filter(of_gpu, items)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    machine_info.pop("node", None)
    build = _build.load().build_info()
    machine_info["device"] = device()
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cpu_isa"] = _build.load().cpu_isa()
    machine_info["compiler"] = build["compiler"]
    machine_info["peers"] = peers.report()


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: Any) -> None:
    commit_info.pop("project", None)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: Any) -> None:
    rows = output_json["benchmarks"]
    for row in rows:
        row["stats"].pop("data", None)
    # One file per commit: benchmarks of an earlier run that this one did not repeat stay in it.
    given = config.option.benchmark_json  # pytest-benchmark opens what the command line names
    path = Path(getattr(given, "name", given))
    if path.is_file() and path.stat().st_size:
        measured = {row["fullname"] for row in rows}
        earlier = json.loads(path.read_text())["benchmarks"]
        rows.extend(row for row in earlier if row["fullname"] not in measured)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    contests = [b for b in getattr(session, "benchmarks", []) if "speedup" in b.extra_info]
    if not contests:
        return
    terminalreporter.section("ours against others, medians of interleaved rounds")
    for b in contests:
        info = b.extra_info
        extra = info.get("extra_bytes", {})
        milliseconds = 1e3 * b.stats.median / info["calls"]
        ours = [f"{b.name}: {milliseconds:.3f} ms"] + [
            f"{info[f'giga{what}_per_second']:.1f} {unit}"
            for what, unit in (("bytes", "GB/s"), ("flops", "GFLOP/s"))
            if info[what]
        ]
        if info["tokens_per_second"]:
            ours.append(f"{info['tokens_per_second']:.0f} tokens/s")
        if extra:
            ours.append(f"{extra['ours'] / 1e6:.1f} MB extra")
        terminalreporter.write_line(", ".join(ours))
        for name, ratio in info["speedup"].items():
            line = f"    {ratio:8.2f} x  {name} ({info['milliseconds'][name]:.3f} ms"
            line += f", {extra[name] / 1e6:.1f} MB extra)" if extra else ")"
            bar = info["bars"].get(name)
            if bar is not None:
                line += f"  bar {bar:.3g}: {'ok' if ratio >= bar else 'BELOW'}"
            bar = info.get("memory_bars", {}).get(name)
            if bar is not None:
                share = extra["ours"] / extra[name]
                line += f"  memory {share:.3f}, bar {bar:g}: {'ok' if share <= bar else 'ABOVE'}"
            terminalreporter.write_line(line)
        for name, why in info.get("took_no_part", {}).items():
            terminalreporter.write_line(f"           -    {name}: {why}")
    for name, why in peers.report().items():
        if why != "available":
            terminalreporter.write_line(f"not measured: {name}, {why}")
