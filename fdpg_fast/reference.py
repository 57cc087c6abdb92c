"""The ops in plain PyTorch: the truth for tests and benchmarks, written to be believed at sight.

Any float dtype, no speed, no special care at the extremes. Imports nothing of the package; nothing
of the package imports it.

Shape legend: B sequences, T tokens, V vocabulary, G prompts, N rows, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "FORMULAS",
    "PolicyGradient",
    "Sampled",
    "TokenLogprob",
    "cache_append_",
    "capped",
    "decode_attention",
    "f",
    "f_prime",
    "fdiv_terms",
    "fdiv_weights",
    "gelu_tanh",
    "linear_logprob",
    "log_partition_",
    "new_log_partition",
    "philox4x32_10",
    "policy_gradient",
    "random_uniform",
    "sample_logprob",
    "sequence_logprob",
    "token_logprob",
]

# --------------------------------------------------------------------------------------------------
# The divergences: f, its slope, and the two limits, as functions of t = pi / p and the parameter a.
# `m` is where log and sqrt come from: torch, or mpmath when a test wants 1000 digits.


class Formula(NamedTuple):
    """One f-divergence. ``f(m, t, a)``, ``f_prime(m, t, a)``, ``f_zero(a)``, ``f_prime_inf(a)``."""

    f: Callable[[Any, Any, Any], Any]
    f_prime: Callable[[Any, Any, Any], Any]
    f_zero: Callable[[Any], float]
    f_prime_inf: Callable[[Any], float]


def _alpha_f(m: Any, t: Any, a: Any) -> Any:
    if a == 0:
        return t - 1 - m.log(t)
    if a == 1:
        return t * m.log(t) - t + 1
    return (t**a - a * t - (1 - a)) / (a * (a - 1))


def _alpha_f_prime(m: Any, t: Any, a: Any) -> Any:
    return m.log(t) if a == 1 else (t ** (a - 1) - 1) / (a - 1)


FORMULAS: dict[str, Formula] = {
    "kl": Formula(
        f=lambda m, t, a: -m.log(t),
        f_prime=lambda m, t, a: -1 / t,
        f_zero=lambda a: math.inf,
        f_prime_inf=lambda a: 0.0,
    ),
    "reverse_kl": Formula(
        f=lambda m, t, a: t * m.log(t),
        f_prime=lambda m, t, a: m.log(t) + 1,
        f_zero=lambda a: 0.0,
        f_prime_inf=lambda a: math.inf,
    ),
    "tv": Formula(
        f=lambda m, t, a: abs(t - 1) / 2,
        f_prime=lambda m, t, a: m.sign(t - 1) / 2,
        f_zero=lambda a: 0.5,
        f_prime_inf=lambda a: 0.5,
    ),
    "js": Formula(
        f=lambda m, t, a: t * m.log(2 * t / (t + 1)) + m.log(2 / (t + 1)),
        f_prime=lambda m, t, a: m.log(2 * t / (t + 1)),
        f_zero=lambda a: math.log(2),
        f_prime_inf=lambda a: math.log(2),
    ),
    "alpha": Formula(
        f=_alpha_f,
        f_prime=_alpha_f_prime,
        f_zero=lambda a: 1 / a if a > 0 else math.inf,
        f_prime_inf=lambda a: 1 / (1 - a) if a < 1 else math.inf,
    ),
    "hellinger": Formula(
        f=lambda m, t, a: (m.sqrt(t) - 1) ** 2,
        f_prime=lambda m, t, a: 1 - 1 / m.sqrt(t),
        f_zero=lambda a: 1.0,
        f_prime_inf=lambda a: 1.0,
    ),
    "chi2": Formula(
        f=lambda m, t, a: (t - 1) ** 2 / t,
        f_prime=lambda m, t, a: 1 - 1 / t**2,
        f_zero=lambda a: math.inf,
        f_prime_inf=lambda a: 1.0,
    ),
    "reverse_chi2": Formula(
        f=lambda m, t, a: (t - 1) ** 2,
        f_prime=lambda m, t, a: 2 * (t - 1),
        f_zero=lambda a: 1.0,
        f_prime_inf=lambda a: math.inf,
    ),
    "jeffreys": Formula(
        f=lambda m, t, a: (t - 1) * m.log(t),
        f_prime=lambda m, t, a: m.log(t) + 1 - 1 / t,
        f_zero=lambda a: math.inf,
        f_prime_inf=lambda a: math.inf,
    ),
    "js_w": Formula(
        f=lambda m, t, a: a * t * m.log(t) - (a * t + 1 - a) * m.log(a * t + 1 - a),
        f_prime=lambda m, t, a: a * m.log(t / (a * t + 1 - a)),
        f_zero=lambda a: -(1 - a) * math.log(1 - a),
        f_prime_inf=lambda a: -a * math.log(a),
    ),
    "skew_kl": Formula(
        f=lambda m, t, a: -m.log(a * t + 1 - a),
        f_prime=lambda m, t, a: -a / (a * t + 1 - a),
        f_zero=lambda a: -math.log(1 - a),
        f_prime_inf=lambda a: 0.0,
    ),
    "skew_reverse_kl": Formula(
        f=lambda m, t, a: t * m.log(t / (a * t + 1 - a)),
        f_prime=lambda m, t, a: m.log(t / (a * t + 1 - a)) + (1 - a) / (a * t + 1 - a),
        f_zero=lambda a: 0.0,
        f_prime_inf=lambda a: -math.log(a),
    ),
}


class Named(Protocol):
    """A divergence or a baseline: all that is asked of it here is its name and its parameter."""

    @property
    def name(self) -> str: ...
    @property
    def param(self) -> float | None: ...


def f(divergence: Named, log_t: Tensor) -> Tensor:
    """f(t) at t = exp(log_t), elementwise."""
    return FORMULAS[divergence.name].f(torch, log_t.exp(), divergence.param)  # type: ignore[no-any-return]


def f_prime(divergence: Named, log_t: Tensor) -> Tensor:
    """f'(t) at t = exp(log_t), elementwise."""
    return FORMULAS[divergence.name].f_prime(torch, log_t.exp(), divergence.param)  # type: ignore[no-any-return]


# --------------------------------------------------------------------------------------------------
# Per-sequence ops.


def sequence_logprob(values: Tensor, lengths: Tensor) -> Tensor:
    """``(B, T)``, ``(B,)`` -> ``(B,)`` fp64: the sum of each row up to its length."""
    inside = torch.arange(values.shape[1], device=values.device) < lengths[:, None]
    return torch.where(inside, values.double(), 0.0).sum(dim=1)


def new_log_partition(prompts: int, device: torch.device | str = "cpu") -> Tensor:
    """``(G, 3)`` fp64: log of a sum of no weights, of no squared weights, and a count of zero."""
    row = torch.tensor([-math.inf, -math.inf, 0.0], dtype=torch.float64, device=device)
    return row.repeat(prompts, 1)


def log_partition_(state: Tensor, log_weight: Tensor, prompt: Tensor) -> None:
    """Adds the weights exp(log_weight) ``(B,)`` of samples of ``prompt`` ``(B,)`` to ``state``."""
    for g in set(prompt.tolist()):
        mine = log_weight[prompt == g]
        state[g, 0] = torch.logsumexp(torch.cat([state[g, 0:1], mine]), dim=0)
        state[g, 1] = torch.logsumexp(torch.cat([state[g, 1:2], 2 * mine]), dim=0)
        state[g, 2] += len(mine)


def fdiv_terms(
    log_pi: Tensor,
    log_q: Tensor,
    log_score: Tensor,
    log_z: Tensor,
    prompt: Tensor,
    *,
    divergence: Named,
) -> Tensor:
    """``(B,)`` terms whose mean estimates D_f(pi || p) from samples of q.

    (p/q) f~(t) where p > 0 and (pi/q) f~'(inf) where p = 0, with f~(t) = f(t) - f'(1) (t - 1); NaN
    for a prompt whose log Z is -inf.
    """
    formula, a = FORMULAS[divergence.name], divergence.param
    slope = formula.f_prime(torch, torch.ones((), dtype=torch.float64), a)
    log_p = log_score - log_z[prompt]
    t = (log_pi - log_p).exp()
    on_support = (log_p - log_q).exp() * (formula.f(torch, t, a) - slope * (t - 1))
    off_support = (log_pi - log_q).exp() * (formula.f_prime_inf(a) - slope)
    terms = torch.where(log_p == -math.inf, off_support, on_support)
    return torch.where(log_z[prompt] == -math.inf, math.nan, terms)


def fdiv_weights(
    log_pi: Tensor,
    log_q: Tensor,
    log_score: Tensor,
    log_z: Tensor,
    prompt: Tensor,
    *,
    divergence: Named,
    baseline: Named,
    baseline_state: Tensor | None = None,
    ratio_clip: float = math.inf,
    reward_clip: float = math.inf,
) -> tuple[Tensor, dict[str, float]]:
    """The weight of each sample in grad D_f = -(1/B) sum_i weight_i grad log pi(x_i).

    weight_i = ratio_i (r_i - b_i), r = -f'(pi/p), ratio = min(pi/q, ratio_clip)
    (f-DPG, arXiv 2302.08215, Theorem 1 and Fact 1). Samples with log Z or log pi of -inf are
    skipped. ``baseline_state`` is updated in place.

    Returns:
        ``(B,)`` weights, and the statistics of the batch by name.
    """
    formula, a = FORMULAS[divergence.name], divergence.param
    used = [i for i in range(len(log_pi)) if log_z[prompt[i]] > -math.inf and log_pi[i] > -math.inf]
    ratio_before, ratio, reward, target_ratio = {}, {}, {}, {}
    for i in used:
        log_p = log_score[i] - log_z[prompt[i]]
        target_ratio[i] = (log_p - log_q[i]).exp().item()
        ratio_before[i] = (log_pi[i] - log_q[i]).exp().item()
        ratio[i] = min(ratio_before[i], ratio_clip)
        if log_p == -math.inf:
            reward[i] = -formula.f_prime_inf(a)
        else:
            reward[i] = -formula.f_prime(torch, (log_pi[i] - log_p).exp(), a).item()
    n_reward_clipped = sum(abs(r) > reward_clip for r in reward.values())
    reward = {i: max(-reward_clip, min(reward_clip, r)) for i, r in reward.items()}

    def mean_over(others: list[int]) -> float:
        """The mean reward under pi, estimated from other samples."""
        total = sum(ratio[j] for j in others)
        return sum(ratio[j] * reward[j] for j in others) / total if total > 0 else 0.0

    subtracted = {}
    for i in used:
        if baseline.name == "none":
            subtracted[i] = 0.0
        elif baseline.name == "analytic":
            subtracted[i] = 1.0
        elif baseline.name == "mean":
            subtracted[i] = mean_over([j for j in used if j != i])
        elif baseline.name == "loo":
            subtracted[i] = mean_over([j for j in used if j != i and prompt[j] == prompt[i]])
        elif baseline.name == "ema":
            assert baseline_state is not None
            total, weight = baseline_state.tolist()
            subtracted[i] = total / weight if weight > 0 else 0.0
        else:
            raise ValueError(f"reference.fdiv_weights has no formula for baseline {baseline.name}")
    if baseline.name == "ema" and used:
        assert baseline_state is not None
        assert baseline.param is not None
        batch = [sum(ratio[i] * reward[i] for i in used), sum(ratio[i] for i in used)]
        new = torch.tensor(batch, dtype=torch.float64) / len(used)
        baseline_state.mul_(baseline.param).add_((1 - baseline.param) * new.to(baseline_state))

    weights = torch.zeros(len(log_pi), dtype=torch.float64)
    for i in used:
        weights[i] = ratio[i] * (reward[i] - subtracted[i])

    every_term = fdiv_terms(log_pi, log_q, log_score, log_z, prompt, divergence=divergence)
    terms = [every_term[i].item() for i in used]
    advantages = [reward[i] - subtracted[i] for i in used]
    statistics = {
        "n_used": len(used),
        "n_skipped": len(log_pi) - len(used),
        "n_off_support": sum(log_score[i] == -math.inf for i in used),
        "reward_mean": _mean(reward.values()),
        "reward_std": _deviation(reward.values()),
        "baseline_mean": _mean(subtracted.values()),
        "advantage_std": _deviation(advantages),
        "weight_abs_max": max((abs(weights[i].item()) for i in used), default=0.0),
        "ratio_mean": _mean(ratio_before.values()),
        "ratio_max": max(ratio_before.values(), default=0.0),
        "ratio_ess": _effective_size(ratio_before.values()),
        "n_ratio_clipped": sum(r > ratio_clip for r in ratio_before.values()),
        "n_reward_clipped": n_reward_clipped,
        "target_ess": _effective_size(target_ratio.values()),
        "divergence": _mean(terms),
        "divergence_se": _deviation(terms) / math.sqrt(max(len(terms), 1)),
    }
    return weights.to(log_pi.device), {name: float(value) for name, value in statistics.items()}


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _deviation(values: Collection[float]) -> float:
    """Standard deviation, with n - 1."""
    mean = _mean(values)
    n = len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else 0.0


def _effective_size(weights: Collection[float]) -> float:
    """How many equal weights would be as noisy as these: (sum w)^2 / sum w^2."""
    squares = sum(w * w for w in weights)
    return sum(weights) ** 2 / squares if squares > 0 else 0.0


# --------------------------------------------------------------------------------------------------
# The vocabulary: logits, N rows of V, or any leading dimensions


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Bounded smoothly, in (-softcap, softcap), if there is a softcap: -inf gives -softcap."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


class TokenLogprob(NamedTuple):
    """``[...]`` each; ``entropy`` is None if it was not asked for."""

    logp: Tensor
    lse: Tensor
    entropy: Tensor | None


def token_logprob(
    logits: Tensor,
    target: Tensor,
    *,
    inv_temperature: float = 1.0,
    mask: Tensor | None = None,
    entropy: bool = False,
    softcap: float | None = None,
    inplace_backward: bool = False,
) -> TokenLogprob:
    """``(..., V)``, ``(...)`` -> log-probability of the target, log-sum-exp, entropy.

    In fp32, or fp64 if the logits are; zeros where ``mask`` is False. ``inplace_backward`` changes
    nothing here.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = capped(logits, softcap) * inv_temperature
    if mask is not None:
        z = torch.where(mask[..., None], z, 0.0)
        target = torch.where(mask, target, 0)
    log_p = torch.log_softmax(z, dim=-1)
    logp = log_p.gather(-1, target[..., None])[..., 0]
    lse = torch.logsumexp(z, dim=-1)
    # 0 log 0 = 0
    finite_log_p = torch.where(log_p == -math.inf, 0.0, log_p)
    h = -(log_p.exp() * finite_log_p).sum(dim=-1)
    if mask is not None:
        logp, lse, h = (torch.where(mask, value, 0.0) for value in (logp, lse, h))
    return TokenLogprob(logp, lse, h if entropy else None)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    inv_temperature: float = 1.0,
    mask: Tensor | None = None,
    entropy: bool = False,
    keep_bytes: int | None = None,
    chunk: int | None = None,
) -> TokenLogprob:
    """``(N, D)``, ``(V, D)``, ``(N,)`` -> :func:`token_logprob` of the logits of a linear head.

    In the precision of the inputs; ``keep_bytes`` and ``chunk`` change nothing here.
    """
    logits = scale * torch.nn.functional.linear(hidden, weight, bias)
    return token_logprob(
        logits,
        target,
        inv_temperature=inv_temperature,
        mask=mask,
        entropy=entropy,
        softcap=softcap,
    )


class PolicyGradient(NamedTuple):
    """``(N,)``, ``(N,)``, ``(N, D)``, ``(V, D)``, and ``(V,)`` or None."""

    logp: Tensor
    lse: Tensor
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def policy_gradient(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    coefficient: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    inv_temperature: float = 1.0,
    mask: Tensor | None = None,
    lse_hint: Tensor | None = None,
    need_hidden: bool = True,
    need_weight: bool = True,
    need_bias: bool = True,
    add_to_weight: Tensor | None = None,
    add_to_bias: Tensor | None = None,
    chunk: int | None = None,
) -> PolicyGradient:
    """:func:`linear_logprob`, and the gradient of sum_n coefficient[n] logp[n] by autograd.

    ``lse_hint`` and ``chunk`` change nothing here.
    """
    leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    logp, lse, _ = linear_logprob(
        leaves[0],
        leaves[1],
        target,
        bias=None if bias is None else leaves[2],
        scale=scale,
        softcap=softcap,
        inv_temperature=inv_temperature,
        mask=mask,
    )
    of_hidden, of_weight, *of_bias = torch.autograd.grad((coefficient * logp).sum(), leaves)
    if add_to_weight is not None:
        of_weight = add_to_weight + of_weight
    if add_to_bias is not None:
        of_bias = [add_to_bias + g for g in of_bias]
    return PolicyGradient(
        logp.detach(),
        lse.detach(),
        of_hidden if need_hidden else None,
        of_weight if need_weight else None,
        of_bias[0] if need_bias and of_bias else None,
    )


def cache_append_(
    keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, position: Tensor
) -> None:
    """``(B, Hk, T, D)``, ``(B, Hk, T, E)``, ``(B, Hk, Q, D)``, ``(B, Hk, Q, E)``, ``(B,)``."""
    for cache, new in ((keys, new_keys), (values, new_values)):
        for b, start in enumerate(position.tolist()):
            cache[b, :, start : start + new.shape[2]] = new[b]


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    end: Tensor,
    *,
    begin: Tensor | None = None,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """``(B, H, D)``, ``(R, Hk, T, D)``, ``(R, Hk, T, E)``, ``(B,)`` -> ``(B, H, E)``."""
    heads, key_heads = query.shape[1], keys.shape[1]
    if rows is not None:
        keys, values = keys[rows], values[rows]
    keys, values = (t.repeat_interleave(heads // key_heads, dim=1) for t in (keys, values))
    scores = torch.einsum("bhd,bhtd->bht", query, keys)
    scores = capped(scores * (query.shape[2] ** -0.5 if scale is None else scale), softcap)
    place = torch.arange(keys.shape[2], device=keys.device)
    live = place < end[:, None]
    if bias is not None:
        column = (place + keys.shape[2] - end[:, None]).clamp(max=keys.shape[2] - 1)
        scores = scores + bias.to(scores.dtype)[:, column].movedim(0, 1)
    if begin is not None:
        live &= place >= begin[:, None]
    scores = scores.masked_fill(~live[:, None], -math.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None].expand(len(scores), -1, 1)
        scores = torch.cat((scores, column), dim=2)
    weights = torch.softmax(scores, dim=2)[:, :, : keys.shape[2]].nan_to_num(0.0)
    return torch.einsum("bht,bhte->bhe", weights, values)


def gelu_tanh(x: Tensor) -> Tensor:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2; where tanh is -1 in all digits, by the
    sigmoid of twice its argument."""
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


class Sampled(NamedTuple):
    """``(N,)`` each."""

    token: Tensor
    logp: Tensor
    lse: Tensor
    entropy: Tensor | None


def sample_logprob(
    logits: Tensor,
    seed: int | Tensor,
    sample_id: Tensor,
    position: Tensor,
    *,
    inv_temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
) -> Sampled:
    """``(N, V)`` -> the first token whose cumulative probability exceeds the row's uniform number.

    A row that holds NaN or +inf, or is -inf throughout, gives token 0 and NaN. Computed in fp64.
    """
    z = capped(logits.double(), softcap) * inv_temperature
    can_draw = (z < math.inf).all(dim=-1) & (z > -math.inf).any(dim=-1)
    z = torch.where(can_draw[:, None], z, 0.0)
    uniform = random_uniform(int(seed), sample_id, position)
    weight = (z - z.amax(dim=-1, keepdim=True)).exp()
    cumulative = weight.cumsum(dim=-1)
    goal = uniform[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, goal, right=True)[:, 0]
    logp, lse, h = token_logprob(z, token, entropy=entropy)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return Sampled(
        torch.where(can_draw, token, 0),
        torch.where(can_draw, logp, math.nan).to(dtype),
        torch.where(can_draw, lse, math.nan).to(dtype),
        None if h is None else torch.where(can_draw, h, math.nan).to(dtype),
    )


_MASK_32 = 0xFFFFFFFF


def philox4x32_10(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Four counter words and two key words -> four random words, each in int64 in [0, 2^32).

    Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product of two 32-bit words wraps in int64, which leaves its 64 bits right.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (p1 >> 32 & _MASK_32) ^ c1 ^ k0,
            p1 & _MASK_32,
            (p0 >> 32 & _MASK_32) ^ c3 ^ k1,
            p0 & _MASK_32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK_32, (k1 + 0xBB67AE85) & _MASK_32
    return [c0, c1, c2, c3]


def random_uniform(seed: int, sample_id: Tensor, position: Tensor) -> Tensor:
    """``(N,)``, ``(N,)`` -> ``(N,)`` fp64 in (0, 1), an odd multiple of 2^-53: fdpg/random.h."""
    counter = [word >> shift & _MASK_32 for word in (sample_id, position) for shift in (0, 32)]
    w0, w1, _, _ = philox4x32_10(counter, (seed & _MASK_32, seed >> 32 & _MASK_32))
    bits = w0 << 20 | w1 >> 12  # the upper 52 of 64
    return (2 * bits + 1).double() * 2.0**-53
