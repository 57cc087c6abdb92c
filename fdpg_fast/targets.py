"""Targets: the unnormalised distribution P(x) that is wanted, over a frozen base model a(x).

The algebra reads like the papers::

    base.constrain({b: 1.0})           a(x) b(x)                 every sample satisfies b
    base.constrain({phi: 0.5})         a(x) exp(lambda phi(x))   half of them have the feature
    base.reward(r, beta=0.1)           a(x) exp(r(x) / beta)     what RL with a KL penalty aims at
    base * scorer                      a(x) s(x)                 any scorer that is never negative
    base.custom(fn)                    exp(fn(rollout))          anything that can be computed
    target.smooth(1e-6)                b(x) -> max(b(x), 1e-6)   nothing is impossible any more

and everything composes: ``base.constrain({b: 1.0, phi: 0.5}) * s``, ``target * target``. The
factors of a product share one base, so log a(x) is computed once, and a scorer that occurs twice is
called once.

Distributional constraints (GDC, arXiv 2012.11635, Theorem 1): of all distributions whose means of
phi are the wanted ones, a(x) exp(lambda . phi(x)) is the one nearest to a in KL(p || a). The
lambdas are fitted by :meth:`Target.fit`, on samples of the base, for the target as a whole: with
pointwise factors and rewards besides, the moments hold under the product.

Legend: B samples, G prompts, K features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fdpg_fast.config import plain
from fdpg_fast.moment_fit import FitError, FitReport, WeightedFeatures, fit_moments
from fdpg_fast.rollout import Rollout
from fdpg_fast.scorers import Scorer, function, load_function, nearest, shorten
from fdpg_fast.scorers import from_spec as scorer_from_spec

__all__ = [
    "Base",
    "FitError",
    "FitReport",
    "Scores",
    "Target",
    "TargetError",
    "from_spec",
]


class TargetError(ValueError):
    """A target that cannot be built or evaluated."""


class Model(Protocol):
    """What a target needs of a language model (``models.LanguageModel`` is one)."""

    def sequence_logprob(self, rollout: Rollout) -> Tensor:
        """``(B,)`` fp64: log a(x | prompt)."""


@dataclass(frozen=True)
class Scores:
    """What a target says of a rollout.

    Attributes:
        log_base: ``(B,)`` fp64, log a(x).
        log_score: ``(B,)`` fp64, log P(x), -inf off the support.
        features: name -> ``(B,)`` fp64, the value of every scorer of the target.
    """

    log_base: Tensor
    log_score: Tensor
    features: dict[str, Tensor]


@dataclass(frozen=True)
class Factor:
    """What multiplies a(x), besides the exponential family of the moments.

    Attributes:
        text: how it reads in a description of the target.
        scorers: what it is a function of.
        log_value: ``(rollout, value of each scorer) -> (B,)`` fp64 on the CPU, -inf where zero.
        can_be_zero: whether it can be.
    """

    text: str
    scorers: tuple[Scorer, ...]
    log_value: Callable[[Rollout, Mapping[Scorer, Tensor]], Tensor]
    can_be_zero: bool


@dataclass(frozen=True)
class LogScore:
    """A user's own log P(x), in place of log a(x). See :meth:`Base.custom`."""

    fn: Callable[[Rollout], Tensor]
    name: str
    can_be_zero: bool

    def __call__(self, rollout: Rollout) -> Tensor:
        try:
            value = self.fn(rollout)
        except Exception as error:
            raise TargetError(
                f"{self.name}: raised {type(error).__name__}: {error}. It is given a Rollout, "
                "whose `texts` are the samples; for a function of texts, base.reward(fn, beta=1.0)"
            ) from error
        if not isinstance(value, Tensor) or value.shape != (len(rollout),):
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TargetError(
                f"{self.name}: expected a tensor of shape [{len(rollout)}], got {got}"
            )
        value = value.detach().double()
        # The only question a target asks the device: what a user's function computes there can be
        # wrong in ways that show only steps later, as a broken log Z.
        wrong = value.isnan() | (value == math.inf)
        if not self.can_be_zero:
            wrong |= value == -math.inf
        if wrong.any():
            index = int(wrong.nonzero()[0])
            hint = "" if self.can_be_zero else ", as can_be_zero=False promises"
            raise TargetError(
                f"{self.name}: expected a finite log score{hint}, got {value[index].item()} for "
                f"sample {index}, {shorten(rollout.texts[index])}"
            )
        return value


class Target:
    """P(x) = a(x) times factors times exp(lambda . phi(x)). Built from a :class:`Base`.

    Immutable but for the lambdas, which :meth:`fit` or :meth:`load_state_dict` sets.

    Attributes:
        base: the frozen model a(x), itself a target.
        factors: what multiplies a(x) besides the exponential family.
        goals: feature -> wanted moment, of the exponential family.
        lambdas: feature name -> lambda; empty until fitted.
        fitted_prompts: token ids of the prompts whose samples they were fitted on, if by this
            object.
    """

    base: Base

    def __init__(
        self,
        base: Base | None,
        factors: tuple[Factor, ...] = (),
        goals: Mapping[Scorer, float] | None = None,
        conditions: Mapping[Scorer, float] | None = None,
        log_score: LogScore | None = None,
    ) -> None:
        if base is not None:
            self.base = base
        self.factors = factors
        self.goals = dict(goals or {})
        self.lambdas: dict[str, float] = {}
        self.fitted_prompts: frozenset[tuple[int, ...]] | None = None
        self._conditions = dict(conditions or {})  # scorer -> 1 (always) or 0 (never)
        self._log_score = log_score
        self._scorers = self._distinct_scorers()

    # -- the algebra -----------------------------------------------------------------------------

    def constrain(self, moments: Mapping[Scorer, float]) -> Target:
        """The nearest distribution whose features have these means.

        A boolean scorer with mean 1 (or 0) is a condition: a factor b(x), exact without any fit.
        Every other mean needs lambdas: call :meth:`fit` (the trainer does).

        Args:
            moments: scorer -> its mean under the target.

        Raises:
            TargetError: a mean that no distribution can have, or a feature constrained twice.
        """
        if not moments or not isinstance(moments, Mapping):
            raise TargetError(
                "constrain: expected {scorer: moment}, such as {contains('dog'): 1.0}, got "
                f"{shorten(moments)}"
            )
        target = self
        for given, moment in moments.items():
            scorer = _as_scorer("constrain", given)
            moment = _number(f"constrain: the moment of {scorer.name}", moment)
            if not isinstance(given, Scorer) and moment in (0.0, 1.0):
                raise TargetError(
                    f"constrain: is {scorer.name} a condition, or a number with mean {moment:g}? "
                    f"Say so: function({scorer.name}, kind='boolean') or kind='real'"
                )
            if scorer.kind == "boolean" and not 0 <= moment <= 1:
                raise TargetError(
                    f"constrain: the moment of {scorer.name} expected 0 to 1, as it is boolean, "
                    f"got {moment:g}"
                )
            if scorer.kind == "positive" and moment <= 0:
                raise TargetError(
                    f"constrain: the moment of {scorer.name} expected above 0, as all its values "
                    f"are, got {moment:g}"
                )
            if scorer.kind == "boolean" and moment in (0.0, 1.0):
                target = target._with(factor=_condition(scorer, moment), condition=(scorer, moment))
            else:
                target = target._with(goals={scorer: moment})
        return target

    def reward(self, scorer: Scorer | Callable[..., Any], *, beta: float) -> Target:
        """a(x) exp(r(x) / beta): what maximising a reward with a KL penalty of weight beta aims at.

        Args:
            scorer: r(x), finite for every text. To forbid texts, multiply by a boolean scorer.
            beta: > 0, in units of the reward; the smaller, the further from the base (the paper's
                sentiment experiment: r = log of a probability, beta = 0.1).
        """
        scorer = _as_scorer("reward", scorer)
        beta = _number("reward: `beta`", beta)
        if beta <= 0:
            raise TargetError(f"reward: `beta` expected above 0, got {beta:g}")
        return self._with(
            factor=Factor(
                f"exp({scorer.name} / {beta:g})",
                (scorer,),
                lambda _, values: values[scorer] / beta,
                can_be_zero=False,
            )
        )

    def __mul__(self, other: Scorer | Target | Callable[..., Any]) -> Target:
        """P(x) s(x), for a scorer that is never negative; or all factors of both targets."""
        if isinstance(other, Target):
            return self._product(other)
        scorer = _as_scorer("*", other)
        if scorer.kind == "boolean":
            return self._with(factor=_condition(scorer, 1.0), condition=(scorer, 1.0))
        return self._with(factor=_weight(scorer))

    __rmul__ = __mul__

    def smooth(self, epsilon: float) -> Target:
        """max(b(x), epsilon) for the product b of all factors that can be zero.

        The way out for divergences with infinite f'(inf), such as reverse_kl: no text is impossible
        any more. The share epsilon (1 - Z) / (Z + epsilon (1 - Z)) of this target violates b, where
        Z = a(b): choose epsilon well below Z.
        """
        epsilon = _number("smooth: `epsilon`", epsilon)
        if not 0 < epsilon < 1:
            raise TargetError(f"smooth: `epsilon` expected above 0 and below 1, got {epsilon:g}")
        if self._log_score is not None and self._log_score.can_be_zero:
            raise TargetError(
                f"smooth: {self._log_score.name} is a log score of your own, with no factors to "
                "smooth. Return finite values from it and say custom(fn, can_be_zero=False)"
            )
        zero = tuple(f for f in self.factors if f.can_be_zero)
        if not zero:
            return self
        floor = math.log(epsilon)

        def log_value(rollout: Rollout, values: Mapping[Scorer, Tensor]) -> Tensor:
            return _sum(f.log_value(rollout, values) for f in zero).clamp(min=floor)

        smoothed = Factor(
            f"max({' · '.join(f.text for f in zero)}, {epsilon:g})",
            tuple(s for f in zero for s in f.scorers),
            log_value,
            can_be_zero=False,
        )
        kept = tuple(f for f in self.factors if not f.can_be_zero)
        return Target(self.base, (*kept, smoothed), self.goals, self._conditions, self._log_score)

    # -- what a target is asked ------------------------------------------------------------------

    def score(self, rollout: Rollout) -> Scores:
        """log a(x), log P(x) and every feature of B samples.

        Raises:
            TargetError: the lambdas are not fitted yet.
            ScorerError: a scorer misbehaved.
        """
        if self.needs_fit:
            names = ", ".join(s.name for s in self.goals)
            raise TargetError(f"target: the moments of {names} are not fitted yet. Call fit first")
        values = self._values(rollout)
        log_base = self.base.model.sequence_logprob(rollout)
        log_start = log_base if self._log_score is None else self._log_score(rollout).to(log_base)
        log_factors = self._log_factors(rollout, values)
        for scorer in self.goals:
            log_factors = log_factors + self.lambdas[scorer.name] * values[scorer]
        # Texts are scored on the CPU: all of it goes to the device at once, and nothing comes back.
        on_device = torch.stack([log_factors, *values.values()]).to(log_base.device)
        features = zip((s.name for s in values), on_device[1:].unbind(0), strict=True)
        return Scores(
            log_base=log_base,
            log_score=log_start + on_device[0],
            features=dict(features),
        )

    def log_score(self, rollout: Rollout) -> Tensor:
        """``(B,)`` fp64: log P(x), unnormalised; -inf off the support."""
        return self.score(rollout).log_score

    @property
    def can_be_zero(self) -> bool:
        """Whether P(x) can be 0 where a(x) is not. Divergences with f'(inf) = inf refuse that."""
        custom = self._log_score is not None and self._log_score.can_be_zero
        return custom or any(f.can_be_zero for f in self.factors)

    @property
    def is_condition(self) -> bool:
        """Whether P(x) is a(x) or zero: there is nothing in it but conditions."""
        return (
            self._log_score is None
            and not self.goals
            and all(f.can_be_zero and set(f.scorers) <= set(self._conditions) for f in self.factors)
        )

    @property
    def moments(self) -> dict[str, float]:
        """Feature name -> its mean under the target, where the target fixes one: a condition does,
        until it is smoothed."""
        strict = {scorer for f in self.factors if f.can_be_zero for scorer in f.scorers}
        conditions = {s: goal for s, goal in self._conditions.items() if s in strict}
        return {s.name: goal for s, goal in {**conditions, **self.goals}.items()}

    @property
    def verdicts(self) -> tuple[str, ...]:
        """Names of the features that a sample passes with 1 and fails with 0: those that are
        boolean, in a condition, a reward or a factor. (A moment is wanted of all samples.)"""
        return tuple(
            s.name
            for s in self._scorers
            if s.kind == "boolean" and s not in self.goals and self._conditions.get(s) != 0
        )

    @property
    def needs_fit(self) -> bool:
        """Whether there are moments without lambdas."""
        return bool(self.goals) and not self.lambdas

    def describe(self, *, fitted: bool = True) -> str:
        """``a(x) · [contains 'dog'] · exp(0.83 · female)``; not ``fitted``: ``λ`` for every lambda.

        The latter stays as it is when the target is fitted.
        """
        start = "a(x)" if self._log_score is None else f"exp({self._log_score.name}(x))"
        parts = [start, *(factor.text for factor in self.factors)]
        for scorer in self.goals:
            number = f"{self.lambdas[scorer.name]:.3g}" if fitted and self.lambdas else "λ"
            parts.append(f"exp({number} · {scorer.name})")
        return " · ".join(parts)

    __str__ = describe

    def __repr__(self) -> str:
        return f"<target {self.describe()}>"

    # -- lambdas ---------------------------------------------------------------------------------

    def fit(
        self, rollout: Rollout, holdout: Rollout, *, sampled_from_base: bool = True
    ) -> FitReport:
        """Set the lambdas so that the features have the wanted means; check them on new samples.

        Args:
            rollout: samples to fit on; thousands, with each feature seen at least dozens of times.
            holdout: other samples, to check on.
            sampled_from_base: the samples are the base's own, so log a(x) is their log q and the
                model is not asked again. Otherwise it is, and the weights carry a/q.

        Returns:
            The lambdas, the moments on both sets of samples, and what should worry.

        Raises:
            FitError: a feature was never (or always) seen, or no lambdas give these moments; the
                message names the features.
        """
        if not self.goals:
            raise TargetError(f"fit: {self.describe()} has no moments to fit")
        report = fit_moments(
            self._weighted_features(rollout, sampled_from_base),
            self._weighted_features(holdout, sampled_from_base),
            {scorer.name: goal for scorer, goal in self.goals.items()},
        )
        self.lambdas = {moment.name: moment.lambda_ for moment in report.moments}
        self.fitted_prompts = frozenset(rollout.prompts.tokens)
        return report

    def state_dict(self) -> dict[str, float]:
        """Feature name -> lambda, for a checkpoint (plain JSON)."""
        return dict(self.lambdas)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Set the lambdas that :meth:`state_dict` gave.

        Raises:
            TargetError: they belong to a target with other features.
        """
        expected = [scorer.name for scorer in self.goals]
        if sorted(state) not in ([], sorted(expected)):
            raise TargetError(
                f"target: expected lambdas of {expected}, got those of {list(state)}: "
                "they belong to another target"
            )
        self.lambdas = {n: _number(f"target: lambda of {n}", state[n]) for n in expected if state}
        self.fitted_prompts = None

    # --------------------------------------------------------------------------------------------

    def _with(
        self,
        factor: Factor | None = None,
        goals: Mapping[Scorer, float] | None = None,
        condition: tuple[Scorer, float] | None = None,
    ) -> Target:
        other = Target(
            self.base,
            () if factor is None else (factor,),
            goals,
            {} if condition is None else dict([condition]),
        )
        return self._product(other)

    def _product(self, other: Target) -> Target:
        if other.base is not self.base:
            raise TargetError("*: the two targets are over different bases; a product shares one")
        if self._log_score is not None and other._log_score is not None:
            raise TargetError("*: both targets have a log score of their own; keep one")
        for scorer in self.goals.keys() & other.goals.keys():
            if self.goals[scorer] != other.goals[scorer]:
                raise TargetError(
                    f"constrain: {scorer.name} cannot have two moments, {self.goals[scorer]:g} "
                    f"and {other.goals[scorer]:g}"
                )
        for scorer in self._conditions.keys() & other._conditions.keys():
            if self._conditions[scorer] != other._conditions[scorer]:
                raise TargetError(f"constrain: {scorer.name} cannot be both always and never")
        return Target(
            self.base,
            self.factors + other.factors,
            {**self.goals, **other.goals},
            {**self._conditions, **other._conditions},
            self._log_score or other._log_score,
        )

    def _distinct_scorers(self) -> tuple[Scorer, ...]:
        """Every scorer once, in order; two that differ must not share a name."""
        scorers = dict.fromkeys([*(s for f in self.factors for s in f.scorers), *self.goals])
        named: dict[str, Scorer] = {}
        for scorer in scorers:
            if scorer.name in named:
                raise TargetError(
                    f"target: two different scorers are both called {scorer.name!r}. Give one "
                    "another name, as in function(fn, name='...')"
                )
            named[scorer.name] = scorer
        return tuple(scorers)

    def _values(self, rollout: Rollout) -> dict[Scorer, Tensor]:
        """Each scorer's ``(B,)`` fp64 values, on the CPU."""
        if not self._scorers:
            return {}
        prompts = rollout.prompt_texts
        return {scorer: scorer(rollout.texts, prompts) for scorer in self._scorers}

    def _log_factors(self, rollout: Rollout, values: Mapping[Scorer, Tensor]) -> Tensor:
        """``(B,)`` fp64 on the CPU: the log of all factors, without the exponential family."""
        zeros = torch.zeros(len(rollout), dtype=torch.float64)
        return zeros + _sum(factor.log_value(rollout, values) for factor in self.factors)

    def _weighted_features(self, rollout: Rollout, sampled_from_base: bool) -> WeightedFeatures:
        values = self._values(rollout)
        log_q = rollout.log_q.cpu()
        log_base = log_q if sampled_from_base else self.base.model.sequence_logprob(rollout).cpu()
        log_start = log_base if self._log_score is None else self._log_score(rollout).cpu()
        return WeightedFeatures(
            features=torch.stack([values[scorer] for scorer in self.goals], dim=1),
            log_weight=log_start - log_q + self._log_factors(rollout, values),
            log_base_weight=log_base - log_q,
            prompt=rollout.prompt_index.cpu(),
        )


class Base(Target):
    """The frozen model a(x), where every target begins.

    Args:
        model: a ``LanguageModel`` (or anything with its ``sequence_logprob``), which nobody trains;
            None: set later, before any sample is scored.

    Raises:
        TargetError: it is something else, such as a name or a model of transformers.
    """

    def __init__(self, model: Model | None) -> None:
        if model is not None and not hasattr(model, "sequence_logprob"):
            raise TargetError(
                f"Base: `model` expected a LanguageModel, got {type(model).__name__}. Way out: "
                "fdpg.load(name), or Base(LanguageModel.from_model(model, tokenizer))"
            )
        super().__init__(None)
        self.model: Any = model  # callers know it as the LanguageModel that they passed
        self.base = self

    def custom(
        self,
        fn: Callable[[Rollout], Tensor],
        *,
        can_be_zero: bool = True,
        name: str | None = None,
    ) -> Target:
        """P(x) = exp(fn(rollout)): a log score of your own, in place of log a(x).

        Args:
            fn: given a :class:`Rollout`, returns ``(B,)`` log P(x); -inf means impossible.
            can_be_zero: whether it ever returns -inf; if not, every divergence can be used.
            name: by default the function's own.
        """
        if not callable(fn):
            raise TargetError(f"custom: `fn` expected a function of a rollout, got {shorten(fn)}")
        name = name or str(getattr(fn, "__name__", type(fn).__name__))
        return Target(self, log_score=LogScore(fn, name, can_be_zero))


# ------------------------------------------------------------------------------------------------
# From YAML


def from_spec(spec: Mapping[str, Any], base: Base, folder: Path | None = None) -> Target:
    """A target from what a YAML file says of it; its parts multiply.

    ::

        constrain: [{contains: dog}]                       # every sample
        moments: [{words: female.txt, moment: 0.5}]        # on average
        reward: {words: good.txt, mode: count, beta: 0.5}  # a mapping or a list of them
        times: [{python: mine.py:politeness}]              # factors that are never negative
        smooth: 1e-6
        python: mine.py:log_score                          # a log score of your own

    Args:
        spec: the mapping.
        base: the model it is over.
        folder: where relative file names are looked up first (the YAML file's own folder).

    Raises:
        TargetError, ScorerError: an unknown key (the nearest known one is named) or a bad value.
    """
    known = ("constrain", "moments", "reward", "times", "smooth", "python")
    if not isinstance(spec, Mapping):
        raise TargetError(f"target: expected a mapping with {', '.join(known)}, got {spec!r}")
    for key in spec:
        if key not in known:
            raise TargetError(
                f"target: unknown key {key!r}{nearest(str(key), known)} Known: {', '.join(known)}"
            )
    target: Target = base
    if spec.get("python"):
        target = base.custom(load_function(spec["python"], folder))
    for item in _listed("constrain", spec.get("constrain")):
        scorer = scorer_from_spec(item, folder)
        if scorer.kind != "boolean":
            raise TargetError(
                f"constrain: expected a scorer that is 0 or 1, got {scorer!r}. "
                "For a mean, use moments; for a Python function, add kind: boolean"
            )
        target = target.constrain({scorer: 1.0})
    for item in _listed("moments", spec.get("moments")):
        scorer, moment = _scorer_and_number("moments", "moment", item, folder)
        target = target.constrain({scorer: moment})
    for item in _listed("reward", spec.get("reward")):
        scorer, beta = _scorer_and_number("reward", "beta", item, folder)
        target = target.reward(scorer, beta=beta)
    for item in _listed("times", spec.get("times")):
        target = target * scorer_from_spec(item, folder)
    if target is base:
        raise TargetError(
            "target: nothing is wanted of the samples. Give at least one of "
            "constrain, moments, reward, times, python"
        )
    return target if spec.get("smooth") is None else target.smooth(spec["smooth"])


def _listed(key: str, value: Any) -> Sequence[Any]:
    if value is None:
        return []
    if isinstance(value, Mapping | Scorer):
        return [value]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TargetError(
            f"{key}: expected a list of scorers, as [{{contains: dog}}], got {value!r}"
        )
    return value


def _scorer_and_number(
    key: str, number: str, item: Any, folder: Path | None
) -> tuple[Scorer, float]:
    if not isinstance(item, Mapping) or number not in item:
        raise TargetError(f"{key}: expected a scorer and its `{number}`, got {item!r}")
    scorer = scorer_from_spec({k: v for k, v in item.items() if k != number}, folder)
    return scorer, item[number]


# ------------------------------------------------------------------------------------------------


def _condition(scorer: Scorer, moment: float) -> Factor:
    wanted = moment == 1.0
    return Factor(
        f"[{scorer.name}]" if wanted else f"[not {scorer.name}]",
        (scorer,),
        lambda _, values: (values[scorer] if wanted else 1 - values[scorer]).log(),
        can_be_zero=True,
    )


def _weight(scorer: Scorer) -> Factor:
    def log_value(rollout: Rollout, values: Mapping[Scorer, Tensor]) -> Tensor:
        value = values[scorer]
        negative = value < 0
        if negative.any():
            index = int(negative.nonzero()[0])
            raise TargetError(
                f"{scorer.name}: as a factor of a target, expected >= 0, got "
                f"{value[index].item():g} for sample {index}, {shorten(rollout.texts[index])}. "
                "For a score of either sign, use base.reward(scorer, beta=...)"
            )
        return value.log()

    return Factor(scorer.name, (scorer,), log_value, can_be_zero=scorer.kind != "positive")


def _as_scorer(where: str, value: object) -> Scorer:
    if isinstance(value, Scorer):
        return value
    if callable(value):
        return function(value)
    raise TargetError(f"{where}: expected a scorer, such as contains('dog'), got {shorten(value)}")


def _number(what: str, given: object) -> float:
    value = plain(given)  # NumPy's and torch's too
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise TargetError(f"{what} expected a finite number, got {given!r}")
    return float(value)


def _sum(values: Any) -> Tensor:
    return sum(values, torch.zeros((), dtype=torch.float64))
