"""A wrong argument is named: which op, which argument, what was expected, what came."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fdpg_fast import ops
from fdpg_fast.baselines import Baseline
from fdpg_fast.divergences import Divergence

N, V, D, B, T, G = 3, 5, 4, 4, 6, 2

F64 = torch.float64
Call = Callable[[], Any]
CUSTOM = Divergence.custom(torch.tanh, name="tanh", f_prime_inf=1.0)


def logits(*shape: int) -> Tensor:
    return torch.zeros(*(shape or (N, V)))


def ids(*values: int) -> Tensor:
    return torch.tensor(values)


def target() -> Tensor:
    return ids(0, 1, 4)


def fdiv(**changes: Any) -> ops.Weights:
    arguments: dict[str, Any] = {
        "log_pi": torch.zeros(B, dtype=F64),
        "log_q": torch.zeros(B, dtype=F64),
        "log_score": torch.zeros(B, dtype=F64),
        "log_z": torch.zeros(G, dtype=F64),
        "prompt": ids(0, 0, 1, 1),
        "divergence": Divergence.parse("js"),
        "baseline": Baseline.parse("loo"),
    } | changes
    return ops.fdiv_weights(**arguments)


def terms(**changes: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "log_pi": torch.zeros(B, dtype=F64),
        "log_q": torch.zeros(B, dtype=F64),
        "log_score": torch.zeros(B, dtype=F64),
        "log_z": torch.zeros(G, dtype=F64),
        "prompt": ids(0, 0, 1, 1),
        "divergence": Divergence.parse("js"),
    } | changes
    return ops.fdiv_terms(**arguments)


def head(**changes: Any) -> ops.TokenLogprob:
    arguments = {"hidden": torch.zeros(N, D), "weight": torch.zeros(V, D), "target": target()}
    return ops.linear_logprob(**(arguments | changes))


def numerators(**changes: Any) -> tuple[Tensor, Tensor, Tensor]:
    arguments = {
        "logits": logits(),
        "numerators": None,
        "target": target(),
        "coefficient": torch.ones(N),
        "lse_hint": None,
        "inv_temperature": 1.0,
        "mask": None,
    }
    return torch.ops.fdpg.token_logprob_numerators_(*(arguments | changes).values())


def linear_numerators(**changes: Any) -> tuple[Tensor, Tensor, Tensor]:
    arguments = {
        "numerators": torch.zeros(N, V),
        "hidden": torch.zeros(N, D),
        "weight": torch.zeros(V, D),
        "bias": None,
        "target": target(),
        "coefficient": torch.ones(N),
        "lse_hint": None,
        "scale": 1.0,
        "inv_temperature": 1.0,
        "softcap": 0.0,
        "may_round": False,
    }
    return torch.ops.fdpg.linear_numerators_(*(arguments | changes).values())


def sample(**changes: Any) -> ops.Sampled:
    arguments = {"logits": logits(), "seed": 1, "sample_id": ids(0, 1, 2), "position": ids(0, 0, 0)}
    return ops.sample_logprob(**(arguments | changes))


def partition(**changes: Any) -> None:
    arguments = {
        "state": ops.new_log_partition(G),
        "log_weight": torch.zeros(B, dtype=F64),
        "prompt": ids(0, 0, 1, 1),
    }
    ops.log_partition_(**(arguments | changes))


def backward_inplace(z: Tensor) -> None:
    ops.token_logprob(z, target(), inplace_backward=True)


MESSAGES: list[tuple[Call, str]] = [
    # token_logprob
    (
        lambda: ops.token_logprob(logits(), ids(0, 20000, -1)),
        "token_logprob: `target` must be in [0, 5), got 20000 at row 1",
    ),
    (
        lambda: ops.token_logprob(logits(), ids(0, 1)),
        "token_logprob: `target` must have the shape of `logits` without its last dimension, [3], "
        "got [2]",
    ),
    (
        lambda: ops.token_logprob(logits(), target().int()),
        "token_logprob: `target` must be int64, got int32",
    ),
    (
        lambda: ops.token_logprob(logits().long(), target()),
        "token_logprob: `logits` must be float32 or bfloat16 or float16 or float64, got int64",
    ),
    (
        lambda: ops.token_logprob(logits(V, N).t(), target()),
        "token_logprob: `logits` must be contiguous along vocab, got strides [1, 3]",
    ),
    (
        lambda: ops.token_logprob(logits(1, V).expand(N, V), target()),
        "token_logprob: `logits` has rows that overlap, got strides [0, 1]",
    ),
    (
        lambda: ops.token_logprob(logits(N, 0), target()),
        "token_logprob: `logits` has an empty vocabulary, got shape [3, 0]",
    ),
    (
        lambda: ops.token_logprob(logits(), target(), mask=torch.ones(2, dtype=torch.bool)),
        "token_logprob: `mask` must have shape [3], got [2]",
    ),
    (
        lambda: ops.token_logprob(logits(), target(), mask=torch.ones(3)),
        "token_logprob: `mask` must be bool, got float32",
    ),
    (
        lambda: ops.token_logprob(logits(), target().to("meta")),
        "token_logprob: `target` must be on the device of `logits` (cpu), got meta",
    ),
    (
        lambda: backward_inplace(logits().requires_grad_()),
        "token_logprob: `logits` must be a contiguous intermediate result for inplace_backward, "
        "got a leaf",
    ),
    (
        lambda: backward_inplace((logits(N, 2 * V).requires_grad_() + 1)[:, :V]),
        "for inplace_backward, got strides [10, 1]. Leave inplace_backward off",
    ),
    (
        lambda: torch.ops.fdpg.token_logprob_backward(
            *(logits(), target(), torch.zeros(N, dtype=F64), None),
            *(None, None, torch.zeros(N), 1.0, None),
        ),
        "token_logprob_backward: `entropy` must be given with `grad_entropy`, got None",
    ),
    (
        lambda: torch.ops.fdpg.token_logprob_backward(
            *(logits(), target(), torch.zeros(N), None, None, None, None, 1.0, None)
        ),
        "token_logprob_backward: `lse_exact` must be float64, got float32",
    ),
    (
        lambda: torch.ops.fdpg.token_logprob_backward_(
            *(logits(), ids(0, 1, 5), torch.zeros(N, dtype=F64), None, torch.ones(N)),
            *(None, None, 1.0, None),
        ),
        "token_logprob_backward_: `target` must be in [0, 5), got 5 at row 2",
    ),
    # sample_logprob
    (
        lambda: sample(sample_id=ids(0, 1)),
        "sample_logprob: `sample_id` must have shape [3], got [2]",
    ),
    (
        lambda: sample(position=torch.zeros(3)),
        "sample_logprob: `position` must be int64, got float32",
    ),
    (
        lambda: sample(seed=ids(1, 2)),
        "sample_logprob: `seed` must have shape [1], got [2]",
    ),
    (
        lambda: sample(logits=logits(V)),
        "sample_logprob: `logits` must be a matrix [N, V], got shape [5]",
    ),
    # sequence_logprob
    (
        lambda: ops.sequence_logprob(torch.zeros(2, T), ids(6, 7)),
        "sequence_logprob: `lengths` must be in [0, 6], got 7 at sequence 1",
    ),
    (
        lambda: ops.sequence_logprob(torch.zeros(2, T).half(), ids(1, 1)),
        "sequence_logprob: `values` must be float32 or float64, got float16",
    ),
    (
        lambda: ops.sequence_logprob(torch.zeros(T), ids(1)),
        "sequence_logprob: `values` must have 2 dimensions, got shape [6]",
    ),
    (
        lambda: ops.sequence_logprob(torch.zeros(T, 2).t(), ids(1, 1)),
        "sequence_logprob: `values` must be contiguous along tokens, got strides [1, 2]",
    ),
    # log_partition_
    (
        lambda: partition(prompt=ids(0, 0, 1, 2)),
        "log_partition_: `prompt` must be in [0, 2), got 2 at sample 3",
    ),
    (
        lambda: partition(state=torch.zeros(G, 2, dtype=F64)),
        "log_partition_: `state` must have shape [2, 3], got [2, 2]",
    ),
    (
        lambda: partition(state=torch.zeros(3, G, dtype=F64).t()),
        "log_partition_: `state` is written in place and must be contiguous, got strides [1, 2]",
    ),
    (
        lambda: partition(log_weight=torch.zeros(B)),
        "log_partition_: `log_weight` must be float64, got float32",
    ),
    # fdiv_weights, fdiv_terms
    (
        lambda: fdiv(log_q=torch.zeros(B)),
        "fdiv_weights: `log_q` must be float64, got float32",
    ),
    (
        lambda: fdiv(log_score=torch.zeros(B + 1, dtype=F64)),
        "fdiv_weights: `log_score` must have shape [4], got [5]",
    ),
    (
        lambda: fdiv(prompt=ids(0, 1, 0, 1)),
        "fdiv_weights: `prompt` must not decrease (samples are grouped by prompt), got 0 at "
        "sample 2 after 1",
    ),
    (
        lambda: fdiv(prompt=ids(0, 0, 0, 9)),
        "fdiv_weights: `prompt` must be in [0, 2), got 9 at sample 3",
    ),
    (
        lambda: fdiv(baseline=Baseline.parse("ema")),
        "fdiv_weights: `baseline_state` must be given for the baseline ema, got None",
    ),
    (
        lambda: fdiv(baseline=Baseline.parse("analytic")),
        "fdiv_weights: the baseline analytic is not exact for the divergence js. Use loo",
    ),
    (
        lambda: fdiv(ratio_clip=-1.0),
        "fdiv_weights: `ratio_clip` must be at least 0, got -1",
    ),
    (
        lambda: fdiv(reward_clip=math.nan),
        "fdiv_weights: `reward_clip` must be at least 0, got nan",
    ),
    (
        lambda: torch.ops.fdpg.fdiv_terms(
            *(torch.zeros(1, dtype=F64),) * 3, torch.zeros(1, dtype=F64), ids(0), 99, 0.0
        ),
        "fdiv_terms: `divergence` must be in [0,",
    ),
    (
        lambda: torch.ops.fdpg.fdiv_terms(
            *(torch.zeros(1, dtype=F64),) * 3,
            *(torch.zeros(1, dtype=F64), ids(0), Divergence.parse("js_w").id, 1.5),
        ),
        "fdiv_terms: `divergence_param` of js_w must lie in (0, 1), got 1.5",
    ),
    (
        lambda: terms(prompt=ids(0, 0, 1, -1)),
        "fdiv_terms: `prompt` must be in [0, 2), got -1 at sample 3",
    ),
    # linear_logprob
    (
        lambda: head(target=ids(0, 1, 5)),
        "linear_logprob: `target` must be in [0, 5), got 5 at row 2",
    ),
    (
        lambda: head(weight=torch.zeros(V, D + 1)),
        "linear_logprob: `weight` must have shape [V, 4], got [5, 5]",
    ),
    (
        lambda: head(hidden=torch.zeros(N, 1, D)),
        "linear_logprob: `hidden` must be a matrix, got shape [3, 1, 4]",
    ),
    (
        lambda: head(hidden=torch.zeros(N, D).long()),
        "linear_logprob: `hidden` must be floating point, got torch.int64",
    ),
    (
        lambda: head(target=ids(0, 1)),
        "linear_logprob: `target` must have shape [3], got [2]",
    ),
    (
        lambda: head(bias=torch.zeros(D)),
        "linear_logprob: `bias` must have shape [5], got [4]",
    ),
    (
        lambda: head(softcap=0.0),
        "linear_logprob: `softcap` must be positive and finite, or None for no bound, got 0.0",
    ),
    (lambda: head(softcap=math.inf), "linear_logprob: `softcap` must be positive and finite"),
    (
        lambda: head(softcap=1e-46),
        "linear_logprob: `softcap` must be in [1e-18, 1e+18] unless an input is fp64, got 1e-46",
    ),
    (
        lambda: head(inv_temperature=1e39),
        "linear_logprob: `inv_temperature` must be in [1e-18, 1e+18] unless an input is fp64, got "
        "1e+39",
    ),
    (
        lambda: head(weight=torch.zeros(0, D)),
        "linear_logprob: `weight` must have shape [V, 4] with V at least 1, got [0, 4]",
    ),
    (lambda: head(scale=math.nan), "linear_logprob: `scale` must be finite, got nan"),
    (
        lambda: head(inv_temperature=0.0),
        "linear_logprob: `inv_temperature` must be positive and finite, got 0.0",
    ),
    (
        lambda: head(target=target().int()),
        "linear_logprob: `target` must be torch.int64, got torch.int32",
    ),
    (
        lambda: head(mask=torch.ones(N)),
        "linear_logprob: `mask` must be torch.bool, got torch.float32",
    ),
    (lambda: head(chunk=0), "linear_logprob: `chunk` must be at least 1, got 0"),
    (
        lambda: head(weight=torch.zeros(V, D, device="meta")),
        "linear_logprob: `weight` must be on the device of `hidden` (cpu), got meta",
    ),
    # token_logprob_numerators_
    (
        lambda: numerators(logits=torch.zeros(N, V, dtype=torch.bfloat16)),
        "token_logprob_numerators_: `logits` must be float32 or float64, got bfloat16",
    ),
    (
        lambda: numerators(numerators=torch.zeros(N, V, dtype=F64)),
        "token_logprob_numerators_: `numerators` must be float32 or bfloat16 or float16, got "
        "float64",
    ),
    (
        lambda: numerators(numerators=torch.zeros(N, V + 1)),
        "token_logprob_numerators_: `numerators` must have shape [3, 5], got [3, 6]",
    ),
    (
        lambda: numerators(logits=(z := torch.zeros(N, V)), numerators=z),
        "token_logprob_numerators_: `numerators` must not begin where `logits` do",
    ),
    (
        lambda: numerators(target=ids(0, 1, 5)),
        "token_logprob_numerators_: `target` must be in [0, 5), got 5 at row 2",
    ),
    # linear_numerators_
    (
        lambda: linear_numerators(hidden=torch.zeros(N, D, dtype=torch.float16)),
        "linear_numerators_: `hidden` must be float32 or bfloat16 or float64, got float16",
    ),
    (
        lambda: linear_numerators(weight=torch.zeros(V, D + 1)),
        "linear_numerators_: `weight` must have shape [5, 4], got [5, 5]",
    ),
    (
        lambda: linear_numerators(numerators=torch.zeros(N, V, dtype=torch.bfloat16)),
        "linear_numerators_: `numerators` must be float32, got bfloat16",
    ),
    (
        lambda: linear_numerators(coefficient=None),
        "linear_numerators_: `coefficient` must be given with `numerators`, got None",
    ),
    (
        lambda: linear_numerators(target=ids(0, 1, 5)),
        "linear_numerators_: `target` must be in [0, 5), got 5 at row 2",
    ),
]


@pytest.mark.parametrize(("call", "message"), MESSAGES, ids=[m for _, m in MESSAGES])
def test_message(call: Call, message: str) -> None:
    with pytest.raises((ValueError, RuntimeError)) as caught:
        call()
    text = str(caught.value)
    assert message in text
    assert ".h:" not in text, "a path of the source is of no use to the caller"
    assert ".cpp" not in text


def test_the_first_of_several_bad_rows_is_named_whatever_the_threads() -> None:
    y = torch.zeros(4096, dtype=torch.int64)
    y[[100, 2000, 4000]] = torch.tensor([7, 8, 9])
    for _ in range(5):
        with pytest.raises(RuntimeError, match=r"got 7 at row 100$"):
            ops.token_logprob(torch.zeros(4096, 5), y)


def learnt(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype, requires_grad=True)


NO_GRADIENT: list[tuple[Call, str]] = [
    (
        lambda: ops.gelu_tanh(learnt(3)),
        "gelu_tanh: `x` must not require a gradient, of which gelu_tanh has none, got "
        "requires_grad=True. Use torch.nn.functional.gelu, or torch.no_grad()",
    ),
    (
        lambda: ops.decode_attention(
            torch.zeros(1, 2, 4), torch.zeros(1, 2, 3, 4), learnt(1, 2, 3, 4), ids(3)
        ),
        "decode_attention: `values` must not require a gradient",
    ),
    (
        lambda: ops.cache_append_(
            *torch.zeros(2, 1, 2, 3, 4), learnt(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), ids(0)
        ),
        "cache_append_: `new_keys` must not require a gradient",
    ),
    (
        lambda: terms(log_pi=learnt(B, dtype=F64)),
        "fdiv_terms: `log_pi` must not require a gradient",
    ),
    (
        lambda: terms(log_z=learnt(G, dtype=F64), divergence=CUSTOM),
        "fdiv_terms: `log_z` must not require a gradient",
    ),
]


@pytest.mark.parametrize(("call", "message"), NO_GRADIENT, ids=[m for _, m in NO_GRADIENT])
def test_a_gradient_that_there_is_not_is_refused(call: Call, message: str) -> None:
    with pytest.raises(NotImplementedError) as caught:
        call()
    assert message in str(caught.value)
    with torch.no_grad():
        call()


@pytest.mark.parametrize("divergence", [Divergence.parse("js"), CUSTOM])
def test_weights_and_statistics_are_detached(divergence: Divergence) -> None:
    found = fdiv(log_pi=learnt(B, dtype=F64), log_z=learnt(G, dtype=F64), divergence=divergence)
    assert not any(t.requires_grad for t in found)
    state = ops.new_log_partition(G)
    partition(state=state, log_weight=learnt(B, dtype=F64))
    assert not state.requires_grad


@pytest.mark.parametrize("op", ["token_logprob", "linear_logprob"])
def test_second_derivative_is_refused(op: str) -> None:
    """And not left out of a sum, whose value would be wrong."""
    x = torch.zeros(N, V, dtype=F64, requires_grad=True)
    further = (torch.eye(V, dtype=F64),) if op == "linear_logprob" else ()
    logp = getattr(ops, op)(x, *further, target()).logp.sum()
    (grad,) = torch.autograd.grad(logp, x, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{op}: second derivatives"):
        (logp + grad.square().sum()).backward()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fdiv(divergence="js"),
            "fdiv_weights: `divergence` must be a Divergence, got 'js'",
        ),
        (lambda: fdiv(baseline="loo"), "fdiv_weights: `baseline` must be a Baseline, got 'loo'"),
        (lambda: terms(divergence="js"), "fdiv_terms: `divergence` must be a Divergence, got 'js'"),
        (
            lambda: ops.sample_logprob(logits(), 0.5, ids(0, 1, 2), ids(0, 0, 0)),  # type: ignore[arg-type]
            "sample_logprob: `seed` must be an int, or a .* tensor, got float 0.5",
        ),
    ],
)
def test_a_wrong_type_is_refused(call: Call, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


FORWARD: dict[str, Callable[[Tensor], Any]] = {
    "token_logprob": lambda x: ops.token_logprob(x, target()).logp,
    "linear_logprob": lambda x: ops.linear_logprob(x, torch.eye(V, dtype=F64), target()).logp,
    "sequence_logprob": lambda x: ops.sequence_logprob(x, ids(1, 2, 3)),
    "fdiv_terms": lambda x: terms(log_pi=x.flatten()[:B]),
    "gelu_tanh": ops.gelu_tanh,
    "decode_attention": lambda x: ops.decode_attention(x[None], *CACHE, ids(2)),
    "cache_append_": lambda x: ops.cache_append_(*CACHE, *2 * [x[None, :, None]], ids(0)),
}
CACHE = torch.ones(2, 1, N, 2, V, dtype=F64)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of torch.func.jvp itself
@pytest.mark.parametrize("op", FORWARD)
@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_refused(op: str, grad: bool) -> None:
    """Torch would take the result for a constant, and its derivative for zero, in no_grad, too."""
    x = torch.randn(N, V, dtype=F64)
    message = f"{op}: .* has no forward-mode derivative"
    with torch.set_grad_enabled(grad):
        with pytest.raises(NotImplementedError, match=message):
            torch.func.jvp(FORWARD[op], (x,), (x,))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
            FORWARD[op](forward_ad.make_dual(x, x))
        with forward_ad.dual_level():  # of something else
            FORWARD[op](x)


def test_inplace_backward_twice_is_refused() -> None:
    leaf = torch.zeros(N, V, requires_grad=True)
    loss = ops.token_logprob(leaf * 2, target(), inplace_backward=True).logp.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
