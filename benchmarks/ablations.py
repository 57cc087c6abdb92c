"""What each choice of f-DPG is worth, one at a time, against numbers that are exact.

    python benchmarks/ablations.py --seeds 0 1 2        # measures what results/ does not have
    python benchmarks/ablations.py --table              # Markdown of what it has

The embedded arithmetic model answers 8 sums with at most 3 tokens, so all 2,380 answers of a sum
can be written out: every divergence, entropy and Z below is a sum over all of them, and no
estimate. The target is a(x|c) exp(v(x, c) / 0.25), where v says whether the answer is right; it is
nowhere zero, so that every divergence can be minimised. Unless an ablation says otherwise: 16
samples of each sum a step, baseline loo, Z running, AdamW at a constant 3e-4.

baseline        each baseline with each divergence
log_z           Z exact, of each batch, exact times 3 and divided by 3
batch           4 and 64 samples of each sum a step
well-specified  the target is a model of the same family: what js made of the base in 200 steps

Two files of results: `ablations.csv` has what training leads to; `ablations_gradient.csv` compares
the gradient estimate of one batch (its mean squared error over the square of the exact gradient,
mean of 100 batches) and what a wrong Z makes of the exact gradient, at the base and at a half-tuned
policy.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fdpg_fast as fdpg
from fdpg_fast import ops, reference
from fdpg_fast.baselines import Baseline
from fdpg_fast.divergences import Divergence
from fdpg_fast.metrics import PAPER
from fdpg_fast.models import LanguageModel
from fdpg_fast.progress import SilentDisplay
from fdpg_fast.prompts import Prompts
from fdpg_fast.rollout import Finish, Rollout
from fdpg_fast.targets import Target
from fdpg_fast.trainer import Trainer

RESULTS = Path(__file__).parent / "results"
SUMS = ["7+9=", "15+6=", "23+4=", "8+84=", "48+25=", "36+47=", "61+29=", "52+13="]
LONGEST, BETA, STEPS, LONG, EVERY, RATE = 3, 0.25, 60, 200, 20, 3e-4
BASELINES = ("none", "mean", "loo", "ema(0.99)")
EXACT = ("kl", "reverse_kl", "tv", "js", "entropy", "right")
BATCHES, HALF_TUNED = 100, 20

RUNS = ("ablation", "divergence", "setting", "seed", "updates", *EXACT)
GRADIENTS = ("at", "divergence", "setting", "measure", "value")


class Everything:
    """All answers to all sums, and what is exact of them.

    Shape legend: C prompts, X answers of each, in the order of ``rollout``: C X rows.
    """

    def __init__(self, model: LanguageModel) -> None:
        end = model.eos_ids[0]
        tokens = [token for token in range(model.vocab_size) if token != end]
        self.beginnings = list(itertools.product(tokens, repeat=LONGEST - 1))
        answers = [
            x
            for n in range(1, LONGEST + 1)
            for x in itertools.product(range(model.vocab_size), repeat=n)
            if end not in x[:-1] and (x[-1] == end or n == LONGEST)
        ]
        self.prompts = Prompts.load(SUMS, model).all()
        self.count = len(answers)
        # Where `log_prob` finds each token of an answer; last of all is a zero, for what would come
        # after the end.
        row = {b[:n]: i for i, b in enumerate(self.beginnings) for n in range(LONGEST)}
        self._at = torch.tensor(
            [
                [(row[x[:n]] * LONGEST + n) * model.vocab_size + x[n] for n in range(len(x))]
                + [-1] * (LONGEST - len(x))
                for x in answers
            ]
        )
        self.rollout = self._rollout(model, answers)

    def log_prob(self, model: LanguageModel) -> Tensor:
        """``(C, X)`` fp64, from one pass over all beginnings of each sum."""
        rows = []
        for prompt in self.prompts.tokens:
            ids = torch.tensor([[*prompt, *beginning] for beginning in self.beginnings])
            with torch.no_grad():
                logits: Tensor = model.model(ids.to(model.device), use_cache=False).logits
            after = logits[:, len(prompt) - 1 :].double().log_softmax(-1).flatten()
            rows.append(torch.cat([after, after.new_zeros(1)])[self._at].sum(-1))
        return torch.stack(rows).cpu()

    def measure(self, model: LanguageModel, log_score: Tensor, right: Tensor) -> dict[str, float]:
        """The paper's divergences, entropy in nats and the share that is right; mean over c."""
        log_pi = self.log_prob(model)
        pi = log_pi.exp()
        log_p = log_score - log_score.logsumexp(-1, keepdim=True)
        exact = {}
        for f in PAPER:
            values = reference.FORMULAS[f.name].f(torch, (log_pi - log_p).exp(), f.param)
            exact[f.name] = (log_p.exp() * values).sum(-1).mean().item()
        exact["entropy"] = -(pi * log_pi).sum(-1).mean().item()
        exact["right"] = (pi * right).sum(-1).mean().item()
        return exact

    def gradient(
        self, model: LanguageModel, log_score: Tensor, log_z: Tensor, divergence: Divergence
    ) -> Tensor:
        """Of mean_c D_f, exactly if log Z is: by samples that are all there is, weighed by pi."""
        weights, _ = ops.fdiv_weights(
            self.log_prob(model).flatten(),
            torch.full((len(self.rollout),), -math.log(self.count), dtype=torch.float64),
            log_score.flatten(),
            log_z,
            self.rollout.prompt_index,
            divergence=divergence,
            baseline=Baseline.parse("none"),
        )
        return gradient_of(model, self.rollout, weights)

    def _rollout(self, model: LanguageModel, answers: Sequence[tuple[int, ...]]) -> Rollout:
        prompts = self.prompts
        rows, lengths, prompt_lengths = [], [], []
        width = max(map(len, prompts.tokens)) + LONGEST
        for prompt in prompts.tokens:
            for x in answers:
                row = [*prompt, *x]
                rows.append(row + [0] * (width - len(row)))
                lengths.append(len(x))
                prompt_lengths.append(len(prompt))
        total = len(rows)
        return Rollout(
            tokens=torch.tensor(rows),
            prompt_lengths=torch.tensor(prompt_lengths),
            lengths=torch.tensor(lengths),
            prompt_index=torch.arange(len(prompts)).repeat_interleave(len(answers)),
            sample_ids=torch.arange(total),
            token_logprob=torch.zeros(total, LONGEST),
            lse=torch.zeros(total, LONGEST),
            log_q=torch.zeros(total, dtype=torch.float64),
            finish=torch.full((total,), Finish.EOS, dtype=torch.int8),
            prompts=prompts,
            texts=tuple(model.decode(list(answers))) * len(prompts),
        )


def gradient_of(model: LanguageModel, rollout: Rollout, weights: Tensor) -> Tensor:
    """All parameters' as one vector, fp64."""
    model.accumulate_gradient(rollout, weights, denominator=len(rollout))
    parameters = model.named_parameters().values()
    flat = torch.cat([p.grad.flatten().double() for p in parameters if p.grad is not None])
    for p in parameters:
        p.grad = None
    return flat


# ------------------------------------------------------------------------------------------------
# Training


@dataclasses.dataclass(frozen=True)
class Problem:
    """A target, and what is exact of it."""

    target: Target
    everything: Everything
    log_score: Tensor  # (C, X) fp64
    right: Tensor  # (C, X) fp64, 0 or 1

    @property
    def log_z(self) -> Tensor:
        return self.log_score.logsumexp(-1)


def correct_answers(base: Any, everything: Everything) -> Problem:
    target = base.reward(fdpg.equation("+"), beta=BETA)
    scores = target.score(everything.rollout)
    table = scores.log_score.view(-1, everything.count)
    right = scores.features["equation"].view(-1, everything.count)
    a = everything.log_prob(base.model)
    torch.testing.assert_close(a.logsumexp(-1), torch.zeros(len(a)).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(a.flatten(), scores.log_base, rtol=0, atol=1e-4)
    return Problem(target, everything, table, right)


def a_model(base: Any, problem: Problem) -> Problem:
    """The target that is a tuned model itself."""
    trainer = trainer_of(problem, "js", 1000, steps=LONG, samples_per_prompt=32)
    for _ in range(LONG):
        trainer.step()
    tuned = trainer.policy.frozen_copy()

    def tuned_model(rollout: Rollout) -> Tensor:
        return tuned.sequence_logprob(rollout)

    target = base.custom(tuned_model, can_be_zero=False)
    log_score = problem.everything.log_prob(tuned)
    return Problem(target, problem.everything, log_score, problem.right)


def trainer_of(problem: Problem, divergence: str, seed: int, **settings: Any) -> Trainer:
    standard: dict[str, Any] = {
        "prompts_per_step": len(SUMS),
        "max_new_tokens": LONGEST,
        "samples_per_prompt": 16,
        "learning_rate": RATE,
        "steps": STEPS,
        "seed": seed,
        "evaluation_samples": 0,
        "log_every": STEPS,
        "table_every": 0,
    }
    return Trainer(
        problem.target,
        divergence=divergence,
        prompts=SUMS,
        display=SilentDisplay(),
        **standard | settings,
    )


def hold_log_z(trainer: Trainer, log_z: Tensor) -> None:
    """The trainer takes this log Z ``(C,)`` for granted (``log_z: frozen``)."""
    trainer.prepare()
    state = torch.stack([log_z, 2 * log_z, torch.zeros_like(log_z)], dim=1)
    state[:, 2] = 1  # one sample, of weight Z
    trainer.partition.load_state_dict(
        {"log_partition": state, "frozen_prompts": torch.arange(len(log_z))}
    )


def curve(problem: Problem, trainer: Trainer, steps: int) -> Iterator[tuple[int, dict[str, float]]]:
    for updates in range(steps + 1):
        if updates % EVERY == 0:
            yield (
                updates,
                problem.everything.measure(trainer.policy, problem.log_score, problem.right),
            )
        trainer.step()


def baseline(problem: Problem, setting: str, divergence: str, seed: int) -> Trainer:
    return trainer_of(problem, divergence, seed, baseline=setting)


def log_z(problem: Problem, setting: str, divergence: str, seed: int) -> Trainer:
    if setting == "batch":
        return trainer_of(problem, divergence, seed, log_z=setting)
    trainer = trainer_of(problem, divergence, seed, log_z="frozen", log_z_samples=2)
    hold_log_z(trainer, problem.log_z + math.log({"exact": 1, "x 3": 3, "/ 3": 1 / 3}[setting]))
    return trainer


def batch(problem: Problem, setting: str, divergence: str, seed: int) -> Trainer:
    return trainer_of(problem, divergence, seed, samples_per_prompt=int(setting))


def well_specified(problem: Problem, setting: str, divergence: str, seed: int) -> Trainer:
    return trainer_of(problem, divergence, seed, samples_per_prompt=32, steps=LONG)


# name -> how its trainer is made, its settings, steps
ABLATIONS: dict[str, tuple[Callable[..., Trainer], tuple[str, ...], int]] = {
    "baseline": (baseline, (*BASELINES, "analytic"), STEPS),
    "log_z": (log_z, ("exact", "batch", "x 3", "/ 3"), STEPS),
    "batch": (batch, ("4", "64"), STEPS),
    "well-specified": (well_specified, ("32 samples",), LONG),
}


def measure(args: argparse.Namespace) -> None:
    base = fdpg.load("embedded:arithmetic", device="cpu")
    problem = correct_answers(base, Everything(base.model))
    known = {tuple(row[key] for key in RUNS[:4]) for row in read("ablations.csv")}
    of_a_model = None
    for seed, (name, (make, settings, steps)) in itertools.product(args.seeds, ABLATIONS.items()):
        for setting, f in itertools.product(settings, PAPER):
            key = (name, str(f), setting, str(seed))
            if key in known or (setting == "analytic" and f.name != "kl"):
                continue
            wanted = problem
            if name == "well-specified":
                wanted = of_a_model = of_a_model or a_model(base, problem)
            rows = [
                [*key, updates, *(f"{exact[column]:.5f}" for column in EXACT)]
                for updates, exact in curve(wanted, make(wanted, setting, str(f), seed), steps)
            ]
            append("ablations.csv", RUNS, rows)
            print(*key, *rows[-1][5:], flush=True)


# ------------------------------------------------------------------------------------------------
# Gradients


def measure_gradients() -> None:
    """At the base, and where js has been for a while: what an estimate is off by."""
    if read("ablations_gradient.csv"):
        return
    base = fdpg.load("embedded:arithmetic", device="cpu")
    problem = correct_answers(base, Everything(base.model))
    trainer = trainer_of(problem, "js", 2000)
    policies = {"the base": trainer.policy.trainable_copy()}
    for _ in range(HALF_TUNED):
        trainer.step()
    policies["a half-tuned policy"] = trainer.policy
    for at, policy in policies.items():
        exact = {
            f: problem.everything.gradient(policy, problem.log_score, problem.log_z, f)
            for f in PAPER
        }
        rows = [*wrong_z(problem, policy, exact), *errors(problem, policy, exact, trainer)]
        append("ablations_gradient.csv", GRADIENTS, [[at, *row] for row in rows])


def wrong_z(
    problem: Problem, policy: LanguageModel, exact: dict[Divergence, Tensor]
) -> Iterator[list[str]]:
    """Direction and length of the exact gradient with a wrong Z, against those with the right Z."""
    for f, right in exact.items():
        for setting, factor in (("Z x 3", 3), ("Z / 3", 1 / 3)):
            shifted = problem.log_z + math.log(factor)
            wrong = problem.everything.gradient(policy, problem.log_score, shifted, f)
            cosine = torch.cosine_similarity(wrong, right, dim=0).item()
            yield [str(f), setting, "cosine", f"{cosine:.4f}"]
            yield [str(f), setting, "length", f"{(wrong.norm() / right.norm()).item():.4f}"]


def errors(
    problem: Problem, policy: LanguageModel, exact: dict[Divergence, Tensor], trainer: Trainer
) -> Iterator[list[str]]:
    """E |estimate - exact|^2 / |exact|^2 of the gradient of one batch, Z exact; mean of batches."""
    cells = [
        (f, Baseline.parse(name))
        for f in PAPER
        for name in (*BASELINES, *(["analytic"] if f.name == "kl" else []))
    ]
    states = [one.new_state() for _, one in cells]
    found = defaultdict(list)
    for number in range(-20, BATCHES):  # before 0 only the moving average learns
        key = ops.random_key(1, number + 20, 5)
        rollout = trainer.sampler.draw(policy, problem.everything.prompts, 16, key)
        log_score = problem.target.log_score(rollout)
        for (f, one), state in zip(cells, states, strict=True):
            weights, _ = ops.fdiv_weights(
                rollout.log_q,
                rollout.log_q,
                log_score,
                problem.log_z,
                rollout.prompt_index,
                divergence=f,
                baseline=one,
                baseline_state=state,
            )
            if number >= 0:
                off = gradient_of(policy, rollout, weights) - exact[f]
                found[f, one].append((off.square().sum() / exact[f].square().sum()).item())
    for (f, one), values in found.items():
        yield [str(f), str(one), "squared error", f"{statistics.mean(values):.4f}"]
        error = statistics.stdev(values) / math.sqrt(len(values))
        yield [str(f), str(one), "standard error of that", f"{error:.4f}"]


# ------------------------------------------------------------------------------------------------
# Files and tables


def read(name: str) -> list[dict[str, str]]:
    path = RESULTS / name
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def append(name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    path = RESULTS / name
    new = not path.exists()
    with path.open("a", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerows(([columns] if new else []) + list(rows))


def mean(values: Sequence[float]) -> str:
    """``0.58 ± 0.03``: the mean over seeds and its standard error."""
    centre = f"{statistics.mean(values):.3f}"
    if len(values) < 2:
        return centre
    return f"{centre} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"


def table() -> None:
    """Each ablation: what was minimised and how (rows), the exact divergences in the end."""
    cells: dict[tuple[str, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    rows = read("ablations.csv")
    for row in rows:
        if int(row["updates"]) in (EVERY, STEPS, LONG):
            key = tuple(row[k] for k in ("ablation", "divergence", "setting", "updates"))
            for measure in EXACT:
                cells[key][measure].append(float(row[measure]))
    header = ["ablation", "trained on", "setting", "updates", "seeds", *EXACT]
    print("|", " | ".join(header), "|")
    print("|" + "---|" * len(header))
    for key, measures in cells.items():
        seeds = str(len(measures["kl"]))
        print("|", " | ".join([*key, seeds, *(mean(measures[m]) for m in EXACT)]), "|")
    print()
    print("|", " | ".join(GRADIENTS), "|")
    print("|" + "---|" * len(GRADIENTS))
    for row in read("ablations_gradient.csv"):
        print("|", " | ".join(row[key] for key in GRADIENTS), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print what was measured, and stop")
    args = parser.parse_args()
    if not args.table:
        measure_gradients()
        measure(args)
    table()


if __name__ == "__main__":
    main()
