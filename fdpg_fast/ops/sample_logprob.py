"""sample_logprob: draw a token and say its log-probability, in one read of the logits."""

from __future__ import annotations

from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor

from fdpg_fast import _build
from fdpg_fast.ops.token_logprob import require_one_device, result_dtype

__all__ = ["Sampled", "random_key", "sample_logprob"]

_build.load()


class Sampled(NamedTuple):
    """One drawn token per row.

    Attributes:
        token: ``[N]`` int64.
        logp: ``[N]`` its log-probability, nats.
        lse: ``[N]`` log-sum-exp of the (tempered) logits; NaN where no token could be drawn.
        entropy: ``[N]`` of the distribution, nats; None if it was not asked for.
    """

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
    """Draws from softmax(logits * inv_temperature), row by row.

    The random number of a row is a function of (seed, sample_id, position) alone, so a sample does
    not depend on the batch it is drawn in, nor on how many devices draw. Not differentiable: what
    is drawn has no gradient, and its log-prob is returned without one (for that, see
    :func:`token_logprob`).

    Args:
        logits: ``[N, V]`` fp32, bf16, fp16 or fp64, contiguous along the vocabulary.
        seed: an int (see :func:`random_key`), or ``[1]`` int64 on the device of the logits.
        sample_id: ``[N]`` int64, which sample a row belongs to.
        position: ``[N]`` int64, how many tokens of that sample have been drawn.
        inv_temperature: 1 / temperature, in [1e-18, 1e18] unless logits are fp64.
        softcap: softcap tanh(logits / softcap) takes the place of the logits, as for
            :func:`token_logprob`. None or 0 for no bound.
        entropy: whether to return the entropy too.

    Returns:
        token, logp, lse and entropy. A row that holds NaN or +inf, or is -inf throughout, gives
        token 0 and NaN for the rest: nothing on a device can raise, so look at ``lse``. (With a
        softcap infinity is a bounded logit like others.)

    Raises:
        RuntimeError: a shape, dtype, device or stride that the op cannot take.
        TypeError: a seed that is neither an int nor a tensor.
    """
    if not isinstance(seed, Tensor):
        if not isinstance(seed, SupportsIndex):  # torch would drop the fraction of a float
            raise TypeError(
                "sample_logprob: `seed` must be an int, or a [1] int64 tensor, got "
                f"{type(seed).__name__} {seed!r}"
            )
        seed = torch.full((1,), int(seed), dtype=torch.int64, device=logits.device)
    token, logp, lse, ent = _OP(
        logits.detach(), seed, sample_id, position, inv_temperature, softcap or 0.0, entropy
    )
    return Sampled(token, logp, lse, ent if entropy else None)


_OP = torch.ops.fdpg.sample_logprob.default


@torch.library.register_fake("fdpg::sample_logprob")
def _fake(
    logits: Tensor,
    seed: Tensor,
    sample_id: Tensor,
    position: Tensor,
    inv_temperature: float = 1.0,
    softcap: float = 0.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require_one_device(
        "sample_logprob", logits=logits, seed=seed, sample_id=sample_id, position=position
    )
    rows, dtype = logits.shape[0], result_dtype(logits.dtype)
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows if entropy else 0, dtype=dtype),
    )


def random_key(seed: int, step: int, stream: int = 0) -> int:
    """One int64 for ``seed`` of :func:`sample_logprob` from a run's seed, the step and a purpose.

    Args:
        seed: of the run, any int.
        step: of the run, >= 0.
        stream: what the samples are for (training, evaluation, fitting): equal steps of different
            streams draw different numbers.

    Returns:
        A signed 64-bit int; the same arguments always give the same one.

    Raises:
        ValueError: ``step`` is negative.
    """
    if step < 0:
        raise ValueError(f"random_key: `step` must be at least 0, got {step}")
    key = 0
    for word in (seed, step, stream):
        key = _mix((key ^ (word & _MASK)) + 0x9E3779B97F4A7C15)
    return key - (1 << 64) if key >> 63 else key


_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
