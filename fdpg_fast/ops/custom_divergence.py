"""fdiv_weights and fdiv_terms for a user's own f', in PyTorch: a kernel cannot call Python.

The formulas are those of csrc/include/fdpg/fdiv_weights.h, on the device of the inputs and without
a host round trip. A test gives the built-in divergences as callables and compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fdpg_fast.baselines import Baseline
from fdpg_fast.divergences import Divergence

__all__ = ["order", "terms", "weights_and_statistics"]


def _f_prime(divergence: Divergence) -> Callable[[Tensor], Tensor]:
    if divergence.f_prime is None:
        raise ValueError(f"fdiv_weights: `divergence` {divergence} is not a custom one")
    return divergence.f_prime


def weights_and_statistics(
    log_pi: Tensor,
    log_q: Tensor,
    log_score: Tensor,
    log_z: Tensor,
    prompt: Tensor,
    *,
    divergence: Divergence,
    baseline: Baseline,
    baseline_state: Tensor | None,
    ratio_clip: float,
    reward_clip: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weights ``[B]`` and the statistics by name; arguments as for ``ops.fdiv_weights``."""
    f_prime = _f_prime(divergence)
    zero = torch.zeros((), dtype=torch.float64, device=log_pi.device)
    log_p = log_score - log_z[prompt]
    used = (log_z[prompt] > -math.inf) & (log_pi > -math.inf)
    on_support = log_p > -math.inf

    # Where a sample is not used or off the support, log_t would be NaN: put 0 and look away.
    log_t = torch.where(used & on_support, log_pi - log_p, zero)
    reward = -torch.where(on_support, f_prime(log_t), divergence.f_prime_inf)
    clipped_reward = reward.clamp(-reward_clip, reward_clip)
    log_ratio = torch.where(used, log_pi - log_q, zero)
    whole_ratio = log_ratio.exp()
    ratio = torch.where(used, whole_ratio.clamp(max=ratio_clip), zero)
    ratio_reward = torch.where(used, ratio * clipped_reward, zero)

    b = _baseline(baseline, baseline_state, ratio, ratio_reward, prompt)
    weights = torch.where(used, ratio_reward - ratio * b, zero)
    if baseline.keeps_state and baseline_state is not None:
        _update(baseline_state, baseline, ratio, ratio_reward, used)

    n = used.sum().double()
    log_target_ratio = torch.where(used, log_p - log_q, -math.inf)
    values = terms(log_pi, log_q, log_score, log_z, prompt, divergence)
    divergence_mean, divergence_std = _moments(values, used, n)
    reward_mean, reward_std = _moments(clipped_reward, used, n)
    return weights, {
        "n_used": n,
        "n_skipped": (~used).sum(),
        "n_off_support": (used & ~on_support).sum(),
        "reward_mean": reward_mean,
        "reward_std": reward_std,
        "baseline_mean": _moments(b, used, n)[0],
        "advantage_std": _moments(clipped_reward - b, used, n)[1],
        "weight_abs_max": weights.abs().amax() if len(weights) else zero,
        "ratio_mean": _moments(whole_ratio, used, n)[0],
        "ratio_max": torch.where(used, whole_ratio, zero).amax() if len(weights) else zero,
        "ratio_ess": _effective_size(torch.where(used, log_ratio, -math.inf)),
        "n_ratio_clipped": (used & (whole_ratio > ratio_clip)).sum(),
        "n_reward_clipped": (used & (reward.abs() > reward_clip)).sum(),
        "target_ess": _effective_size(log_target_ratio),
        "divergence": divergence_mean,
        "divergence_se": divergence_std / n.clamp(min=1.0).sqrt(),
    }


def order(statistics: dict[str, Tensor], names: tuple[str, ...]) -> Tensor:
    """The statistics as one fp64 tensor in the order of ``names``, all of which are there."""
    return torch.stack([statistics[name].double() for name in names])


def terms(
    log_pi: Tensor,
    log_q: Tensor,
    log_score: Tensor,
    log_z: Tensor,
    prompt: Tensor,
    divergence: Divergence,
) -> Tensor:
    """``[B]`` terms; arguments as for ``ops.fdiv_terms``."""
    f_prime = _f_prime(divergence)
    log_p = log_score - log_z[prompt]
    on_support = log_p > -math.inf
    log_s = torch.where(on_support, log_p - log_q, 0.0)
    # At pi(x) = 0 the term is f~(0), which e^-700 is near enough to.
    log_t = torch.where(on_support, log_pi - log_p, 0.0).clamp(-700.0, 700.0)
    slope = f_prime(torch.zeros_like(log_pi))
    if divergence.f is None:
        inside = _integrate(f_prime, log_t, log_s, slope)
    else:
        inside = log_s.exp() * divergence.f(log_t) - slope * (log_s.exp() * log_t.expm1())
    outside = (log_pi - log_q).exp() * (divergence.f_prime_inf - slope)
    term = torch.where(on_support, inside, outside).clamp(min=0.0)
    return torch.where(log_z[prompt] > -math.inf, term, math.nan)


_PANELS, _ORDER = 64, 16
# Here, for torch.compile does not look into numpy's polynomials.
_NODES, _NODE_WEIGHTS = map(torch.from_numpy, np.polynomial.legendre.leggauss(_ORDER))


def _integrate(
    f_prime: Callable[[Tensor], Tensor], log_t: Tensor, log_s: Tensor, slope: Tensor
) -> Tensor:
    """e^log_s f~(t) = e^log_s times the integral of (f'(u) - f'(0)) e^u du from 0 to log_t.

    Gauss-Legendre on panels of equal width; a kink or jump of f' at 0 (total variation) falls on
    an end. Relative error below 1e-8 for the built-in divergences up to abs(log_t) = 700.
    """
    start = torch.arange(_PANELS, dtype=torch.float64)[:, None]
    x = (start + (_NODES + 1.0) / 2.0).flatten() / _PANELS  # in (0, 1)
    dx = _NODE_WEIGHTS.repeat(_PANELS) / (2.0 * _PANELS)
    u = log_t[:, None] * x.to(log_t.device)
    integrand = (f_prime(u) - slope[:, None]) * (u + log_s[:, None]).exp()
    return log_t * (integrand * dx.to(log_t.device)).sum(1)


def _baseline(
    baseline: Baseline,
    state: Tensor | None,
    ratio: Tensor,
    ratio_reward: Tensor,
    prompt: Tensor,
) -> Tensor:
    """``[B]``: see csrc/include/fdpg/baseline.h. Unused samples come in with ratio 0."""
    if baseline.name == "none":
        return torch.zeros_like(ratio)
    if baseline.keeps_state:
        if state is None:
            raise ValueError(
                f"fdiv_weights: `baseline_state` must be given for the baseline {baseline}"
            )
        mean = torch.where(state[1] > 0, state[0] / state[1], 0.0)
        return mean.expand_as(ratio)
    others = ~torch.eye(len(ratio), dtype=torch.bool, device=ratio.device)
    if baseline.name == "loo":
        others &= prompt[:, None] == prompt
    elif baseline.name != "mean":
        raise ValueError(
            f"fdiv_weights: the baseline {baseline} is not available for a custom divergence"
        )
    ratio_sum = torch.where(others, ratio, 0.0).sum(1)
    reward_sum = torch.where(others, ratio_reward, 0.0).sum(1)
    return torch.where(ratio_sum > 0, reward_sum / ratio_sum, 0.0)


def _update(
    state: Tensor, baseline: Baseline, ratio: Tensor, ratio_reward: Tensor, used: Tensor
) -> None:
    """Moves the moving average by this batch, unless it is empty or not finite."""
    decay = baseline.param if baseline.param is not None else 0.0
    n = used.sum()
    sums = torch.stack([ratio_reward.sum(), ratio.sum()])
    moved = decay * state + (1.0 - decay) * sums / n.clamp(min=1)
    state.copy_(torch.where((n > 0) & sums.isfinite().all(), moved, state))


def _moments(values: Tensor, used: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n - 1) over the used samples; 0 where there are too few."""
    mean = torch.where(used, values, 0.0).sum() / n.clamp(min=1.0)
    square = torch.where(used, (values - mean) ** 2, 0.0).sum()
    return mean, (square / (n - 1.0).clamp(min=1.0)).sqrt()


def _effective_size(log_w: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2; 0 where all weights are."""
    if len(log_w) == 0:
        return torch.zeros((), dtype=torch.float64, device=log_w.device)
    size = (2.0 * log_w.logsumexp(0) - (2.0 * log_w).logsumexp(0)).exp()
    return torch.where((log_w > -math.inf).any(), size, 0.0)
