"""How fast a constraint is learnt, per step: each divergence, and a plain PyTorch loop with js.

    python benchmarks/learning_curve.py --seeds 0 1 2        # measures what results/ does not have
    python benchmarks/learning_curve.py --table              # Markdown of what it has

Target, model, batch and learning rate are those of bench_step.py: a(x) [x contains "dog"], 256
samples of 40 tokens a step. Row n of a curve is the batch drawn after n updates: the share of its
256 samples that satisfy the constraint (one standard error: 3 points), and mean log pi - log a, the
estimate of KL(pi || a). Contenders draw samples of their own: compare means over seeds.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from step_peers import PlainLoop, StepShape

from fdpg_fast.config import Config
from fdpg_fast.progress import SilentDisplay
from fdpg_fast.trainer import Trainer

RESULTS = Path(__file__).parent / "results" / "learning_curve.csv"
COLUMNS = ("model", "learning_rate", "contender", "seed", "updates", "share", "kl_to_base")
SHOWN = (0, 5, 10, 20, 40)  # updates

PLAIN = "plain loop, js"
DIVERGENCES = ("js", "kl", "tv", "alpha(0.5)")


def ours(model: Path, divergence: str, learning_rate: float, seed: int, updates: int) -> Iterator:
    config = Config.read("dog", ["--model.name", str(model), "--objective.divergence", divergence])
    config = config.replace(
        steps=updates + 1, seed=seed, learning_rate=learning_rate, evaluation_samples=0
    )
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer.from_config(config, out=out, display=SilentDisplay())
        trainer.train()
        for record in trainer.run.read("metrics.jsonl"):
            yield record["moment: contains 'dog'"], record["kl_to_base"]


def plain(model: Path, learning_rate: float, seed: int, updates: int) -> Iterator:
    torch.manual_seed(seed)
    loop = PlainLoop(str(model), StepShape(learning_rate=learning_rate))
    for _ in range(updates + 1):
        loop.step()
        yield loop.satisfied, loop.kl_to_base


def measured() -> list[dict[str, str]]:
    with RESULTS.open() as file:
        return list(csv.DictReader(file))


def measure(args: argparse.Namespace) -> None:
    if not RESULTS.exists():
        RESULTS.write_text(",".join(COLUMNS) + "\n")
    have = {(r["model"], r["learning_rate"], r["contender"], int(r["seed"])) for r in measured()}
    for seed in args.seeds:
        for contender in args.contenders:
            key = (args.model.name, f"{args.learning_rate:g}", contender, seed)
            if key in have:
                continue
            curve = list(
                plain(args.model, args.learning_rate, seed, args.updates)
                if contender == PLAIN
                else ours(args.model, contender, args.learning_rate, seed, args.updates)
            )
            with RESULTS.open("a", newline="") as file:
                rows = csv.writer(file, lineterminator="\n")
                for n, (share, kl) in enumerate(curve):
                    rows.writerow([*key, n, f"{share:.4f}", f"{kl:.3f}"])
            print(contender, seed, *(f"{100 * curve[n][0]:.0f} %" for n in SHOWN), flush=True)


def mean(values: list[float], digits: int) -> str:
    """``58 ± 3``: the mean over seeds and its standard error."""
    centre = f"{statistics.mean(values):.{digits}f}"
    if len(values) < 2:
        return centre
    return f"{centre} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


def table() -> None:
    curves: dict[tuple[str, ...], dict[int, list[tuple[float, float]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in measured():
        key = (row["model"], row["learning_rate"], row["contender"])
        curves[key][int(row["updates"])].append((float(row["share"]), float(row["kl_to_base"])))
    header = ["model", "rate", "contender", "seeds", *(f"% after {n}" for n in SHOWN), "KL"]
    print("|", " | ".join(header), "|")
    print("|" + "---|" * len(header))
    for key, curve in sorted(curves.items()):
        shares = [mean([100 * share for share, _ in curve[n]], 0) for n in SHOWN]
        kl = mean([kl for _, kl in curve[SHOWN[-1]]], 1)
        print("|", " | ".join([*key, str(len(curve[0])), *shares, kl]), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shared = Path(__file__).parents[2] / "shared" / "models"
    parser.add_argument("--model", type=Path, default=shared / "tinystories-instruct-3M-chat-gpt2")
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--contenders", nargs="+", default=[*DIVERGENCES, PLAIN])
    parser.add_argument("--updates", type=int, default=SHOWN[-1])
    parser.add_argument("--table", action="store_true", help="print what was measured, and stop")
    args = parser.parse_args()
    if not args.table:
        measure(args)
    table()


if __name__ == "__main__":
    main()
