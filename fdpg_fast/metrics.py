"""What is measured of samples: divergences to the target, moments, entropy, diversity, gaps.

Everything is an estimate over samples x ~ q, and comes with its standard error (``..._se``) where
it has one. Samples speak for the policy pi with the weight pi/q (which is 1 on policy), and for the
target p with the weight p/q. Estimates are made within each prompt and averaged over the prompts,
so prompts count alike; standard errors are those for the prompts given, not for other prompts one
might have asked (with a single sample per prompt there is no telling the two apart, and the spread
over prompts is used). Prompts whose Z is still zero have no target yet: they are left out, and
counted.

Measures return flat dicts of names and 0-d tensors on the device, without asking it anything;
those of texts (:func:`measure_texts`) return floats, and are for evaluation, not for every step.

Legend: B samples, G prompts, S sampled tokens.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fdpg_fast import ops
from fdpg_fast.divergences import Divergence
from fdpg_fast.rollout import Rollout
from fdpg_fast.targets import Scores

__all__ = [
    "PAPER",
    "Mean",
    "distinct_n",
    "divergence_estimates",
    "implausible",
    "log_mean_exp",
    "logprob_gap",
    "measure",
    "measure_target",
    "measure_texts",
    "pass_at_k",
    "pass_at_powers",
    "runaway",
    "self_bleu",
    "with_plug_ins",
]

PAPER = tuple(Divergence.parse(name) for name in ("kl", "reverse_kl", "tv", "js"))
"""The four divergences that f-DPG reports (arXiv 2302.08215, section 4)."""

Measures = dict[str, Tensor]


class Mean:
    """Means over samples, prompt by prompt, and then over prompts.

    Args:
        prompt: ``(B,)`` int64, 0..G-1.
        prompts: G.
        log_weight: ``(B,)`` fp64: samples of q stand for another distribution p (or pi), by
            self-normalised weights p/q. By default each counts alike.
        use: ``(G,)`` bool, which prompts count; by default those with a sample of weight above 0.
        replicas: the B samples are this many equally long runs, drawn with the same random numbers
            from different models: the standard error takes what one draw gave as one.

    Attributes:
        use: ``(G,)`` bool.
        ess: ``(G,)`` fp64, effective samples: (sum w)^2 / sum w^2.
    """

    def __init__(
        self,
        prompt: Tensor,
        prompts: int,
        log_weight: Tensor | None = None,
        use: Tensor | None = None,
        replicas: int = 1,
    ) -> None:
        # Sums over a (B, G) table in a fixed order, not atomic additions: two runs agree.
        self._member = prompt[:, None] == torch.arange(prompts, device=prompt.device)
        self._prompt = prompt
        self._count = self._member.sum(0)
        self._replicas = replicas
        if log_weight is None:
            log_weight = torch.zeros_like(prompt, dtype=torch.float64)
        top = torch.where(self._member, log_weight[:, None], -math.inf).amax(0)
        self.use = top > -math.inf if use is None else use
        weight = (log_weight - torch.where(top > -math.inf, top, 0.0)[prompt]).exp()
        total = self._sum(weight)
        self.ess = torch.where(total > 0, total.square() / self._sum(weight.square()), 0.0)
        # With mean 1 within each prompt.
        self._weight = weight * (self._count / total)[prompt]

    def __call__(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of ``(B,)`` values and its standard error; NaN where no prompt counts."""
        means = self.of_prompts(values)
        # What a sample adds to the error of its prompt's mean (delta method for a ratio).
        residual = self._weighted(values - means[self._prompt])
        of_draws = residual.view(self._replicas, -1).mean(0)
        draws = self._count / self._replicas
        variances = self._sum(of_draws.square()) / (draws - 1) / draws
        prompts = self.use.sum()
        mean = torch.where(self.use, means, 0.0).sum() / prompts
        within = torch.where(self.use, variances, 0.0).sum() / prompts**2
        spread = torch.where(self.use, (means - mean).square(), 0.0).sum()
        between = spread / (prompts - 1) / prompts
        single = (self.use & (draws < 2)).any()
        return mean, torch.where(single, between, within).sqrt()

    def of_prompts(self, values: Tensor) -> Tensor:
        """``(G,)``: the mean within each prompt."""
        return self._sum(self._weighted(values)) / self._count

    def _weighted(self, values: Tensor) -> Tensor:
        # A weight of 0 silences what may be infinite: log P off the support, say.
        return torch.where(self._weight > 0, self._weight * values, 0.0)

    def _sum(self, values: Tensor) -> Tensor:
        return torch.where(self._member[: len(values)], values[:, None], 0.0).sum(0)


def log_mean_exp(values: Tensor, prompt: Tensor, prompts: int) -> Tensor:
    """``(G,)`` fp64: log of the mean of exp(values) within each prompt, however large they are.

    Args:
        values: ``(B,)`` fp64.
        prompt: ``(B,)`` int64, 0..G-1.
        prompts: G.
    """
    state = ops.new_log_partition(prompts, values.device)
    ops.log_partition_(state, values, prompt)
    return state[:, 0] - state[:, 2].log()


# ------------------------------------------------------------------------------------------------
# Of log-probs


def divergence_estimates(
    log_pi: Tensor,
    log_q: Tensor,
    log_score: Tensor,
    log_z: Tensor,
    prompt: Tensor,
    which: Sequence[Divergence] = PAPER,
) -> Measures:
    """D_f(pi || p) for each f, all on the same samples of q, in nats for the KL family.

    With terms that are never negative (``ops.fdiv_terms``). Infinite where f'(inf) is and a sample
    is off the target's support: reverse_kl to a pointwise target. NaN where no sample is on it:
    all terms are alike then, and their mean would look certain.

    Args:
        log_pi, log_q, log_score: ``(B,)`` fp64.
        log_z: ``(G,)`` fp64.
        prompt: ``(B,)`` int64, 0..G-1.
        which: the divergences.

    Returns:
        ``{kl, kl_se, ..., prompts_skipped}``, named by ``str(divergence)``.
    """
    has_target = log_z > -math.inf
    mean = Mean(prompt, len(log_z), use=has_target)
    known = (log_score > -math.inf).any()
    measures: Measures = {}
    for divergence in which:
        terms = ops.fdiv_terms(log_pi, log_q, log_score, log_z, prompt, divergence=divergence)
        value, error = mean(terms)
        value = value.where(known | value.isinf(), math.nan)
        measures |= _named(str(divergence), (value, error.where(known, math.nan)))
    measures["prompts_skipped"] = (~has_target).sum()
    return measures


def with_plug_ins(
    terms: Callable[..., Tensor], excesses: Sequence[Tensor], mean: Mean, prompt: Tensor
) -> Tensor:
    """Terms whose standard error also holds that of constants estimated from the same samples.

    A constant is the log of a mean of weights over each prompt. To first order a sample moves it by
    its excess, weight / mean - 1, and the estimate by that times the slope. Excesses sum to zero,
    so the mean stays as it is.

    Args:
        terms: given an amount to add to each log, ``(B,)`` fp64.
        excesses: one ``(B,)`` fp64 for each of them.
        mean: over the samples.
        prompt: ``(B,)`` int64.
    """
    nudge = 1e-4
    total = terms(*[0.0] * len(excesses))
    for at, excess in enumerate(excesses):
        up, down = ([sign * nudge * (i == at) for i in range(len(excesses))] for sign in (1, -1))
        slopes = ((terms(*up) - terms(*down)) / (2 * nudge)).nan_to_num(0.0)
        total = total + mean.of_prompts(slopes)[prompt] * excess
    return total


def measure(
    rollout: Rollout,
    scores: Scores,
    log_pi: Tensor,
    log_z: Tensor,
    log_z_se: Tensor,
    *,
    token_entropy: Tensor | None = None,
) -> Measures:
    """All there is to say of the policy pi from samples of q and what the target says of them.

    Args:
        rollout: x ~ q.
        scores: of the target.
        log_pi: ``(B,)`` fp64.
        log_z, log_z_se: ``(G,)`` fp64, of the rollout's prompts.
        token_entropy: ``(B, S)``, the entropy of pi at each sampled position, 0 past the length.
            If given, the entropy is the mean of its sums, which varies less than that of -log pi.

    Returns:
        ``kl reverse_kl tv js`` to the target and ``kl_to_base`` = KL(pi || a), each with ``_se``;
        ``kl_target_base`` = KL(p || a), where the target itself is (exactly -log Z for conditions);
        ``off_support``, the share of pi that the target forbids (with ``_se``);
        ``log_z`` (with ``_se``); ``moment: NAME`` and ``moment_se: NAME`` of every feature under
        pi; ``entropy`` per sample and ``entropy_per_token`` (with ``_se``); ``base_perplexity``,
        exp of the base's surprise per token; ``length`` in tokens; the share ``finished`` by itself
        (end-of-text token or stop function) and the share ``cut_off`` by length;
        ``prompts_skipped``.
    """
    prompt, prompts = rollout.prompt_index, len(rollout.prompts)
    log_ratio = log_pi - rollout.log_q
    under_pi = Mean(prompt, prompts, log_ratio)
    # Not self-normalised: unbiased, and so a value below zero means something (see implausible).
    plain = Mean(prompt, prompts)
    measures = divergence_estimates(log_pi, rollout.log_q, scores.log_score, log_z, prompt)
    measures |= _named("kl_to_base", plain(log_ratio.exp() * (log_pi - scores.log_base)))
    measures["kl_target_base"] = _kl_target_base(rollout, scores, log_z)
    outside = (scores.log_score == -math.inf).double()
    measures |= _named("off_support", under_pi(outside))
    has_target = log_z > -math.inf
    measures["log_z"] = torch.where(has_target, log_z, 0.0).sum() / has_target.sum()
    variance = torch.where(has_target, log_z_se.square(), 0.0).sum()
    measures["log_z_se"] = variance.sqrt() / has_target.sum()
    surprise = -log_pi if token_entropy is None else token_entropy.double().sum(-1)
    return measures | _under(under_pi, rollout, scores, surprise)


def measure_target(
    rollout: Rollout, scores: Scores, log_z: Tensor, *, replicas: int = 1
) -> Measures:
    """The same of the target p itself, from the same samples by self-normalised weights p/q.

    Only as good as ``ess``, the effective number of samples (summed over prompts). ``replicas`` as
    for :class:`Mean`. Standard errors take ``log_z`` for certain.

    Returns:
        ``kl_to_base``, ``moment: NAME``, ``moment_se: NAME``, ``entropy``, ``entropy_per_token``,
        ``base_perplexity``, ``length``, ``finished``, ``cut_off`` as :func:`measure`, and ``ess``.
    """
    under_p = _under_target(rollout, scores, replicas)
    surprise = log_z[rollout.prompt_index] - scores.log_score
    return {
        "kl_to_base": _kl_target_base(rollout, scores, log_z),
        **_under(under_p, rollout, scores, surprise),
        "ess": under_p.ess.sum(),
    }


def pass_at_k(passed: Tensor, prompt: Tensor, prompts: int, k: int) -> tuple[Tensor, Tensor]:
    """The chance that at least one of k samples passes, mean over prompts, and its standard error.

    Of n samples of a prompt, c passed: 1 - C(n - c, k) / C(n, k), which is unbiased for any k <= n
    (Chen et al., arXiv 2107.03374, equation 1), as the product of 1 - k/i over i = n-c+1..n. The
    error is the jackknife's: exact for k = 1, a little large above, NaN for k = n, where there is
    no telling.

    Args:
        passed: ``(B,)`` of 0 and 1, any dtype.
        prompt: ``(B,)`` int64, 0..G-1.
        prompts: G; each must have k samples.
        k: at least 1.

    Returns:
        Two 0-d fp64 tensors.
    """
    member = prompt[:, None] == torch.arange(prompts, device=prompt.device)
    count = member.sum(0)
    right = (member & (passed[:, None] > 0)).sum(0)

    def estimate(n: Tensor, c: Tensor) -> Tensor:
        i = torch.arange(1, int(count.max()) + 1, device=prompt.device).double()[:, None]
        # Fewer than k failed: the product has the factor 1 - k/k.
        factors = torch.where((i > n - c) & (i <= n), (-k / i).clamp(min=-1.0), 0.0)
        return -torch.expm1(torch.log1p(factors).sum(0))

    # One sample left out is one that passed, c times, or one that failed, n - c times.
    change = estimate(count - 1, right - 1) - estimate(count - 1, right)
    share = right / count
    variances = torch.where(
        (right > 0) & (right < count), (count - 1) * share * (1 - share) * change.square(), 0.0
    )
    variance = torch.where(count > k, variances, torch.nan).sum() / prompts**2
    return estimate(count, right).mean(), variance.sqrt()


def pass_at_powers(rollout: Rollout, scores: Scores, verdicts: Sequence[str]) -> Measures:
    """:func:`pass_at_k` of an on-policy rollout for k = 1, 4, 16, ... as far as samples go.

    Args:
        rollout: x ~ pi.
        scores: of the target.
        verdicts: names of features that are 0 or 1, as ``Target.verdicts``.

    Returns:
        ``pass@1: NAME``, ``pass@1_se: NAME``, ...; nothing for a single prompt, or with a single
        sample of each, where it says no more than the moment.
    """
    prompts = len(rollout.prompts)
    each = len(rollout) // prompts
    if prompts < 2 or each < 2:
        return {}
    measures: Measures = {}
    for name in verdicts:
        for k in (4**power for power in range(16) if 4**power <= each):
            value, error = pass_at_k(scores.features[name], rollout.prompt_index, prompts, k)
            measures[f"pass@{k}: {name}"] = value
            if k < each:
                measures[f"pass@{k}_se: {name}"] = error
    return measures


def logprob_gap(token_logprob: Tensor, rollout: Rollout) -> Measures:
    """How far the trainer's log-probs of the sampled tokens are from the sampler's, in nats.

    Args:
        token_logprob: ``(B, S)`` fp32, of the trainer, under the same weights; NaN where it was
            not computed (samples of weight 0).

    Returns:
        ``gap_mean``, ``gap_p99``, ``gap_max`` of the absolute difference per token, and
        ``gap_sequence_mean``, ``gap_sequence_p99``, ``gap_sequence_max`` of whole samples.
    """
    gap = token_logprob.double() - rollout.token_logprob.double()
    steps = torch.arange(gap.shape[1], device=gap.device)
    sampled = (steps < rollout.lengths[:, None]) & ~gap.isnan()
    gap = torch.where(sampled, gap, 0.0)
    return {
        **_spread("gap", gap.abs().flatten(), sampled.flatten()),
        **_spread("gap_sequence", gap.sum(1).abs(), sampled.any(1)),
    }


def _spread(name: str, sizes: Tensor, use: Tensor) -> Measures:
    """Mean, 99th percentile and maximum of the sizes to ``use``, NaN if there are none."""
    count = use.sum()
    # What is left out sorts first, as no size is negative; the p99 is counted from the top end.
    ordered = torch.where(use, sizes, -1.0).sort().values
    ordered = torch.where(ordered < 0, torch.nan, ordered)
    above = (count * 0.01).floor().long()
    return {
        f"{name}_mean": torch.where(use, sizes, 0.0).sum() / count,
        f"{name}_p99": ordered.gather(0, (len(ordered) - 1 - above)[None])[0],
        f"{name}_max": ordered[-1],
    }


def _named(name: str, estimate: tuple[Tensor, Tensor]) -> Measures:
    return {name: estimate[0], f"{name}_se": estimate[1]}


def _under(mean: Mean, rollout: Rollout, scores: Scores, surprise: Tensor) -> Measures:
    """What is measured alike of any distribution that ``mean`` stands for."""
    measures: Measures = {}
    for name, values in scores.features.items():
        measures[f"moment: {name}"], measures[f"moment_se: {name}"] = mean(values)
    finished, _ = mean(rollout.finished.double())
    measures |= _named("entropy", mean(surprise))
    measures |= _named("entropy_per_token", _per_token(mean, rollout, surprise))
    base_surprise, error = _per_token(mean, rollout, -scores.log_base)
    measures |= _named("base_perplexity", (base_surprise.exp(), base_surprise.exp() * error))
    measures |= _named("length", mean(rollout.lengths.double()))
    return measures | {"finished": finished, "cut_off": 1 - finished}


def _per_token(mean: Mean, rollout: Rollout, values: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of what samples sum to over the mean of their lengths, and its standard error."""
    length, _ = mean(rollout.lengths.double())
    ratio = mean(values)[0] / length
    return ratio, mean(values - ratio * rollout.lengths)[1] / length


def _under_target(rollout: Rollout, scores: Scores, replicas: int = 1) -> Mean:
    log_weight = scores.log_score - rollout.log_q
    return Mean(rollout.prompt_index, len(rollout.prompts), log_weight, replicas=replicas)


def _kl_target_base(rollout: Rollout, scores: Scores, log_z: Tensor) -> Tensor:
    """KL(p || a) = E_p[log P/a] - log Z, mean over the prompts that have a sample of p."""
    under_p = _under_target(rollout, scores)
    excess = under_p.of_prompts(scores.log_score - scores.log_base) - log_z
    return torch.where(under_p.use, excess, 0.0).sum() / under_p.use.sum()


# ------------------------------------------------------------------------------------------------
# Of texts, for evaluation


def measure_texts(texts: Sequence[str], seed: int = 0) -> dict[str, float]:
    """``distinct_1..3`` over all texts, and ``self_bleu`` of a sampled subset."""
    return {
        **{f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)},
        "self_bleu": self_bleu(texts, seed=seed),
    }


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words / all n-grams, over all texts together (Li et al., 1510.03055).

    It falls as texts are added: compare only equal numbers of texts. NaN without an n-gram.
    """
    grams: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        grams.update(zip(*(words[i:] for i in range(n)), strict=False))
    return len(grams) / grams.total() if grams else math.nan


def self_bleu(texts: Sequence[str], *, most: int = 64, seed: int = 0) -> float:
    """Mean BLEU-4 of a text against all others, 0 to 1; high means alike (Zhu et al., 1802.01886).

    By sacrebleu (smoothed, effective order). Quadratic in the number of texts, so at most ``most``
    are taken, at random. NaN with fewer than two texts that have words.
    """
    from sacrebleu import BLEU  # an import of 0.3 s that training does not need

    texts = [text for text in texts if text.strip()]
    if len(texts) > most:
        texts = random.Random(seed).sample(texts, most)
    if len(texts) < 2:
        return math.nan
    bleu = BLEU(effective_order=True)
    scores = [
        bleu.sentence_score(text, [*texts[:i], *texts[i + 1 :]]).score
        for i, text in enumerate(texts)
    ]
    return sum(scores) / len(scores) / 100


# ------------------------------------------------------------------------------------------------
# What should not be


def implausible(record: Mapping[str, float]) -> str | None:
    """Why a record's KL(pi || a) cannot be: the estimate is unbiased, a KL is never negative."""
    kl, error = record["kl_to_base"], record["kl_to_base_se"]
    if not kl < -3 * error - 1e-6:
        return None
    return (
        f"KL to the base is {kl:.3g} ± {error:.2g} nats, but a KL is never negative: log pi and "
        "log a are not of the same samples in the same way. Likely causes: sampler and trainer "
        "disagree (see gap_mean), the base was changed by training, padding or end-of-text is "
        "handled differently, or samples are not drawn at temperature 1 without truncation"
    )


def runaway(record: Mapping[str, float], *, factor: float = 2.0, slack: float = 5.0) -> str | None:
    """Why a record's KL(pi || a) is too far from the target's own KL(p || a).

    For a target of conditions that is exactly -log Z: a policy that has reached it is there. Beyond
    ``factor`` times it and ``slack`` nats, the policy is leaving the language, not nearing p.
    """
    kl, target = record["kl_to_base"], record["kl_target_base"]
    if not (math.isfinite(target) and kl > factor * max(target, 0.0) + slack):
        return None
    return (
        f"KL to the base is {kl:.1f} nats and running away: the target itself is at {target:.1f}. "
        "The policy is leaving the language that it started from. Likely cause: a learning rate "
        "too high (try a tenth of it), or too few samples per step"
    )
