"""The ops on a CUDA device: the same numbers as on the CPU, in stream order, in a graph.

What the kernels themselves do with ragged rows, padding and bad input is tested in tests/csrc/simt,
with and without a device; here it is torch's side: devices, streams, graphs, autograd, messages.
"""

from __future__ import annotations

import pytest
import torch
from divergence_cases import EVERY_BASELINE, EVERY_DIVERGENCE, batch
from torch import Tensor

from fdpg_fast import ops
from fdpg_fast.baselines import Baseline
from fdpg_fast.divergences import Divergence

pytestmark = pytest.mark.gpu

N, V = 9, 50257


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda")


def rows(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets and a mask on the CPU."""
    generator = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(N, V, generator=generator)
    mask = torch.arange(N) % 4 != 2
    return logits.to(dtype), torch.randint(V, (N,), generator=generator), mask


def token_logprob(logits: Tensor, target: Tensor, mask: Tensor, inplace: bool) -> list[Tensor]:
    """The three results, and the gradient of a sum that uses them all."""
    logits = logits.clone().requires_grad_()
    z = logits * 1  # not a leaf, so that its gradient may take its place
    out = ops.token_logprob(
        z, target, inv_temperature=0.8, mask=mask, entropy=True, inplace_backward=inplace
    )
    assert out.entropy is not None
    results = [out.logp.detach(), out.lse.detach(), out.entropy.detach()]
    (out.logp.sum() + 0.5 * out.lse.square().sum() + 0.25 * out.entropy.sum()).backward()
    assert logits.grad is not None
    return [*results, logits.grad]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_token_logprob_agrees_with_the_cpu(
    cuda: torch.device, dtype: torch.dtype, inplace: bool
) -> None:
    inputs = rows(dtype)
    expected = token_logprob(*inputs, inplace)
    got = token_logprob(*(t.to(cuda) for t in inputs), inplace)
    again = token_logprob(*(t.to(cuda) for t in inputs), inplace)
    for one, two, truth in zip(got, again, expected, strict=True):
        assert torch.equal(one, two)
        if truth.dtype in (torch.bfloat16, torch.float16):  # at most one rounding apart
            torch.testing.assert_close(one.cpu(), truth, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        else:
            torch.testing.assert_close(one.cpu(), truth, rtol=2e-6, atol=2e-5)


def test_a_target_out_of_range_is_nan(cuda: torch.device) -> None:
    logits, target, _ = rows()
    target[4] = V
    out = ops.token_logprob(logits.to(cuda), target.to(cuda), entropy=True)
    assert out.entropy is not None
    for result in (out.logp, out.lse, out.entropy):
        assert result.isnan().nonzero().flatten().tolist() == [4]


PAIRS = [(d, b) for d in EVERY_DIVERGENCE for b in EVERY_BASELINE if b != "analytic" or d == "kl"]


@pytest.mark.parametrize(("divergence", "baseline"), PAIRS)
def test_fdiv_weights_agrees_with_the_cpu(
    cuda: torch.device, divergence: str, baseline: str
) -> None:
    f, b = Divergence.parse(divergence), Baseline.parse(baseline)
    inputs = batch(1, [3, 1, 0, 7, 2, 611], zeros=0.2 if f.allows_zero_targets else 0.0)

    def run(device: torch.device | str) -> list[Tensor]:
        state = torch.tensor([0.3, 0.9], dtype=torch.float64, device=device)
        kept = state if b.keeps_state else None
        moved = (t.to(device) for t in inputs)
        out = ops.fdiv_weights(*moved, divergence=f, baseline=b, baseline_state=kept)
        return [out.weights.cpu(), out.statistics.cpu(), state.cpu()]

    for got, expected in zip(run(cuda), run("cpu"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10, equal_nan=True)


def test_samples_not_grouped_by_prompt_are_nan(cuda: torch.device) -> None:
    log_pi, log_q, log_score, log_z, prompt = (t.to(cuda) for t in batch(1, [3, 4]))
    out = ops.fdiv_weights(
        *(log_pi, log_q, log_score, log_z, prompt.flip(0)),
        divergence=Divergence.parse("js"),
        baseline=Baseline.parse("loo"),
    )
    assert out.weights.isnan().all()
    assert out.statistics.isnan().all()


def test_order_of_a_side_stream(cuda: torch.device) -> None:
    """The kernels follow the work of the current stream, not of the default one."""
    logits, target, mask = (t.to(cuda) for t in rows())
    expected = ops.token_logprob(2 * logits, target, mask=mask).logp
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # the next line is late
        doubled = 2 * logits
        got = ops.token_logprob(doubled, target, mask=mask).logp
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, expected)


def test_in_a_cuda_graph(cuda: torch.device) -> None:
    logits, target, mask = (t.to(cuda) for t in rows())
    weighing = [t.to(cuda) for t in batch(1, [30, 40])]
    state = torch.zeros(2, dtype=torch.float64, device=cuda)
    f, b = Divergence.parse("js"), Baseline.parse("ema(0.9)")

    def step() -> tuple[Tensor, Tensor]:
        out = ops.token_logprob(logits, target, mask=mask)
        weights = ops.fdiv_weights(*weighing, divergence=f, baseline=b, baseline_state=state)
        return out.logp, weights.weights

    expected = [t.clone() for t in step()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):  # nothing is left over from one replay to the next but the state
        state.zero_()
        graph.replay()
        for got, truth in zip(captured, expected, strict=True):
            assert torch.equal(got, truth)


def test_opcheck(cuda: torch.device) -> None:
    logits, target, mask = (t.to(cuda) for t in rows(torch.bfloat16))
    sample = (logits[:, :77], target % 77, 0.8, mask, True)
    torch.library.opcheck(torch.ops.fdpg.token_logprob.default, sample)
    inputs = tuple(t.to(cuda) for t in batch(1, [3, 4]))
    js_loo = (Divergence.parse("js").id, 0.0, Baseline.parse("loo").id, 0.0, None, 10.0, 10.0)
    torch.library.opcheck(torch.ops.fdpg.fdiv_weights.default, (*inputs, *js_loo))


def test_sample_logprob_agrees_with_the_cpu(cuda: torch.device) -> None:
    logits, _, _ = rows()
    ids, position = torch.arange(N), torch.arange(N) % 3
    expected = ops.sample_logprob(logits, 7, ids, position, inv_temperature=0.9)
    got = ops.sample_logprob(
        logits.to(cuda), 7, ids.to(cuda), position.to(cuda), inv_temperature=0.9
    )
    assert torch.equal(got.token.cpu(), expected.token)
    torch.testing.assert_close(got.logp.cpu(), expected.logp, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(got.lse.cpu(), expected.lse, rtol=1e-6, atol=2e-6)
    same = ops.token_logprob(logits.to(cuda), got.token, inv_temperature=0.9)
    # What was sampled is what is scored, to the last bit but one: sums of other parts of a row.
    torch.testing.assert_close(same.logp, got.logp, rtol=2e-7, atol=5e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decode_attention_agrees_with_the_cpu(cuda: torch.device, dtype: torch.dtype) -> None:
    query = torch.randn(6, 12, 64, dtype=dtype)
    keys, values = torch.randn(2, 6, 4, 90, 64, dtype=dtype)[..., :80, :]
    end, sinks = torch.tensor([0, 1, 17, 64, 79, 80]), torch.randn(12)
    of_sequences = {
        "begin": end // 3,
        "rows": torch.tensor([4, 4, 0, 5, 5, 5]),
        "bias": torch.randn(12, 80),
        "sinks": sinks,
    }
    expected = ops.decode_attention(query, keys, values, end, softcap=5.0, **of_sequences)
    moved = [t.to(cuda) for t in (query, keys, values, end)]
    there = {name: t.to(cuda) for name, t in of_sequences.items()}
    got = ops.decode_attention(*moved, softcap=5.0, **there)
    tolerance = {torch.float32: 5e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(got.cpu(), expected, rtol=tolerance, atol=tolerance)


def test_a_span_that_cannot_be_is_nan(cuda: torch.device) -> None:
    query, cache = torch.randn(2, 1, 8, device=cuda), torch.randn(2, 1, 5, 8, device=cuda)
    out = ops.decode_attention(query, cache, cache, torch.tensor([-1, 5], device=cuda))
    assert out.isnan().flatten(1).all(1).tolist() == [True, False]


def test_cache_append_agrees_with_the_cpu(cuda: torch.device) -> None:
    position, new = torch.tensor([3, 0, 7]), torch.randn(3, 2, 2, 40)
    caches = [torch.zeros(3, 2, 9, 40), torch.zeros(3, 2, 9, 24)]
    on_device = [t.to(cuda) for t in caches]
    ops.cache_append_(*caches, new, new[..., 3:27], position)
    moved = new.to(cuda)
    ops.cache_append_(*on_device, moved, moved[..., 3:27], position.to(cuda))
    for got, expected in zip(on_device, caches, strict=True):
        assert torch.equal(got.cpu(), expected)


def test_sequence_logprob_has_the_bits_of_the_cpu(cuda: torch.device) -> None:
    values = torch.randn(70, 45)[:, :40]
    lengths = torch.randint(41, (70,))
    expected = ops.sequence_logprob(values, lengths)
    assert torch.equal(ops.sequence_logprob(values.to(cuda), lengths.to(cuda)).cpu(), expected)


def test_log_partition_agrees_with_the_cpu(cuda: torch.device) -> None:
    expected = ops.new_log_partition(5)
    got = ops.new_log_partition(5, cuda)
    for _ in range(3):
        log_weight = 30 * torch.randn(200, dtype=torch.float64)
        prompt = torch.randint(4, (200,))
        ops.log_partition_(expected, log_weight, prompt)
        ops.log_partition_(got, log_weight.to(cuda), prompt.to(cuda))
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("divergence", EVERY_DIVERGENCE)
def test_fdiv_terms_agrees_with_the_cpu(cuda: torch.device, divergence: str) -> None:
    f = Divergence.parse(divergence)
    inputs = batch(1, [3, 1, 0, 7], zeros=0.2)
    expected = ops.fdiv_terms(*inputs, divergence=f)
    got = ops.fdiv_terms(*(t.to(cuda) for t in inputs), divergence=f)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-9, atol=1e-10, equal_nan=True)


def test_arguments_on_two_devices(cuda: torch.device) -> None:
    logits, target, _ = rows()
    with pytest.raises(
        (RuntimeError, ValueError), match=r"`target` must be on the device of `logits`"
    ):
        ops.token_logprob(logits, target.to(cuda))
    with pytest.raises(
        (RuntimeError, ValueError), match=r"`target` must be on the device of `logits`"
    ):
        ops.token_logprob(logits.to(cuda), target)
