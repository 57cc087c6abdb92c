"""What a run says of itself when it is done: one HTML file with plots and samples, a model card.

Everything is read back from the run's folder, so a report can be made again at any time, and one
report can compare several runs. The HTML holds its pictures and needs nothing from elsewhere.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdpg_fast import page
from fdpg_fast.config import Config
from fdpg_fast.page import show
from fdpg_fast.progress import MOMENT, PARTS, moments_of, seconds_of
from fdpg_fast.run_directory import RunDirectory, RunDirectoryError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FOUR", "ROWS", "evaluation_table", "model_card", "write_card", "write_report"]

# The divergences of the paper, between policy π and target p.
FOUR = {"kl": "KL(p‖π)", "reverse_kl": "KL(π‖p)", "tv": "TV", "js": "JS"}
TO_TARGET = "{}, to the target"

# Rows of the comparison of base and tuned model that are there whatever the target is.
ROWS = {
    **{name: TO_TARGET.format(label) for name, label in FOUR.items()},
    "off_support": "share outside the target's support",
    "kl_to_base": "KL(π‖a), to the base",
    "entropy": "entropy, nats per sample",
    "entropy_per_token": "entropy, nats per token",
    "base_perplexity": "perplexity under the base",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "distinct_3": "distinct-3",
    "self_bleu": "self-BLEU",
    "length": "length, tokens",
    "finished": "ended before the longest",
}


def evaluation_table(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows ``(what, base, tuned, goal)`` of an evaluation.json, moments first."""
    before, after = evaluation["base"], evaluation["tuned"]
    goals = evaluation["goals"]
    table = []
    for key in after:
        if key.startswith(MOMENT):
            name = key.removeprefix(MOMENT)
            goal = f"{goals[name]:.3g}" if name in goals else show(evaluation["target"].get(key))
            table.append((name, show(before.get(key)), show(after[key]), goal))
        elif key.startswith("pass@"):
            table.append((key, show(before.get(key)), show(after[key]), ""))
    minimised = evaluation.get("divergence") or ""
    rows = ROWS if minimised in ROWS else {minimised: TO_TARGET.format(minimised), **ROWS}
    for key, label in rows.items():
        if key in after:
            goal = "0" if key in FOUR or key == minimised else show(evaluation["target"].get(key))
            table.append((label, show(before.get(key)), show(after[key]), goal))
    skipped = after.get("prompts_skipped", (0, None))[0]
    if skipped:  # none of all samples was allowed: what p is there is not known
        table.append(("prompts left out of the divergences", f"{skipped:g}", f"{skipped:g}", ""))
    return table


def write_report(runs: Sequence[RunDirectory], path: Path) -> Path:
    """Writes the report of one run, or one that compares several.

    Raises:
        RunDirectoryError: a run has recorded no step yet, or ``path`` cannot be written.
    """
    told = [_Run.read(run) for run in runs]
    for run in told:
        if not run.metrics:
            raise RunDirectoryError(f"report: {run.path} has recorded no step yet")
    names = _distinct_names([run.path for run in told])
    told = [run.named(name) for run, name in zip(told, names, strict=True)]
    sections = [
        _summary(told),
        _comparison(told),
        page.section("How it went", "".join(_plots(told))),
        _side_by_side(told),
        _settings(told),
    ]
    title = " vs ".join(run.name for run in told)
    runs[0].write_text(path, page.whole(title, sections))
    return path


def write_card(run: RunDirectory) -> None:
    """Writes the card of a run's model: into its folder, and the model's own if that is there."""
    run.write_text(run.card, model_card(run, run.model.name))
    if run.has_model:
        run.write_text(run.model / run.card.name, model_card(run, "."))


def model_card(run: RunDirectory, model: str) -> str:
    """The Markdown card of a tuned model, in the form model hubs read.

    Args:
        run: its run.
        model: where the model is, as seen from the card.
    """
    told = _Run.read(run)
    config, facts = told.config, told.facts
    auto_class = facts.get("auto_class", "AutoModelForCausalLM")
    lines = [
        "---",
        "library_name: transformers",
        # Of an encoder-decoder there is more than one: a hub tells it by the model's own config.
        *(["pipeline_tag: text-generation"] if auto_class == "AutoModelForCausalLM" else []),
        "tags: [fdpg_fast, f-dpg]",
        "---",
        "",
        f"# {run.path.resolve().name}",
        "",
        f"`{facts['model']}` tuned with fdpg_fast {facts['versions']['fdpg_fast']} toward the "
        f"target `{facts['target']}` by minimising the `{config.objective.divergence}` divergence "
        f"over {len(told.metrics)} steps of {config.samples_per_step} samples.",
        "",
        "```python",
        f"from transformers import {auto_class}, AutoTokenizer",
        "",
        f'model = {auto_class}.from_pretrained("{model}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{model}")',
        "```",
        "",
        "Sample at temperature 1 without top-k or top-p: the target is a distribution, and "
        "truncated sampling draws from another one.",
    ]
    stop = config.sampling.stop or config.sampling.stop_in_python
    if stop is not None:
        lines += [
            "",
            f"Its samples ended where `{stop}` said that the text so far was whole. transformers "
            "does not know that function: end them there too.",
        ]
    if told.evaluation:
        lines += [
            "",
            f"## Measured on {told.evaluation['samples']} fresh samples",
            "",
            *page.markdown_table(["", "base", "tuned", "goal"], evaluation_table(told.evaluation)),
        ]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines += [
        "",
        "## Made by",
        "",
        f"Seed {config.run.seed}; {versions}; {facts['device']}. The folder of "
        "the run has every setting in `config.yaml`, every step in `metrics.jsonl`, plots in "
        "`report.html`.",
        "",
        "The base model's licence and limits hold for the tuned one too.",
        "",
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# Reading a run
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    path: Path
    name: str
    config: Config
    facts: dict[str, Any]
    metrics: list[dict[str, Any]]
    timing: list[dict[str, Any]]
    evaluation: dict[str, Any] | None

    @classmethod
    def read(cls, run: RunDirectory) -> _Run:
        return cls(
            path=run.path,
            name=run.path.resolve().name,
            config=run.config(),
            facts=run.read_facts(),
            metrics=run.read("metrics.jsonl"),
            timing=run.read("timing.jsonl"),
            evaluation=run.read_json(run.evaluation),
        )

    def named(self, name: str) -> _Run:
        return _Run(**{**self.__dict__, "name": name})

    @property
    def goals(self) -> dict[str, float]:
        return dict(self.facts.get("goals", {}))

    def column(self, key: str) -> list[float]:
        """One number per step, NaN where a step has none."""
        return [page.number(record.get(key)) for record in self.metrics]

    @property
    def steps(self) -> list[int]:
        return [record["step"] for record in self.metrics]


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many parts as tell the runs apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


# ---------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------


def _plots(runs: Sequence[_Run]) -> list[str]:
    features = list(dict.fromkeys(name for run in runs for name in moments_of(run.metrics[0])))
    lines = partial(partial, _draw_lines, runs=runs)
    figures = [page.plot(name, partial(_draw_moment, runs=runs, name=name)) for name in features]
    divergences = dict(FOUR)
    minimised = dict.fromkeys(run.config.objective.divergence for run in runs)
    if not minimised.keys() <= FOUR.keys():  # each run's own
        divergences = {"divergence": " and ".join(minimised), **FOUR}
    figures += [
        page.plot(
            f"{label}: divergence to the target", lines(key=key, error=f"{key}_se", floor=0.0)
        )
        for key, label in divergences.items()
    ]
    figures += [
        page.plot("KL to the base (dashed: what the target has)", partial(_draw_base, runs=runs)),
        page.plot("entropy, nats per token", lines(key="entropy_per_token")),
        page.plot("log Z", lines(key="log_z", error="log_z_se")),
        page.plot("effective samples of the target per step", lines(key="target_ess", floor=0.0)),
        page.plot("length, tokens", lines(key="length", floor=0.0)),
        page.plot("gradient norm", lines(key="grad_norm", floor=0.0)),
        page.plot("sampler vs trainer, nats per token", partial(_draw_gap, runs=runs, key="gap")),
        page.plot(
            "sampler vs trainer, nats per sample", partial(_draw_gap, runs=runs, key="gap_sequence")
        ),
    ]
    figures += [
        page.plot(
            "seconds per step" + (f", {run.name}" if len(runs) > 1 else ""),
            partial(_draw_seconds, run=run),
        )
        for run in runs
        if run.timing
    ]
    return figures


def _draw_lines(
    axes: Axes,
    runs: Sequence[_Run],
    key: str,
    *,
    error: str | None = None,
    floor: float | None = None,
) -> None:
    """One line per run, a band of one standard error around it where that is known."""
    for at, run in enumerate(runs):
        values = run.column(key)
        axes.plot(run.steps, values, color=f"C{at}", label=run.name if len(runs) > 1 else None)
        if error is not None:
            spread = run.column(error)
            low = [v - s for v, s in zip(values, spread, strict=True)]
            high = [v + s for v, s in zip(values, spread, strict=True)]
            axes.fill_between(run.steps, low, high, color=f"C{at}", alpha=0.2, linewidth=0)
    if floor is not None:
        axes.set_ylim(bottom=floor)
    if all(math.isnan(value) for run in runs for value in run.column(key)):
        said = "infinite in every step" if _infinite(runs, key) else "not known in any step"
        axes.text(0.5, 0.5, said, ha="center", color="gray", transform=axes.transAxes)
        axes.set_axis_off()


def _infinite(runs: Sequence[_Run], key: str) -> bool:
    return any(record.get(key) == "inf" for run in runs for record in run.metrics)


def _draw_moment(axes: Axes, runs: Sequence[_Run], name: str) -> None:
    _draw_lines(axes, runs, MOMENT + name, error=f"moment_se: {name}")
    for goal in {run.goals[name] for run in runs if name in run.goals}:
        axes.axhline(goal, color="black", linestyle="--", linewidth=1, label="goal")


def _draw_base(axes: Axes, runs: Sequence[_Run]) -> None:
    _draw_lines(axes, runs, "kl_to_base", error="kl_to_base_se", floor=0.0)
    for at, run in enumerate(runs):
        axes.plot(run.steps, run.column("kl_target_base"), color=f"C{at}", linestyle="--")


def _draw_gap(axes: Axes, runs: Sequence[_Run], key: str) -> None:
    for at, run in enumerate(runs):
        for part, style in (("mean", "-"), ("p99", "--"), ("max", ":")):
            label = part + (f", {run.name}" if len(runs) > 1 else "")
            axes.plot(run.steps, run.column(f"{key}_{part}"), style, color=f"C{at}", label=label)
    if any(v > 0 for run in runs for v in run.column(f"{key}_max")):
        axes.set_yscale("log")


def _draw_seconds(axes: Axes, run: _Run) -> None:
    axes.stackplot(
        [record["step"] for record in run.timing],
        *[[record[part] for record in run.timing] for part in PARTS],
        labels=PARTS,
        alpha=0.8,
    )
    axes.set_ylim(bottom=0)


# ---------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------


def _summary(runs: Sequence[_Run]) -> str:
    rows = [("model", [str(run.facts.get("model", "?")) for run in runs])]
    rows += [
        ("target", [str(run.facts.get("target", "?")) for run in runs]),
        ("divergence", [run.config.objective.divergence for run in runs]),
        ("baseline", [str(run.facts.get("baseline", "?")) for run in runs]),
        (
            "samples",
            [f"{len(run.metrics)} steps of {run.config.samples_per_step}" for run in runs],
        ),
        ("samples/s", [_throughput(run) for run in runs]),
        ("device", [str(run.facts.get("device", "?")) for run in runs]),
    ]
    return page.section(
        "", page.table(["", *[run.name for run in runs]], [[k, *v] for k, v in rows], "facts")
    )


def _throughput(run: _Run) -> str:
    seconds = sum(map(seconds_of, run.timing))
    return f"{sum(t['samples'] for t in run.timing) / seconds:.1f}" if seconds else "?"


def _comparison(runs: Sequence[_Run]) -> str:
    groups = _groups([run for run in runs if run.evaluation])
    if not groups:
        return ""
    measured = [run for group in groups for run in group]
    header = ["", *_headings(groups, "goal")]
    counts = {run.evaluation["samples"] for run in measured if run.evaluation}
    tables = {run.name: _cells(run, counted=len(counts) > 1) for run in measured}
    labels = list(dict.fromkeys(label for table in tables.values() for label in table))
    rows = []
    for label in labels:
        row = [label]
        for group in groups:
            of_runs = [tables[run.name].get(label, ("", "", "")) for run in group]
            base, _, goal = of_runs[0]  # of one run, whose samples all cells of the column are of
            row += [base, *[cells[1] for cells in of_runs], goal]
        rows.append(row)
    note = page.note("± one standard error. p: the target, π: the tuned model, a: the base.")
    count = f"{counts.pop()} " if len(counts) == 1 else ""
    return page.section(f"Measured on {count}fresh samples", page.table(header, rows) + note)


def _groups(runs: Sequence[_Run]) -> list[list[_Run]]:
    """Runs from one base to one target on the same prompts, which can share a column of the base's.

    Any other base, or the same with another target, other prompts or other ends of samples, has
    other numbers.
    """
    groups: dict[Any, list[_Run]] = {}
    for run in runs:
        facts, config = run.facts, run.config
        same = (facts.get("model"), facts.get("target"), str(config.prompts.source))
        sampling, eos_ids = config.sampling, str(config.model.eos_ids)
        ends = (sampling.max_new_tokens, sampling.stop, sampling.stop_in_python, eos_ids)
        groups.setdefault((same, ends), []).append(run)
    return list(groups.values())


def _headings(groups: Sequence[Sequence[_Run]], *last: str) -> list[str]:
    """Of each group: its base, its runs, and what comes last."""
    single = len(groups) == len(groups[0]) == 1
    headings = []
    for group in groups:
        names = [run.name for run in group]
        of = f" of {', '.join(names)}" if len(groups) > 1 else ""
        headings += [f"base{of}", *(["tuned"] if single else names)]
        headings += [f"{word}{of}" for word in last]
    return headings


def _cells(run: _Run, counted: bool) -> dict[str, tuple[str, str, str]]:
    """label -> base, tuned, goal; first of all how many samples that is of, if ``counted``."""
    evaluation = run.evaluation or {}
    rows = evaluation_table(evaluation)
    if counted:
        count = str(evaluation["samples"])
        rows.insert(0, ("fresh samples", count, count, ""))
    return {label: (base, tuned, goal) for label, base, tuned, goal in rows}


def _side_by_side(runs: Sequence[_Run]) -> str:
    groups = _groups([run for run in runs if run.evaluation and run.evaluation.get("texts")])
    if not groups:
        return ""
    columns = []
    for group in groups:
        of_runs = [run.evaluation["texts"] for run in group if run.evaluation]
        columns.append((of_runs[0]["prompt"], of_runs[0]["base"]))
        columns += [(texts["prompt"], texts["tuned"]) for texts in of_runs]
    rows = zip(*(map(page.prompted, *column) for column in columns), strict=False)
    body = page.table(_headings(groups), list(rows), "samples")
    if len(groups) == len({run.evaluation["seed"] for run in groups[0] if run.evaluation}) == 1:
        body = page.note("Each row was drawn with the same random numbers.") + body
    return page.section("Samples side by side", body)


def _settings(runs: Sequence[_Run]) -> str:
    return "".join(
        f"<details><summary>config.yaml of {html.escape(run.name)}</summary>"
        f"<pre>{html.escape(run.config.dump())}</pre></details>"
        for run in runs
    )
