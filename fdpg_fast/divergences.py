"""The f-divergences one can train with, by name.

    D_f(pi || p) = E_{x~p} f(t) + f'(inf) pi(p = 0),    t = pi(x) / p(x)

The formulas are in ``csrc/include/fdpg/divergence.h``, whose list this module reads, and again in
`reference`. A user's own divergence is a Python function f'(log t): `Divergence.custom`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fdpg_fast import choices
from fdpg_fast._build import load

__all__ = ["DIVERGENCES", "Divergence", "describe_divergences", "require_finite_at_zero_targets"]

_C = load()

DIVERGENCES = choices.read(_C.divergences())
"""The compiled divergences by name, in the order of their ids."""

CUSTOM_ID = -1


@dataclass(frozen=True)
class Divergence:
    """An f-divergence D_f(pi || p) between the policy pi and the target p.

    Make one by `parse` or `custom`; ``str(divergence)`` is text that `parse` reads back.

    Attributes:
        name: ``js``, ``alpha``, ...
        id: its place in the compiled list; -1 for a custom one.
        param: its parameter, None if it takes none.
        f_prime_inf: f'(inf), what f' is off the target's support; ``math.inf`` if infinite.
        meaning: one line.
        f_prime: a custom divergence's f', else None.
        f: a custom divergence's f where it was given, else None.
    """

    name: str
    id: int
    param: float | None
    f_prime_inf: float
    meaning: str
    f_prime: Callable[[Tensor], Tensor] | None = None
    f: Callable[[Tensor], Tensor] | None = None

    @staticmethod
    def parse(text: str) -> Divergence:
        """``"js"``, ``"alpha(0.5)"``; a parameter that is left out takes its default.

        Raises:
            ValueError: unknown name (the message has the nearest and the list), a parameter where
                none is taken, or one out of its range.
        """
        choice, param = choices.parse(text, DIVERGENCES, kind="divergence", plural="divergences")
        limits = _C.divergence_limits(choice.id, 0.0 if param is None else param)
        return Divergence(choice.name, choice.id, param, limits["f_prime_inf"], choice.meaning)

    @staticmethod
    def custom(
        f_prime: Callable[[Tensor], Tensor],
        *,
        name: str,
        f_prime_inf: float,
        f: Callable[[Tensor], Tensor] | None = None,
    ) -> Divergence:
        """A divergence of your own; it runs in PyTorch rather than in the compiled kernel.

        Args:
            f_prime: f' as a function of log_t = log pi - log p: fp64 tensor in, same shape out.
                The pseudo-reward of a sample is ``-f_prime(log_t)``.
            name: what logs and reports call it.
            f_prime_inf: its limit as log_t -> inf, which is f' where p(x) = 0; ``math.inf`` if
                there is none, and then targets that can be zero are refused.
            f: f as a function of log_t, with f(0) = 0. Only the estimate of the divergence that
                is logged needs it.

        Raises:
            ValueError: f' decreases somewhere (f would not be convex), is NaN, does not return a
                tensor of the same shape, or does not approach ``f_prime_inf``.

        Example:
            >>> Divergence.custom(lambda log_t: torch.tanh(log_t), name="tanh", f_prime_inf=1.0)
        """
        if name in DIVERGENCES:
            raise ValueError(f"divergence: {name!r} is built in. Give yours another name")
        _check_custom(name, f_prime, f_prime_inf)
        meaning = "a user's own divergence, in PyTorch"
        return Divergence(name, CUSTOM_ID, None, f_prime_inf, meaning, f_prime, f)

    @property
    def is_custom(self) -> bool:
        """True for one made by `custom`: the kernels do not know it."""
        return self.f_prime is not None

    @property
    def allows_zero_targets(self) -> bool:
        """True if samples with P(x) = 0 have a finite reward."""
        return math.isfinite(self.f_prime_inf)

    def __str__(self) -> str:
        return choices.write(self.name, self.param)


def describe_divergences() -> str:
    """One line per divergence, for ``--help``."""
    return choices.describe(DIVERGENCES)


def require_finite_at_zero_targets(divergence: Divergence, target_name: str) -> None:
    """Refuses a divergence that is infinite on a target that can be zero.

    Args:
        divergence: what is to be minimised.
        target_name: the target, as the message should call it.

    Raises:
        ValueError: f'(inf) is infinite, so one sample with P(x) = 0 has a reward of minus infinity
            (f-DPG, arXiv 2302.08215, Theorem 1 needs f'(inf) finite there).
    """
    if divergence.allows_zero_targets:
        return
    raise ValueError(
        f"divergence: {divergence} is infinite wherever the target is zero, and {target_name} is "
        f"zero for samples that break a constraint. Ways out: smooth the target "
        f"(--target.smooth 1e-6, in Python target.smooth(1e-6)), write the constraint as a reward "
        f"(--target.reward, base.reward(scorer, beta=...)), "
        f"or take a divergence that stays finite: {', '.join(_finite_names())}"
    )


def _finite_names() -> list[str]:
    """The listed divergences, at their defaults, that allow targets of zero."""
    return [str(d) for d in map(Divergence.parse, DIVERGENCES) if d.allows_zero_targets]


def _check_custom(name: str, f_prime: Callable[[Tensor], Tensor], f_prime_inf: float) -> None:
    """Raises ValueError where ``f_prime`` cannot be the slope of a convex f with that limit."""
    if math.isnan(f_prime_inf) or f_prime_inf == -math.inf:
        raise ValueError(f"divergence {name}: `f_prime_inf` must be a number or inf")
    # As far as sequences go in practice, and finely where most slopes change.
    near = torch.linspace(-30, 30, 1201, dtype=torch.float64)
    far = torch.linspace(30, 700, 135, dtype=torch.float64)[1:]
    log_t = torch.cat([-far.flip(0), near, far])
    value = f_prime(log_t)
    if not isinstance(value, Tensor) or value.shape != log_t.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"divergence {name}: f_prime expected to return a tensor of shape {tuple(log_t.shape)} "
            f"for one of that shape, got {got}"
        )
    value = value.double()
    if value.isnan().any():
        where = log_t[value.isnan()][0].item()
        raise ValueError(f"divergence {name}: f_prime is NaN at log_t = {where:g}")
    before, after = value[:-1], value[1:]
    falls = after < before - 1e-9 * (1 + before.abs())
    if falls.any():
        where = log_t[1:][falls][0].item()
        raise ValueError(
            f"divergence {name}: f_prime decreases near log_t = {where:g}, so f is not convex"
        )
    end, earlier = value[-1].item(), value[log_t <= 350][-1].item()
    grows = math.isinf(end) or end > earlier + 1e-3
    if math.isinf(f_prime_inf) and not grows:
        raise ValueError(
            f"divergence {name}: `f_prime_inf` is inf, but f_prime stops at {end:g}. "
            f"Say f_prime_inf={end:.6g}"
        )
    if math.isfinite(f_prime_inf) and not abs(end - f_prime_inf) <= 1e-2 * (1 + abs(f_prime_inf)):
        raise ValueError(
            f"divergence {name}: `f_prime_inf` is {f_prime_inf:g}, but f_prime at log_t = 700 is "
            f"{end:g}. Say f_prime_inf={'math.inf' if grows else f'{end:.6g}'}"
        )
