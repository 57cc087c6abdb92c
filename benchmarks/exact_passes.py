"""pass@k of a sweep of the recipe `arithmetic`, exactly: a sum has one right answer.

    python benchmarks/exact_passes.py runs/alpha docs/reproduction/alpha_exact.csv

Of k independent samples of a prompt one passes with probability 1 - (1 - pi(answer))^k. So pass@k
is known from one forward pass over the answers, for any k, and so is the divergence to the target,
which is the answer: KL(p || pi) = -log pi(answer). (An answer with zeros before it is as right, and
not counted here: too rare to show.) Prints means over seeds.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path

import torch

from fdpg_fast.config import Config
from fdpg_fast.models import LanguageModel
from fdpg_fast.sweep import Sweep

KS = (1, 4, 16, 64, 256)


def log_prob_of_answers(model: LanguageModel, prompts: list[str]) -> torch.Tensor:
    """``(G,)`` fp64: log pi of the right answer and the end of text, given each sum."""
    values = []
    for prompt in prompts:
        begin = model.encode(prompt)
        answer = str(sum(map(int, prompt.rstrip("=").split("+"))))
        ids = torch.tensor([[*model.encode(prompt + answer), model.eos_ids[0]]])
        with torch.no_grad():
            logp = model.model(ids.to(model.device)).logits[0, :-1].double().log_softmax(-1).cpu()
        values.append(logp.gather(1, ids[0, 1:, None])[len(begin) - 1 :].sum())
    return torch.stack(values)


def measure(model: LanguageModel, prompts: list[str]) -> dict[str, float]:
    log_pi = log_prob_of_answers(model, prompts)
    passes = {f"pass@{k}": (1 - (1 - log_pi.exp()) ** k).mean().item() for k in KS}
    return {**passes, "kl": -log_pi.mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sweep", type=Path, help="folder that fdpg sweep has written")
    parser.add_argument("csv", type=Path, help="where every model's numbers go")
    args = parser.parse_args()
    config = Config.read("arithmetic")
    prompts = list(config.prompts.source)
    models = {("base", ""): config.model.name}
    for name in Sweep.read_plan(args.sweep)["divergences"]:
        for run in sorted((args.sweep / name.replace("(", "-").replace(")", "")).iterdir()):
            models[name, run.name] = str(run / "model")
    found: dict[str, list[dict[str, float]]] = {}
    with args.csv.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        for (name, seed), where in models.items():
            numbers = measure(LanguageModel.load(where), prompts)
            if name == "base":
                rows.writerow(["trained_on", "seed", *numbers])
            rows.writerow([name, seed, *(f"{value:.5f}" for value in numbers.values())])
            found.setdefault(name, []).append(numbers)
    header = [*(f"pass@{k}" for k in KS), "kl"]
    print("|", " | ".join(["trained on", *header]), "|")
    print("|" + "---|" * (1 + len(header)))
    for name, of_seeds in found.items():
        cells = []
        for key in header:
            values = [numbers[key] for numbers in of_seeds]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
            cells.append(f"{statistics.mean(values):.3f}" + (f" ± {error:.3f}" if error else ""))
        print("|", " | ".join([name, *cells]), "|")


if __name__ == "__main__":
    main()
