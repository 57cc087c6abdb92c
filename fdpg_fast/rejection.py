"""From a model to the target itself, by accepting some of its samples: quasi-rejection sampling.

QRS (Eikema, Kruszewski, Dance, Elsahar, Dymetman, arXiv 2112.05702). With a proposal q, which is a
tuned model or the base, and a number beta,

    accept x ~ q with probability min(1, P(x) / (beta q(x)))
    what is accepted has the law    p_beta(x) ∝ min(P(x), beta q(x))
    the acceptance rate is          AR = E_q min(1, P(x) / (beta q(x)))

As beta grows, p_beta goes to p and AR to zero; from beta = max P/q on, p_beta is p. Both sides of
this trade, the rate and any f-divergence between p_beta and p, are estimated from samples of q
before the first one is accepted.

Plain rejection is beta = 0: all is accepted that the target does not forbid, and the law is q
restricted to P > 0. For the base and a target of conditions, a(x) b(x), that is p itself.

P is known up to a constant only, and so is beta, which is in units of P/q: exp(4000), say, for a
reward with a small temperature. All of it is computed from log beta, which no target makes too
large.

The random numbers of proposals and of acceptances are keyed by (seed, prompt, sample), so what
comes out does not depend on batch sizes.

Legend: B samples, G prompts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fdpg_fast import metrics, ops, page
from fdpg_fast.building import sampler_of, target_of, tuned_of
from fdpg_fast.divergences import Divergence
from fdpg_fast.models import LanguageModel
from fdpg_fast.prompts import Prompts
from fdpg_fast.report import FOUR
from fdpg_fast.rollout import PromptBatch, Rollout
from fdpg_fast.run_directory import RunDirectory
from fdpg_fast.sampler import Sampler
from fdpg_fast.targets import Target

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Curve",
    "Point",
    "Rejection",
    "RejectionError",
    "Wish",
    "curve_page",
    "curve_table",
    "show_beta",
]

# Streams of random numbers (ops.random_key), far from those of training and evaluation.
LOOK, PROPOSE, ACCEPT = 2000, 2001, 2002

TV = Divergence.parse("tv")


class RejectionError(ValueError):
    """Nothing can be accepted, or beta was asked for in a way that cannot be."""


def log_acceptance(log_weight: Tensor, log_beta: float) -> Tensor:
    """``(B,)`` log min(1, P / (beta q)) from log P/q; beta = 0 takes all that has P > 0."""
    return torch.where(log_weight > -math.inf, (log_weight - log_beta).clamp(max=0.0), -math.inf)


# ------------------------------------------------------------------------------------------------
# Before: what a beta costs and gives


@dataclass(frozen=True)
class Point:
    """One beta; estimates are (value, standard error), means over the prompts.

    Attributes:
        log_beta: in units of log P/q; -inf is beta = 0.
        accept: the acceptance rate.
        divergences: name of f -> D_f(p_beta || p).
    """

    log_beta: float
    accept: tuple[float, float]
    divergences: dict[str, tuple[float, float]]


class Curve:
    """Acceptance rate and divergences to the target as functions of beta, from samples of q.

    What a larger P/q than any that was seen would change is not known of: near the largest one,
    whose log is ``top``, divergences are estimated too low.

    Args:
        rollout: x ~ q, B samples.
        log_score: ``(B,)`` fp64, log P(x).

    Attributes:
        top: the largest log P/q among them.
        ess: effective number of samples of the target among them.
        samples: B.

    Raises:
        RejectionError: a prompt has no sample that the target allows.
    """

    def __init__(self, rollout: Rollout, log_score: Tensor) -> None:
        self._rollout, self._log_score = rollout, log_score
        self._prompt = rollout.prompt_index
        self._log_weight = log_score - rollout.log_q
        self._mean = metrics.Mean(self._prompt, len(rollout.prompts))
        allowed = self._mean.of_prompts((log_score > -math.inf).double())
        if not bool((allowed > 0).all()):
            text = rollout.prompts.texts[int((allowed == 0).nonzero()[0])]
            raise RejectionError(
                f"qrs: of {len(rollout)} samples, none of prompt {text!r} is possible under the "
                "target. Way out: look at more of them (--look), or tune the model further"
            )
        self._log_z = self._log_mean(self._log_weight)
        self.top = self._log_weight.max().item()
        of_target = metrics.Mean(self._prompt, len(rollout.prompts), self._log_weight)
        self.ess = of_target.ess.sum().item()
        self.samples = len(rollout)

    def at(self, log_beta: float, which: Sequence[Divergence] = metrics.PAPER) -> Point:
        """What one beta costs and gives."""
        log_accept = log_acceptance(self._log_weight, log_beta)
        log_rate = self._log_mean(log_accept)
        excesses = [
            (log_value - log_mean[self._prompt]).exp() - 1
            for log_value, log_mean in ((self._log_weight, self._log_z), (log_accept, log_rate))
        ]

        def terms(z: float, rate: float, *, divergence: Divergence) -> Tensor:
            return ops.fdiv_terms(
                self._rollout.log_q + log_accept - log_rate[self._prompt] - rate,
                self._rollout.log_q,
                self._log_score,
                self._log_z + z,
                self._prompt,
                divergence=divergence,
            )

        estimates = [self._mean(log_accept.exp())]
        for f in which:
            of_f = partial(terms, divergence=f)
            linear = metrics.with_plug_ins(of_f, excesses, self._mean, self._prompt)
            estimates.append(self._mean(linear))
        accept, *found = torch.tensor(estimates).tolist()
        named = {str(f): (value, error) for f, (value, error) in zip(which, found, strict=True)}
        return Point(log_beta, (accept[0], accept[1]), named)

    def points(self, count: int = 12) -> list[Point]:
        """beta = 0, and then from where one in fifty is rejected to the largest P/q seen."""
        everything = self.at(-math.inf)
        low = self.for_acceptance(0.98 * everything.accept[0])
        if low >= self.top:  # they hardly differ
            return [everything, self.at(self.top)]
        step = (self.top - low) / (count - 1)
        return [everything, *[self.at(self.top - step * n) for n in reversed(range(count))]]

    def for_acceptance(self, rate: float) -> float:
        """The largest log beta with an acceptance rate of ``rate``; -inf if there is none."""
        return self._last(lambda log_beta: self.at(log_beta, which=()).accept[0] >= rate)

    def for_tv(self, distance: float) -> float:
        """The smallest log beta whose total variation to p is ``distance`` or less."""
        return self._last(lambda at: self.at(at, which=(TV,)).divergences["tv"][0] > distance)

    def _last(self, holds: Callable[[float], bool]) -> float:
        """Where what holds for small log beta stops to hold, by bisection."""
        low = self._log_weight[self._log_weight > -math.inf].min().item()
        high = self.top
        if not holds(low):
            return -math.inf
        while holds(high):  # beyond the largest weight the rate falls as 1 / beta
            low, high = high, high + 1.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (middle, high) if holds(middle) else (low, middle)
        return low

    def _log_mean(self, values: Tensor) -> Tensor:
        return metrics.log_mean_exp(values, self._prompt, len(self._rollout.prompts))


@dataclass(frozen=True)
class Wish:
    """How beta is chosen: itself (by its log), or by the acceptance rate or the total variation."""

    kind: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Wish:
        """``beta=2.5``, ``beta=exp(4000)``, ``accept=0.1`` or ``tv=0.05``.

        Raises:
            RejectionError: it is none of these, or a number out of range.
        """
        kind, _, number = text.partition("=")
        log = re.fullmatch(r"exp\((.*)\)", number)
        try:
            value = float(log[1] if log else number)
        except ValueError:
            value = math.nan
        if kind == "beta" and math.isfinite(value) and (log or value > 0):
            return cls(kind, value if log else math.log(value))
        if kind in ("accept", "tv") and not log and 0 < value <= 1:
            return cls(kind, value)
        raise RejectionError(
            "qrs: expected beta=NUMBER (above 0; or exp(LOG), where no number is so large), "
            f"accept=SHARE or tv=DISTANCE (above 0, at most 1), got {text!r}"
        )

    def log_beta(self, curve: Curve) -> float:
        """What is wished for, as the log of a beta."""
        if self.kind == "accept":
            return curve.for_acceptance(self.value)
        return curve.for_tv(self.value) if self.kind == "tv" else self.value


# ------------------------------------------------------------------------------------------------
# Drawing


class Rejection:
    """Draws from q, and accepts.

    Args:
        model: q.
        target: P.
        sampler: draws.
        prompts: what is continued.
        seed: of all random numbers.

    Attributes:
        proposals: looked at by :meth:`take` so far.
    """

    def __init__(
        self,
        model: LanguageModel,
        target: Target,
        sampler: Sampler,
        prompts: PromptBatch,
        *,
        seed: int,
    ) -> None:
        self.model, self.target, self.prompts = model, target, prompts
        self.proposals = 0
        self._sampler, self._seed = sampler, seed

    @classmethod
    def of_run(
        cls,
        run: RunDirectory,
        *,
        proposal: str = "tuned",
        prompt: str | None = None,
        count: int = 1,
        max_new_tokens: int | None = None,
        seed: int = 0,
    ) -> Rejection:
        """From the models and to the target of a run.

        Args:
            run: its folder.
            proposal: ``tuned`` or ``base``, which of its models q is.
            prompt, count, max_new_tokens, seed: as for :func:`fdpg_fast.evaluation.draw_texts`.

        Raises:
            RunDirectoryError: the run has no model yet.
            ConfigError: its target was built in Python.
        """
        run.require_model()
        config = run.config()
        target = target_of(config)
        target.load_state_dict(run.read_facts().get("lambdas", {}))
        model = base = target.base.model
        if proposal == "tuned":
            model = tuned_of(config, run.model, base)
        longest = max_new_tokens or config.sampling.max_new_tokens
        source = config.prompts.source if prompt is None else prompt
        prompts = Prompts.load(source, model, max_new_tokens=longest).some(count, seed)
        sampler = sampler_of(config, max_new_tokens=longest)
        return cls(model, target, sampler, prompts, seed=seed)

    def look(self, samples: int) -> Curve:
        """What any beta would cost and give, by ``samples`` samples of q over all prompts.

        They are not among those that :meth:`take` accepts from.

        Raises:
            RejectionError: a prompt has no sample that the target allows.
        """
        each = max(2, -(-samples // len(self.prompts)))
        rollout = self._sampler.draw(
            self.model, self.prompts, each, ops.random_key(self._seed, 0, LOOK)
        )
        return Curve(rollout, self.target.log_score(rollout))

    def law(self, log_beta: float) -> str:
        """The distribution of what is accepted, in words."""
        if self.model is self.target.base.model and self.target.is_condition:
            return "p itself: the base without what breaks a condition"
        if log_beta > -math.inf:
            beta = show_beta(log_beta)
            return f"p_beta(x) ∝ min(P(x), {beta} q(x)): p itself where beta >= max P/q"
        return "q without what the target forbids: not p"

    def take(self, log_beta: float, each: int, budget: int) -> Iterator[tuple[str, str]]:
        """Accepts ``each`` samples of every prompt, as they come; fewer where the budget ends.

        Args:
            log_beta: -inf is plain rejection.
            each: of every prompt.
            budget: most proposals for a prompt.

        Yields:
            (prompt, sample).
        """
        for g in range(len(self.prompts)):
            yield from self._take_of(g, log_beta, each, budget)

    def _take_of(
        self, g: int, log_beta: float, each: int, budget: int
    ) -> Iterator[tuple[str, str]]:
        here = slice(g, g + 1)
        prompts = self.prompts
        one = PromptBatch(prompts.ids[here], prompts.tokens[here], prompts.texts[here])
        propose, accept = (ops.random_key(self._seed, g, stream) for stream in (PROPOSE, ACCEPT))
        before, taken, proposed = self.proposals, 0, 0
        while taken < each and proposed < budget:
            # As many as are likely to do, by the rate so far.
            likely = math.ceil((each - taken) * (proposed + 1) / (taken + 1)) + 8
            count = min(likely, self._sampler.batch_size, budget - proposed)
            rollout = self._sampler.draw(self.model, one, count, propose, first_sample_id=proposed)
            log_weight = self.target.log_score(rollout) - rollout.log_q
            accepted = _toss(log_acceptance(log_weight, log_beta), rollout.sample_ids, accept)
            for row in accepted.nonzero().flatten().tolist()[: each - taken]:
                taken += 1
                self.proposals = before + proposed + row + 1
                yield one.texts[0], rollout.texts[row]
            proposed += count
            if taken < each:
                self.proposals = before + proposed


def _toss(log_probability: Tensor, sample_ids: Tensor, key: int) -> Tensor:
    """``(B,)`` bool: a coin per sample, a function of (key, sample id) alone."""
    logits = torch.stack([log_probability, (-log_probability.expm1()).log()], dim=1)
    return ops.sample_logprob(logits, key, sample_ids, torch.zeros_like(sample_ids)).token == 0


# ------------------------------------------------------------------------------------------------
# Showing

LOG_10 = math.log(10)
LABELS = {f: label.replace("π", "p_β") for f, label in FOUR.items()}


def show_beta(log_beta: float) -> str:
    """``2.5``; and ``exp(4000)``, which :meth:`Wish.parse` reads too, where no number is so large
    or so small."""
    if log_beta == -math.inf or abs(log_beta) < 700:
        return f"{math.exp(log_beta):.3g}"
    return f"exp({log_beta:.2f})"


def curve_table(points: Sequence[Point], chosen: float) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one beta each, a star at the chosen one, which is given as its log."""
    header = ["beta", "accepted, %", *LABELS.values()]
    return header, [
        [
            show_beta(point.log_beta) + (" *" if point.log_beta == chosen else ""),
            "{:.3g} ± {:.1g}".format(*[100 * share for share in point.accept]),
            *[page.show(point.divergences[f]) for f in LABELS],
        ]
        for point in points
    ]


def curve_page(title: str, law: str, curve: Curve, points: Sequence[Point], log_beta: float) -> str:
    """The HTML page of a curve, with the chosen beta marked."""
    note = page.note(
        f"From {curve.samples} samples of q, worth {curve.ess:.0f} of the target's own. ± and "
        "bands: one standard error; * the chosen one. beta = 0 accepts all that the target allows. "
        f"{show_beta(curve.top)} is the largest P/q seen, where p_beta would be p if none were "
        "larger: what a larger one would add is not known. Divergences in nats (TV: a share)."
    )
    draw = partial(partial, _draw, points=points, log_beta=log_beta)
    plots = [page.plot("acceptance rate", draw(value=_log_rate, log=True), x="beta")]
    plots += [
        page.plot(label, draw(value=lambda p, f=f: p.divergences[f]), x="beta")
        for f, label in LABELS.items()
    ]
    law = page.note(f"What is accepted has the law {law}. Dashed: beta = {show_beta(log_beta)}.")
    return page.whole(
        title,
        [
            page.section("", law),
            page.section("What a beta costs and gives", "".join(plots)),
            page.section("In numbers", page.table(*curve_table(points, log_beta)) + note),
        ],
    )


def _log_rate(point: Point) -> tuple[float, float]:
    """log10 of the acceptance rate and its standard error."""
    rate, error = point.accept
    return math.log10(rate), error / rate / LOG_10


def _draw(
    axes: Axes,
    *,
    points: Sequence[Point],
    log_beta: float,
    value: Callable[[Point], tuple[float, float]],
    log: bool = False,
) -> None:
    # The axes are logarithmic: of beta, and of the acceptance rate, which is 0 far beyond all P/q.
    shown = [point for point in points if point.log_beta > -math.inf and point.accept[0] > 0]
    # By log10 beta, as a logarithmic axis of beta itself ends at 1e308.
    at, values = [point.log_beta / LOG_10 for point in shown], [value(point) for point in shown]
    axes.plot(at, [v for v, _ in values], ".-")
    axes.fill_between(at, [v - e for v, e in values], [v + e for v, e in values], alpha=0.2)
    axes.xaxis.set_major_formatter(lambda x, _: show_beta(x * LOG_10))
    if log:
        axes.yaxis.set_major_formatter(lambda y, _: f"{100 * 10**y:.3g} %")
    else:
        axes.set_ylim(bottom=0)
    if log_beta > -math.inf:
        axes.axvline(log_beta / LOG_10, color="black", linestyle="--", linewidth=1)
