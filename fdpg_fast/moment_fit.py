"""The lambdas of exp(lambda . phi(x)) that give features their wanted means.

Self-normalised importance sampling (SNIS) within each prompt, averaged over prompts: one lambda per
feature, whatever the prompt. The lambdas minimise the convex dual (GDC, arXiv 2012.11635)

    mean over prompts c of log Z_c(lambda)  -  lambda . goals

whose gradient is the means of the features less their goals, and whose Hessian is the features'
covariance: Newton's method with backtracking gets there in a handful of steps, from any start. When
the goals lie outside what mixtures of the samples can reach, the dual has no minimum; that is
detected by a certificate (a direction in which even the furthest samples fall short), not guessed.

A prompt's mean is a ratio of sums over its own n samples and so off by O(1/n), which more prompts
do not average out: with 16 samples of each of 256 prompts, and a feature of one in ten, lambdas
that show a mean of 0.5 have one of 0.63. So with several prompts all means are the jackknife's
(0.50 then), and the dual is minimised for goals moved by what it takes out.

Legend: B samples, G prompts, K features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FitError", "FitReport", "FittedMoment", "WeightedFeatures", "fit_moments"]


class FitError(ValueError):
    """No lambdas give the wanted moments on the samples seen."""


@dataclass(frozen=True)
class WeightedFeatures:
    """Features of B samples x ~ q, and what the samples weigh before any lambda.

    Attributes:
        features: ``(B, K)`` fp64, finite.
        log_weight: ``(B,)`` fp64, log P(x) - log q(x) without the exponential family, -inf where
            another factor of the target is zero.
        log_base_weight: ``(B,)`` fp64, log a(x) - log q(x).
        prompt: ``(B,)`` int64, 0..G-1.
    """

    features: Tensor
    log_weight: Tensor
    log_base_weight: Tensor
    prompt: Tensor


@dataclass(frozen=True)
class FittedMoment:
    """One feature of a fit.

    Attributes:
        name: of the feature.
        goal: its wanted mean.
        lambda_: its lambda.
        base: its mean under the base.
        fit: its mean under the target, on the samples fitted on.
        holdout: the same on other samples, with its standard error ``holdout_se``.
    """

    name: str
    goal: float
    lambda_: float
    base: float
    fit: float
    holdout: float
    holdout_se: float


@dataclass(frozen=True)
class FitReport:
    """How well the lambdas give the wanted moments.

    Attributes:
        moments: one per feature.
        samples: samples fitted on, and checked on.
        ess: effective sample size of the target's weights, on the samples fitted on and on those
            checked on (summed over prompts).
        prompts_skipped: prompts none of whose samples was possible under the target.
        iterations: Newton steps.
        kl_to_base: KL(p || a) of the target, on the held-out samples, in nats (mean over prompts).
        problems: what should worry; empty when the check agrees.
    """

    moments: tuple[FittedMoment, ...]
    samples: tuple[int, int]
    ess: tuple[float, float]
    prompts_skipped: int
    iterations: int
    kl_to_base: float
    problems: tuple[str, ...]

    def __str__(self) -> str:
        width = max(len("feature"), *(len(m.name) for m in self.moments))
        lines = [
            f"{'feature':<{width}}  {'goal':>8} {'lambda':>9} {'base':>8} {'fit':>8} "
            f"{'held out':>8} {'± se':>7}"
        ]
        lines += [
            f"{m.name:<{width}}  {m.goal:8.4g} {m.lambda_:9.4g} {m.base:8.4g} {m.fit:8.4g} "
            f"{m.holdout:8.4g} {m.holdout_se:7.2g}"
            for m in self.moments
        ]
        lines.append(
            f"{self.samples[0]} samples (ESS {self.ess[0]:.0f}), checked on {self.samples[1]} "
            f"(ESS {self.ess[1]:.0f}), KL(p||a) {self.kl_to_base:.3g} nats"
        )
        return "\n".join([*lines, *(f"WARNING: {problem}" for problem in self.problems)])


def fit_moments(
    fit: WeightedFeatures, holdout: WeightedFeatures, goals: Mapping[str, float]
) -> FitReport:
    """Fit on some samples, check on others.

    Args:
        fit: samples to fit on; thousands, with each feature seen at least dozens of times.
        holdout: other samples, to check on.
        goals: name and wanted mean of each of the K features.

    Raises:
        FitError: a feature was never (or always) seen, or no lambdas give these means; the message
            names the features and what was seen of them.
    """
    on_fit = _Support(fit)
    _require_seen(on_fit, goals)
    lambdas, iterations = _lambdas(on_fit, goals)

    on_holdout = _Support(holdout)
    fit_means, fit_se, fit_ess = on_fit.moments(lambdas)
    means, se, ess = on_holdout.moments(lambdas)
    base, _, _ = _Support(fit, of_base=True).moments(torch.zeros_like(lambdas))
    columns = (lambdas, base, fit_means, means, se)
    moments = tuple(
        FittedMoment(name, goal, *(column[k].item() for column in columns))
        for k, (name, goal) in enumerate(goals.items())
    )

    problems = []
    if min(fit_ess, ess) < 30:
        problems.append(
            f"the target's weights rest on few samples (ESS {fit_ess:.1f} of {len(fit.prompt)} "
            f"fitted on, {ess:.1f} of {len(holdout.prompt)} held out): the lambdas are uncertain. "
            "Way out: more samples (--target.fit_samples), or a goal nearer to the base"
        )
    for moment, its_fit_se in zip(moments, fit_se.tolist(), strict=True):
        # Both samples err: the goal was met exactly on the first, up to that sample's own error.
        error = math.hypot(moment.holdout_se, its_fit_se)
        if not abs(moment.holdout - moment.goal) <= 4 * error + 1e-12:
            problems.append(
                f"{moment.name} is {moment.holdout:.4g} ± {moment.holdout_se:.2g} on the held-out "
                f"samples, not {moment.goal:g}. Way out: fit on more (--target.fit_samples)"
            )
    return FitReport(
        moments=moments,
        samples=(len(fit.prompt), len(holdout.prompt)),
        ess=(fit_ess, ess),
        prompts_skipped=on_fit.prompts_skipped,
        iterations=iterations,
        kl_to_base=on_holdout.kl_to_base(lambdas),
        problems=tuple(problems),
    )


class _Support:
    """The samples of weight above zero, with the prompts that have one renumbered 0..G-1."""

    def __init__(self, samples: WeightedFeatures, of_base: bool = False) -> None:
        log_weight = samples.log_base_weight if of_base else samples.log_weight
        rows = log_weight > -math.inf
        drawn = torch.bincount(samples.prompt)  # samples of each prompt, impossible ones included
        kept, self.prompt = torch.unique(samples.prompt[rows], return_inverse=True)
        self.total = len(rows)
        self.drawn = drawn[kept].double()  # (G,)
        self.prompts = len(kept)
        self.prompts_skipped = int((drawn > 0).sum()) - self.prompts
        self.features = samples.features[rows]
        self.log_weight = log_weight[rows]
        self.log_base_weight = samples.log_base_weight[rows]

    @property
    def scale(self) -> Tensor:
        """``(K,)``: each feature's spread."""
        return self.features.std(dim=0, correction=0)

    def log_sum(self, log_weight: Tensor) -> Tensor:
        """``(G,)``: log of the sum of the weights of each prompt."""
        top = torch.full((self.prompts,), -math.inf, dtype=torch.float64)
        top = top.scatter_reduce(0, self.prompt, log_weight, "amax")
        return top + self.sum((log_weight - top[self.prompt]).exp()).log()

    def sum(self, values: Tensor) -> Tensor:
        """``(G, ...)``: the sum over the samples of each prompt."""
        return values.new_zeros(self.prompts, *values.shape[1:]).index_add(0, self.prompt, values)

    def weights(self, log_weight: Tensor) -> Tensor:
        """``(B,)``: weights that add up to 1 within each prompt."""
        return (log_weight - self.log_sum(log_weight)[self.prompt]).exp()

    def moments(self, lambdas: Tensor) -> tuple[Tensor, Tensor, float]:
        """Means ``(K,)`` under p, their standard errors, and the effective sample size.

        Of several prompts the jackknife's: n m - (n - 1) (mean of the n means m without a sample).
        Without one of weight w, its prompt's m is less by w (phi - m) / (1 - w).
        The error is the delta method's for a ratio of means; prompts are given.
        """
        if self.prompts == 0:
            nothing = torch.full_like(lambdas, math.nan)
            return nothing, nothing, 0.0
        weight = self.weights(self.log_weight + self.features @ lambdas)
        means = self.sum(weight[:, None] * self.features)
        pull = weight[:, None] * (self.features - means[self.prompt])
        if self.prompts > 1:  # the bias of one prompt is far below its error
            # Who has all the weight of its prompt cannot be left out.
            moved = torch.where(weight < 1, 1 / (1 - weight), 0.0)[:, None] * pull
            means = means + (1 - 1 / self.drawn)[:, None] * self.sum(moved)
        ess = (1 / self.sum(weight.square())).sum().item()
        return means.mean(0), pull.square().sum(0).sqrt() / self.prompts, ess

    def kl_to_base(self, lambdas: Tensor) -> float:
        """KL(p || a) = E_p[log P/a] - log Z, mean over prompts."""
        if self.prompts == 0:
            return math.nan
        log_weight = self.log_weight + self.features @ lambdas  # log P/q
        log_z = self.log_sum(log_weight) - self.drawn.log()
        excess = self.sum(self.weights(log_weight) * (log_weight - self.log_base_weight))
        return float((excess - log_z).mean())


_WAY_OUT = (
    "Way out: more samples to fit on (--target.fit_samples), prompts that make it likelier, or a "
    "goal that the base can show"
)


def _require_seen(s: _Support, goals: Mapping[str, float]) -> None:
    """Every feature varies on the support, and its goal lies strictly within what was seen."""
    if s.prompts == 0:
        raise FitError(
            f"fit: the target's other factors allow none of {s.total} samples of the base. "
            f"{_WAY_OUT}"
        )
    seen = len(s.prompt)
    where = f"{s.total} samples of the base"
    if s.prompts > 1:
        where += f" ({s.total / (s.prompts + s.prompts_skipped):.3g} of each prompt)"
    if seen < s.total:
        where = f"the {seen} of {where} that the target's other factors allow"
    for k, (name, goal) in enumerate(goals.items()):
        low, high = s.features[:, k].min().item(), s.features[:, k].max().item()
        if low == high:
            always = {0.0: "never seen (always 0)", 1.0: "always seen (always 1)"}
            raise FitError(
                f"fit: {name} was {always.get(low, f'always {low:g}')} in {where}. {_WAY_OUT}"
            )
        if not low < goal < high:
            mean = s.features[:, k].mean()
            raise FitError(
                f"fit: {name} cannot have the mean {goal:g}: in {where} it went from {low:g} to "
                f"{high:g}, with mean {mean:.4g}. {_WAY_OUT}"
            )


def _lambdas(s: _Support, goals: Mapping[str, float]) -> tuple[Tensor, int]:
    """The lambdas ``(K,)`` that give the goals by ``moments``, and the number of Newton steps.

    Raises:
        FitError: no lambdas give these means.
    """
    goal = torch.tensor(list(goals.values()), dtype=torch.float64)
    lambdas, iterations = _newton(s, goals, goal)
    aim = goal
    for _ in range(100):
        short = goal - s.moments(lambdas)[0]
        if bool((short.abs() <= 1e-9 * s.scale).all()):
            break
        aim = aim + short
        lambdas, more = _newton(s, goals, aim, lambdas)
        iterations += more
    return lambdas, iterations


def _newton(
    s: _Support, goals: Mapping[str, float], goal: Tensor, start: Tensor | None = None
) -> tuple[Tensor, int]:
    """The lambdas ``(K,)`` whose plain means are ``goal``, and the number of steps.

    Raises:
        FitError: the dual has no minimum.
    """
    # In units of each feature's spread, around its goal: well conditioned, and the goal is zero.
    scale = s.scale
    phi = (s.features - goal) / scale
    identity = torch.eye(len(goal), dtype=torch.float64)
    log_z0 = s.log_sum(s.log_weight)

    def dual(lambdas: Tensor) -> float:
        return float((s.log_sum(s.log_weight + phi @ lambdas) - log_z0).mean())

    lambdas = torch.zeros_like(goal) if start is None else start * scale
    value = dual(lambdas)
    for iteration in range(200):
        weight = s.weights(s.log_weight + phi @ lambdas)
        means = s.sum(weight[:, None] * phi)  # (G, K)
        gradient = means.mean(0)
        if gradient.abs().max() <= 1e-9:
            return lambdas / scale, iteration
        centred = phi - means[s.prompt]
        hessian = (weight[:, None] * centred).T @ centred / s.prompts
        # Features that say the same twice leave it singular; the ridge is far below what matters.
        ridge = 1e-10 * hessian.trace() + 1e-14
        step = -torch.linalg.solve(hessian + ridge * identity, gradient)
        # Where all weight sits on one sample the Hessian vanishes and the step explodes.
        step = step * min(1.0, 20.0 / float((phi @ step).abs().max()))
        slope, size = float(gradient @ step), 1.0
        # Backtrack (Armijo), but not over promised gains below the rounding error of the sums.
        while slope < -1e-10 and dual(lambdas + size * step) > value + 1e-4 * size * slope:
            size /= 2
        lambdas = lambdas + size * step
        value = dual(lambdas)
        # The certificate: if even the samples that go furthest along lambda fall short of the goals
        # (which are at 0), no mixture of samples reaches them, and the dual falls for ever.
        furthest = torch.full((s.prompts,), -math.inf, dtype=torch.float64)
        if furthest.scatter_reduce(0, s.prompt, phi @ lambdas, "amax").mean() <= 0:
            break
    raise FitError(_unreachable(s, goals, lambdas))


def _unreachable(s: _Support, goals: Mapping[str, float], lambdas: Tensor) -> str:
    share = lambdas.abs() / lambdas.abs().max()
    involved: Sequence[str] = [
        f"{name} = {goal:g} (seen {column.min():g} to {column.max():g}, mean {column.mean():.4g})"
        for name, goal, column, part in zip(
            goals, goals.values(), s.features.unbind(1), share.tolist(), strict=True
        )
        if part > 0.05
    ]
    return (
        f"fit: no lambdas give {'; '.join(involved)}{' at once' if len(involved) > 1 else ''}: no "
        f"mixture of the {len(s.prompt)} samples seen has these means. Way out: goals nearer to "
        "the base's means, features that do not exclude each other, or more samples "
        "(--target.fit_samples)"
    )
