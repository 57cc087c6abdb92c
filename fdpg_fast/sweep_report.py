"""What came out of a sweep, for people (HTML, Markdown) and for programs (CSV).

Everything is read from measured.json and the runs' logs, so that it can be written again.
"""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fdpg_fast import page
from fdpg_fast.page import number, show
from fdpg_fast.progress import MOMENT
from fdpg_fast.report import FOUR, ROWS
from fdpg_fast.run_directory import RunDirectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["cross_table", "measures_table", "write_sweep_report"]

Pair = Sequence[Any]  # value and standard error, as JSON has them
Table = tuple[list[str], list[list[str]]]  # header, rows

# What is measured besides divergences and moments, in order; `ROWS` are those of any evaluation.
MEASURES = {
    **{key: label for key, label in ROWS.items() if key not in FOUR},
    "ess": "effective samples of the target",
    "reward_std": "standard deviation of the pseudo-reward",
    "seconds": "training, seconds",
}
CURVES = {
    "kl_to_base": "KL(π‖a), nats",
    "entropy_per_token": "entropy, nats per token",
    "target_ess": "effective samples of the target per step",
    "reward_std": "standard deviation of the pseudo-reward",
    "length": "length, tokens",
}


def write_sweep_report(
    folder: RunDirectory,
    measured: Mapping[str, Any],
    runs: Mapping[tuple[str, int], RunDirectory],
) -> None:
    """Writes report.html, report.md and measured.csv into the folder of a sweep.

    Args:
        folder: where.
        measured: what measured.json holds.
        runs: (divergence, seed) -> its run.

    Raises:
        RunDirectoryError: they cannot be written.
    """
    folder.write_text(folder.path / "measured.csv", _csv(measured))
    facts = next(iter(runs.values())).read_facts()
    folder.write_text(folder.path / "report.md", _markdown(measured, facts))
    logs = {
        f: [run.read("metrics.jsonl") for (name, _), run in runs.items() if name == f]
        for f in measured["runs"]
    }
    title = f"sweep: {folder.path.resolve().name}"
    folder.write_text(folder.report, page.whole(title, _sections(measured, facts, logs)))


def cross_table(measured: Mapping[str, Any]) -> Table:
    """Trained on f (rows) x measured by g (columns); a star at the lowest of each column.

    Models are measured on the same samples, so what these are uncertain by hardly shows in the
    spread over seeds, nor in differences between rows: it has a row of its own.
    """
    columns = measured["columns"]
    names = ["base", *measured["runs"]]
    cells = {g: [_over_seeds(measured, name, g) for name in names] for g in columns}
    shown = {}
    for g, pairs in cells.items():
        values = [number(pair[0]) for pair in pairs[1:]]
        lowest = min((value for value in values if value == value), default=None)
        shown[g] = [show(pairs[0])] + [
            show(pair) + (" *" if len(values) > 1 and number(pair[0]) == lowest else "")
            for pair in pairs[1:]
        ]
    rows = [[name, *[shown[g][at] for g in columns]] for at, name in enumerate(names)]
    if _seeds(measured) > 1:
        largest = [max(number(run[g][1]) for run in _all_runs(measured)) for g in columns]
        rows.append(
            ["all: error of the samples", *[f"± {e:.3f}" if e == e else "" for e in largest]]
        )
    return ["trained on", *columns], rows


def measures_table(measured: Mapping[str, Any]) -> Table:
    """Every other measure (rows) of base and of each divergence (columns), and of the target."""
    names, goals, target = ["base", *measured["runs"]], measured["goals"], measured["target"]
    labels = {key: key.removeprefix(MOMENT) for key in _moments(measured)}
    labels |= {key: key for key in _passes(measured)} | MEASURES
    rows = []
    for key, label in labels.items():
        goal = show(target.get(key))
        if label in goals:
            goal = f"{goals[label]:g}"
        if key == "ess":
            label, goal = f"{label}, of {measured['samples']}", ""
        rows.append([label, *[show(_over_seeds(measured, name, key)) for name in names], goal])
    return ["", *names, "target"], rows


def _moments(measured: Mapping[str, Any]) -> list[str]:
    return [key for key in measured["base"] if key.startswith(MOMENT)]


def _passes(measured: Mapping[str, Any]) -> list[str]:
    """``pass@1: NAME``, ``pass@4: NAME``, ...: none for one prompt or one sample of each."""
    return [key for key in measured["base"] if key.startswith("pass@")]


def _over_seeds(measured: Mapping[str, Any], name: str, key: str) -> Pair:
    """Mean over seeds and its standard error; of a single model that of its samples."""
    models = [measured["base"]] if name == "base" else measured["runs"][name].values()
    pairs: list[Pair] = [model[key] for model in models if key in model]
    if len(pairs) < 2:
        return pairs[0] if pairs else (None, None)
    mean, error = _mean([math.nan if value is None else float(value) for value, _ in pairs])
    if not math.isfinite(mean):
        return None if math.isnan(mean) else mean, None
    return mean, error


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, which one value alone does not tell: NaN."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


# ------------------------------------------------------------------------------------------------
# Words that belong to the tables


def _notes(measured: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, str]:
    seeds = _seeds(measured)
    spread = (
        f"± standard error over {seeds} seeds (of the base: of its samples)"
        if seeds > 1
        else "± standard error of the samples, as there is one seed: it does not say how much "
        "another seed would differ"
    )
    total = measured["samples"] * measured["models"]
    known = ", ".join(f"{g} is {FOUR[g]}" for g in ("kl", "reverse_kl"))
    shared = (
        " What the samples are uncertain by is common to all rows, and stands in the last one."
        if seeds > 1
        else ""
    )
    cross = (
        "Rows: what was minimised. Columns: divergence to the target, in nats (tv: a share); "
        f"{known}. Lower is nearer; * lowest of its column. {spread}.{shared} Every number is "
        f"estimated on the same {total} samples: {measured['samples']} of each of the "
        f"{measured['models']} models (base and every seed), drawn with the same random numbers "
        "and weighed as samples of their mixture, with terms that are never negative. log Z is one "
        "number for all, the mean of P/q over that mixture q: "
        f"{show(measured['target']['log_z'])} (mean over prompts)."
    )
    skipped, _ = measured["base"]["prompts_skipped"]
    if skipped:
        prompts = min(facts["prompts"], measured["samples"])  # fewer samples: the first prompts
        cross += (
            f" For {skipped} of {prompts} prompts no model drew a sample that the target allows: "
            "their log Z is not known, and divergences, and all that is said of the target, are "
            "means over the other prompts."
        )
    infinite = any(
        str(run.get(g, [0])[0]) == "inf"
        for g in measured["columns"]
        for run in (*_all_runs(measured), measured["base"])
    )
    if infinite:
        cross += (
            " ∞: the model gives texts that the target forbids; how many of its samples, says the "
            "row 'share outside the target's support' below."
        )
    other = (
        f"{spread}. Of each model's own {measured['samples']} samples; of the target by weights "
        "p/q on all samples. Distinct-n and self-BLEU (sacrebleu, 64 samples) fall and rise with "
        "the number of texts, which is the same for all. The pseudo-reward is that of the "
        "divergence trained on, so its spread has another scale for each. Seconds are those of "
        "sampling, scoring and training, without what is measured here."
    )
    return {"cross": cross, "other": other}


def _seeds(measured: Mapping[str, Any]) -> int:
    return max(len(runs) for runs in measured["runs"].values())


def _all_runs(measured: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for runs in measured["runs"].values():
        yield from runs.values()


def _summary(measured: Mapping[str, Any], facts: Mapping[str, Any]) -> list[list[str]]:
    versions = ", ".join(f"{name} {v}" for name, v in facts.get("versions", {}).items())
    return [
        ["model", str(facts.get("model", "?"))],
        ["target", str(facts.get("target", "?"))],
        ["trained on", ", ".join(measured["runs"])],
        ["seeds", str(_seeds(measured))],
        ["prompts", str(facts.get("prompts", "?"))],
        ["device", f"{facts.get('device', '?')}, {facts.get('compute', '?')}"],
        ["versions", versions],
    ]


# ------------------------------------------------------------------------------------------------
# Files


def _csv(measured: Mapping[str, Any]) -> str:
    """One line per number: easy to read into anything."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(["trained_on", "seed", "measure", "value", "standard_error"])
    for measure, pair in measured["base"].items():
        lines.writerow(["base", "", measure, *pair])
    for name, runs in measured["runs"].items():
        for seed, measures in runs.items():
            lines.writerows([name, seed, measure, *pair] for measure, pair in measures.items())
    for measure, pair in measured["target"].items():
        lines.writerow(["target", "", measure, *pair])
    return out.getvalue()


def _markdown(measured: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    notes = _notes(measured, facts)
    lines = ["# Sweep", ""]
    lines += [f"- {name}: {value}" for name, value in _summary(measured, facts)]
    lines += ["", "## Trained on f, measured by g", ""]
    lines += [*page.markdown_table(*cross_table(measured)), "", notes["cross"]]
    lines += ["", "## Alignment, diversity, cost", ""]
    lines += [*page.markdown_table(*measures_table(measured)), "", notes["other"]]
    lines += [
        "",
        "Plots and samples are in `report.html`, every number in `measured.csv`, settings in "
        "`sweep.yaml`.",
        "",
    ]
    return "\n".join(lines)


def _sections(
    measured: Mapping[str, Any],
    facts: Mapping[str, Any],
    logs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
) -> list[str]:
    notes = _notes(measured, facts)
    spread = "± one standard error over seeds" if _seeds(measured) > 1 else "one seed"
    return [
        page.section("", page.table(["", ""], _summary(measured, facts), "facts")),
        page.section(
            "Trained on f, measured by g",
            page.table(*cross_table(measured)) + page.note(notes["cross"]),
        ),
        page.section(
            "Alignment against diversity",
            "".join(_trade_offs(measured))
            + page.note(
                "Diversity is normalised entropy (nats per token). Alignment is the mean of a "
                "feature under π (dashed: its goal), or the Jensen-Shannon divergence to the "
                "target (lower is better). Small: a seed. Large: their mean, ± one standard error. "
                "Cross: the base. Star: the target itself, as the pooled samples tell of it. A "
                "model that has reached the target is at the star; below it, diversity is lost."
                + (
                    " pass@k: the chance that any of k samples of a prompt passes."
                    if _passes(measured)
                    else ""
                )
            ),
        ),
        page.section(
            "Alignment, diversity, cost",
            page.table(*measures_table(measured)) + page.note(notes["other"]),
        ),
        page.section(
            "While training",
            "".join(_curves(measured, logs))
            + page.note(
                f"Mean over the seeds that know it; band: {spread}. On each step's own samples "
                "with the log Z of that run so far, so noisier than the tables above, and blind to "
                "what a model misses."
            ),
        ),
        page.section(
            "Samples side by side",
            page.note("Each row was drawn with the same random numbers; of the first seed.")
            + page.table(*_texts(measured), "samples"),
        ),
        f"<details><summary>sweep.yaml</summary><pre>{html.escape(measured['plan'])}</pre>"
        "</details>",
    ]


def _texts(measured: Mapping[str, Any]) -> Table:
    texts = measured["texts"]
    names = [name for name in texts if name != "prompt"]
    rows = [
        [page.prompted(prompt, texts[name][at]) for name in names]
        for at, prompt in enumerate(texts["prompt"])
    ]
    return names, rows


# ------------------------------------------------------------------------------------------------
# Plots


def _trade_offs(measured: Mapping[str, Any]) -> list[str]:
    entropy = "entropy, nats per token"
    axes = [
        (key, f"mean of {key.removeprefix(MOMENT)}", "entropy_per_token", entropy)
        for key in _moments(measured)
    ]
    axes.append(("js", "JS to the target, nats", "entropy_per_token", entropy))
    passes = _passes(measured)
    for once in (key for key in passes if key.startswith("pass@1: ")):
        often = [key for key in passes if key.endswith(once.removeprefix("pass@1"))][-1]
        axes.append((once, once, often, often))
    return [
        page.plot(
            label,
            partial(_draw_trade_off, measured=measured, key=key, across=across, y_label=y_label),
            x=label,
            size=(5.4, 3.6),
        )
        for key, label, across, y_label in axes
    ]


def _draw_trade_off(
    axes: Axes, *, measured: Mapping[str, Any], key: str, across: str, y_label: str
) -> None:
    for at, (name, runs) in enumerate(measured["runs"].items()):
        color = f"C{at}"
        for run in runs.values():
            axes.plot(number(run[key][0]), number(run[across][0]), ".", color=color, alpha=0.5)
        x, x_error = _over_seeds(measured, name, key)
        y, y_error = _over_seeds(measured, name, across)
        axes.errorbar(
            number(x),
            number(y),
            xerr=None if x_error is None else number(x_error),
            yerr=None if y_error is None else number(y_error),
            fmt="o",
            color=color,
            capsize=2,
            label=name,
        )
    base, target = measured["base"], measured["target"]
    axes.plot(number(base[key][0]), number(base[across][0]), "kx", label="base")
    if across in target:
        reached = target.get(key, [0.0])[0]  # a divergence of the target to itself is zero
        axes.plot(number(reached), number(target[across][0]), "k*", markersize=10, label="target")
    goal = measured["goals"].get(key.removeprefix(MOMENT))
    if goal is not None:
        axes.axvline(goal, color="black", linestyle="--", linewidth=1)
    axes.set_ylabel(y_label)


def _curves(
    measured: Mapping[str, Any], logs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]
) -> list[str]:
    labels = {key: key.removeprefix(MOMENT) for key in _moments(measured)}
    labels |= {key: f"{label}: divergence to the target" for key, label in FOUR.items()}
    return [
        page.plot(label, partial(_draw_curve, logs=logs, measured=measured, key=key))
        for key, label in (labels | CURVES).items()
        if any(
            math.isfinite(number(r.get(key))) for log in logs.values() for run in log for r in run
        )
    ]


def _draw_curve(
    axes: Axes,
    *,
    logs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    measured: Mapping[str, Any],
    key: str,
) -> None:
    for at, (name, of_seeds) in enumerate(logs.items()):
        steps, means, low, high = [], [], [], []
        for records in zip(*of_seeds, strict=False):
            known = [v for v in (number(record.get(key)) for record in records) if v == v]
            if not known:  # a step without an allowed sample of any seed
                continue
            mean, error = _mean(known)  # of one seed no error, and no band
            steps.append(records[0]["step"])
            means.append(mean)
            low.append(mean - error)
            high.append(mean + error)
        axes.plot(steps, means, color=f"C{at}", label=name)
        axes.fill_between(steps, low, high, color=f"C{at}", alpha=0.2, linewidth=0)
    goal = measured["goals"].get(key.removeprefix(MOMENT))
    if goal is not None:
        axes.axhline(goal, color="black", linestyle="--", linewidth=1, label="goal")
    if key == "reward_std":
        if math.isfinite(axes.dataLim.minposy):  # a logarithmic axis wants a number above zero
            axes.set_yscale("log")
    elif key in FOUR or key in ("kl_to_base", "target_ess", "length"):
        top = 1.05 * axes.dataLim.ymax  # above a length that is always the longest, too
        axes.set_ylim(0, top if top > 0 else 1)
