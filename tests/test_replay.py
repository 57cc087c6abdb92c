"""A recorded step does again what it did; what cannot be recorded is done as usual."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from families import CONFIGS, ENCODER_DECODER, batch, language_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fdpg_fast import sampler as sampler_module
from fdpg_fast.attention import REACH_STEP
from fdpg_fast.models import LanguageModel
from fdpg_fast.ops.matmul import has_rounded_products
from fdpg_fast.replay import CudaRecorder, NotRecordedError, Replays, Tape, TapeRecorder
from fdpg_fast.rollout import Rollout
from fdpg_fast.sampler import LEAST_STEPS, Sampler, SamplingError

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ([7, 3], [9], [1, 2, 3, 4, 5, 6, 7])
LONG = LEAST_STEPS


def test_a_tape_reads_memory_as_it_is_then() -> None:
    """Views of it, in-place results, several results of one operation, and none of the Python."""
    memory, weight = torch.arange(6.0), torch.ones(2, 3)
    out, calls = torch.zeros(2), []

    def step() -> None:
        calls.append(1)
        rows = memory.view(2, 3)  # of memory: made once
        left, right = (rows * 2 + torch.full((), 1.5)).split([1, 2], dim=1)
        values, _ = torch.cat((left, right), 1).max(1)
        out.copy_((weight * values[:, None]).sum(1))
        memory.add_(1)

    with Tape() as tape:
        step()
    again = tape.function()
    for _ in range(3):
        expected, start = torch.zeros(2), memory.clone()
        again()
        assert torch.equal(memory, start + 1)
        expected = (start.view(2, 3) * 2 + 1.5).amax(1) * 3
        assert torch.equal(out, expected)
    weight.zero_()
    again()
    assert out.eq(0).all()
    assert len(calls) == 1
    # What no later line needs is freed by then, and views of memory take no line.
    names = {name for name, value in tape.globals.items() if value is torch.ops.aten.view.default}
    assert not any(line.split(" = ")[-1].split("(")[0] in names for line in tape.lines)


class _Living(TorchDispatchMode):
    """Counts the results of operations that are still there when the next is called."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[weakref.ref[Tensor]] = []
        self.most = 0

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.most = max(self.most, sum(result() is not None for result in self.results))
        out = op(*args, **(kwargs or {}))
        self.results.append(weakref.ref(out))
        return out


def test_a_tape_keeps_no_more_than_the_step_does() -> None:
    """Neither while it is recorded nor when it is replayed; tensors whose ids come again are told
    apart."""
    x, out = torch.ones(4), torch.zeros(4)

    def step() -> None:
        y = x + 1
        for _ in range(50):
            y = y * 2 - y
        out.copy_(y + x)

    with Tape() as tape, _Living() as recorded:
        step()
    again = tape.function()
    with _Living() as replayed:
        out.zero_()
        again()
    assert recorded.most <= 3
    assert replayed.most <= 3
    assert out.eq(3).all()


def test_a_tape_is_below_autocast() -> None:
    """Layers that were outside of it when recorded are not rounded when replayed inside."""
    x, y = torch.randn(4, 8), torch.empty(4, 4)
    layer = nn.Linear(8, 4)

    def step() -> None:
        with torch.autocast("cpu", enabled=False):
            y.copy_(layer(x))

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with Tape() as tape:
            step()
        exact = y.clone()
        y.zero_()
        tape.function()()
    assert torch.equal(y, exact)


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x + 1),
        lambda x: bool(x[0] > 0),
        lambda x: x.clone().resize_(2),
    ],
    ids=["item", "mask", "nonzero", "equal", "if", "resize"],
)
def test_a_tape_refuses_what_depends_on_values(asks: Callable[[Tensor], Any]) -> None:
    """But does it."""
    x = torch.arange(5.0)
    with Tape() as tape:
        asks(x)
        x.add_(1)
    assert x[0] == 1
    with pytest.raises(NotRecordedError, match="asks for the values"):
        tape.function()


def recorded_by(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The steps that are recorded from now on."""
    record, found = TapeRecorder.record, []

    def counted(self: TapeRecorder, step: Callable[[], None], takes: int) -> Any:
        found.append(step)
        return record(self, step, takes)

    monkeypatch.setattr(TapeRecorder, "record", counted)
    return found


def plain(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Rollout:
    with monkeypatch.context() as patch:
        patch.setattr(sampler_module, "_can_be_replayed", lambda decoder, steps: False)
        return draw(Sampler(LONG, batch_size=8), model)


def draw(sampler: Sampler, model: LanguageModel) -> Rollout:
    return sampler.draw(model, batch(*PROMPTS), 8, key=7)


def assert_equal(left: Rollout, right: Rollout) -> None:
    for name in ("tokens", "token_logprob", "lse", "lengths", "finish"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name


SLOTLESS = {"falcon", "bloom", "gpt_neo", "umt5"}
# Which have routers that autocast rounds for one draw, or keys of prompts that are of one.
OF_ONE_DRAW = {"gpt_oss", "mixtral", "phimoe", "mt5", *ENCODER_DECODER}
REPLAYED = sorted(set(CONFIGS) - SLOTLESS - {"phi3"})  # which reads no text that is long enough


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("family", REPLAYED)
def test_a_family_draws_the_same_by_replays(
    family: str, compute: Literal["fp32", "bf16"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit, in a first draw, which compares, and after the weights have changed, by what was
    recorded before if that names no weight as it was rounded then."""
    model = language_model(family, compute=compute)
    recorded = recorded_by(monkeypatch)
    replays: list[Any] = []

    class Counted(Replays):
        def _again(self, reach: int, replay: Callable[[], None]) -> None:
            replays.append(reach)
            super()._again(reach, replay)

    monkeypatch.setattr(sampler_module, "Replays", Counted)
    sampler = Sampler(LONG, batch_size=8)
    lasts = compute == "fp32" or (has_rounded_products() and family not in OF_ONE_DRAW)
    for change in (0.9, 1.001, 1.0):
        replays.clear()
        recorded.clear()
        assert_equal(draw(sampler, model), plain(model, monkeypatch))
        assert len(replays) >= LONG - 2
        assert bool(recorded) == (change == 0.9 or not lasts)
        assert bool(sampler._recordings) == lasts  # or they would hold memory until the next draw
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(change)


COMPUTE = [
    "fp32",
    pytest.param(
        "bf16",
        marks=pytest.mark.skipif(
            not has_rounded_products(), reason="weights are packed with avx512_bf16 alone"
        ),
    ),
]


@pytest.mark.parametrize("compute", COMPUTE)
def test_recordings_serve_the_next_draw_in_the_same_memory(
    compute: Literal["fp32", "bf16"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another key, from weights that have moved; but not of other shapes, nor from another
    model, nor after an error. And what was drawn before stays what it was."""
    model, recorded = language_model("gpt2", compute=compute), recorded_by(monkeypatch)
    sampler, prompts = Sampler(LONG, batch_size=8), batch(*PROMPTS)
    first = sampler.draw(model, prompts, 8, key=7, first_sample_id=3)
    tensors = {name: x for name, x in vars(first).items() if isinstance(x, Tensor)}
    copies = {name: x.clone() for name, x in tensors.items()}
    assert len(tensors) == 9
    assert recorded
    recorded.clear()
    for key, others in ((8, prompts), (9, batch(*reversed(PROMPTS)))):
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.1)
        again = sampler.draw(model, others, 8, key=key)
        assert not recorded
        assert_equal(again, Sampler(LONG, batch_size=8).draw(model, others, 8, key=key))
        recorded.clear()
        assert all(torch.equal(x, copies[name]) for name, x in tensors.items())
    for other, count in ((model, 7), (language_model("gpt2"), 7)):
        sampler.draw(other, prompts, count, key=7)
        assert recorded
        recorded.clear()
    with torch.no_grad():
        other.parameters()[0].fill_(torch.nan)
    with pytest.raises(SamplingError):
        sampler.draw(other, prompts, 7, key=7)
    recorded.clear()
    assert_equal(draw(sampler, model), plain(model, monkeypatch))
    assert recorded


@pytest.mark.parametrize("change", ["a hook", "a parameter", "an embedding", "a layer"])
def test_recordings_of_a_model_that_has_changed_since_are_made_anew(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a warning: the first step of the draw tells, or other parameters do."""
    model, recorded = language_model("gpt2"), recorded_by(monkeypatch)
    sampler = Sampler(LONG, batch_size=8)
    draw(sampler, model)
    norm = model.model.transformer.ln_f
    if change == "a hook":
        norm.register_forward_hook(lambda module, args, out: out * 1.5)
    elif change == "a parameter":
        norm.weight = nn.Parameter(norm.weight * 1.5)
    elif change == "an embedding":  # of tokens that the first step does not read
        embedding = model.model.transformer.wte
        embedding.weight = nn.Parameter(embedding.weight.clone())
        with torch.no_grad():
            embedding.weight[10:] *= 1.5
    else:
        model.model.transformer.h[0].mlp = nn.Identity()
    expected = plain(model, monkeypatch)
    for again in (True, False):
        recorded.clear()
        assert_equal(draw(sampler, model), expected)
        assert bool(recorded) == again


def test_a_step_that_no_earlier_draw_has_recorded_says_nothing_of_those_that_one_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A draw that begins with more keys than the last has seen, and comes to as few later."""
    model = language_model("gpt2", changes={"n_positions": 100})
    sampler, long = Sampler(LONG, batch_size=8), [3] * (REACH_STEP["cpu"] + 1)
    short = REACH_STEP["cpu"] + 1 - LONG  # rounded, the same memory; the last token is not read
    sampler.draw(model, batch([5] * short, [7] * short), 8, key=7)
    model.model.transformer.ln_f.register_forward_hook(lambda module, args, out: out * 1.5)
    prompts = batch(long, [5] * short)
    found = sampler.draw(model, prompts, 8, key=7)
    with monkeypatch.context() as patch:
        patch.setattr(sampler_module, "_can_be_replayed", lambda decoder, steps: False)
        assert_equal(found, Sampler(LONG, batch_size=8).draw(model, prompts, 8, key=7))


def nudge(model: LanguageModel) -> None:
    """By so little that a step's log-probs may stay what they are, to the bit."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + 1e-4)


@pytest.mark.skipif(not has_rounded_products(), reason="weights are packed with avx512_bf16 alone")
def test_recordings_of_weights_packed_elsewhere_since_are_made_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even if the first step, which is compared, comes to the same."""
    model, recorded = language_model("gpt2", compute="bf16"), recorded_by(monkeypatch)
    sampler = Sampler(LONG, batch_size=8)
    draw(sampler, model)
    nudge(model)
    model._packed.clear()
    monkeypatch.setattr("fdpg_fast.replay._same", lambda a, b: True)
    recorded.clear()
    assert_equal(draw(sampler, model), plain(model, monkeypatch))
    assert recorded


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_recordings_serve_an_adapter_while_it_learns_and_not_without_it(
    family: str, compute: Literal["fp32", "bf16"], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft", reason="needs the optional package peft")
    base, recorded = language_model(family, compute=compute), recorded_by(monkeypatch)
    policy = base.with_adapter(rank=2)
    samplers = {id(model): Sampler(LONG, batch_size=8) for model in (base, policy)}
    for off in (False, False, False, True, False):
        with torch.no_grad():
            for weight in policy.parameters():
                weight.add_(0.1)
        with policy._adapter.disable_adapter() if off else contextlib.nullcontext():
            for model in (base, policy):
                assert_equal(draw(samplers[id(model)], model), plain(model, monkeypatch))
    recorded.clear()
    nudge(policy)
    for model in (base, policy):
        assert_equal(draw(samplers[id(model)], model), plain(model, monkeypatch))
    assert not recorded


@pytest.mark.parametrize("change", ["a scale", "keys"])
def test_a_change_that_a_single_key_does_not_show_is_found(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an adapter on queries and keys that is switched off, where prompts are of one token. And
    what the first step of a draw has stored is not what an earlier one would have."""
    model = language_model("llama")

    def draw(sampler: Sampler) -> Rollout:
        return sampler.draw(model, batch([7], [9]), 4, key=7)

    sampler = Sampler(LONG, batch_size=8)
    draw(sampler)
    for layer in model.model.model.layers:
        if change == "a scale":
            layer.self_attn.scaling *= 3.0
        else:
            layer.self_attn.k_proj.register_forward_hook(lambda module, args, out: out * 3.0)
    with monkeypatch.context() as patch:
        patch.setattr(sampler_module, "_can_be_replayed", lambda decoder, steps: False)
        expected = draw(Sampler(LONG, batch_size=8))
    recorded = recorded_by(monkeypatch)
    for again in (True, False):
        recorded.clear()
        assert_equal(draw(sampler), expected)
        assert bool(recorded) == again


@pytest.mark.parametrize("how", ["counts its calls", "bypasses the dispatcher"])
def test_a_step_that_cannot_be_replayed_is_found_out(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not what was recorded: a warning, and the model's own."""
    model = language_model("gpt2")
    norm, calls = model.model.transformer.ln_f, []

    def drifts(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        calls.append(1)
        if how == "counts its calls":
            return out * (1 + 0.1 * (len(calls) % 5))
        return torch.from_numpy(out.numpy() * 1.5)

    norm.register_forward_hook(drifts)
    expected = plain(model, monkeypatch)
    calls.clear()
    sampler = Sampler(LONG, batch_size=8)
    with pytest.warns(RuntimeWarning, match="gave other tokens") as said:
        found = draw(sampler, model)
    assert said[0].filename == __file__  # not torch's, whose decorator is in between
    assert len(calls) >= LONG
    # The one step that was compared has been counted; the first tokens have not.
    assert torch.equal(found.token_logprob[:8, :2], expected.token_logprob[:8, :2])
    assert sampler._recorder is not None
    assert sampler._recorder.refused
    draw(sampler, model)  # without a warning


def test_errors_of_a_step_are_not_taken_for_refusals() -> None:
    model, calls = language_model("gpt2"), []

    def fails(module: nn.Module, args: Any, out: Tensor) -> None:
        calls.append(1)
        if len(calls) == 3:  # of the prompts, the first step, and the one that is recorded
            raise RuntimeError("too hot")

    model.model.transformer.ln_f.register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="too hot"):
        draw(Sampler(LONG, batch_size=8), model)
    assert len(calls) == 3


def test_what_a_tape_refuses_is_sampled_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = language_model("gpt2"), []

    def asks(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        asked.append(out.abs().max().item())
        return out

    model.model.transformer.ln_f.register_forward_hook(asks)
    expected = plain(model, monkeypatch)
    steps = len(asked)
    assert_equal(draw(Sampler(LONG, batch_size=8), model), expected)
    assert len(asked) == 2 * steps


@pytest.mark.parametrize(
    "compiles",
    [
        lambda m: m.transformer.compile(backend="eager"),
        lambda m: setattr(
            m.transformer, "forward", torch.compile(m.transformer.forward, backend="eager")
        ),
        lambda m: m.transformer.h.__setitem__(
            0, torch.compile(m.transformer.h[0], backend="eager")
        ),
    ],
    ids=["compile()", "forward", "a layer"],
)
def test_compiled_models_are_not_recorded(compiles: Callable[[Any], object]) -> None:
    model = language_model("gpt2")
    decoder = model.decoder(4, 16, [[5]])
    assert sampler_module._can_be_replayed(decoder, LONG)
    assert not sampler_module._can_be_replayed(decoder, LONG - 1)
    compiles(model.model)
    assert not sampler_module._can_be_replayed(decoder, LONG)


# --------------------------------------------------------------------------------------------------
# CUDA graphs


class _Gpu:
    """What torch says of a GPU's memory, in place of torch. Each step ``takes`` so many bytes, and
    the first leaves ``more``; each graph takes as many from a pool that they share."""

    def __init__(self, free: int, takes: int = 0, more: int = 0) -> None:
        self.free, self.takes, self.more = free, takes, more
        self.allocated = self.peak = self.ever = self.pool = 0

    def step(self) -> None:
        self.ever += self.takes + self.more
        self.allocated, self.more = self.allocated + self.more, 0
        self.peak = max(self.peak, self.allocated + self.takes)

    def capture(self) -> None:
        grows = max(0, self.takes - self.pool)
        assert grows <= self.free
        self.free, self.pool = self.free - grows, self.pool + grows

    def statistics(self, device: torch.device) -> dict[str, int]:
        known = {"current": self.allocated, "peak": self.peak, "allocated": self.ever}
        return {f"allocated_bytes.all.{key}": value for key, value in known.items()}

    def stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, said in {
            "Stream": lambda device: None,
            "empty_cache": lambda: None,
            "mem_get_info": lambda device: (self.free, 1 << 40),
            "memory_allocated": lambda device: self.allocated,
            "memory_reserved": lambda device: self.allocated + self.pool,
            "memory_stats": self.statistics,
            "reset_peak_memory_stats": None,  # they are the user's
        }.items():
            monkeypatch.setattr(torch.cuda, name, said)


@pytest.mark.parametrize(
    ("peak", "leaves", "expected"),
    [(0, 0, 100), (0, 1000, 100), (150, 0, 100), (5000, 0, 100), (1150, 1000, 100)],
    ids=["alone", "makes buffers", "after more", "after much more", "after more, makes buffers"],
)
def test_what_a_step_takes_is_measured_once(
    peak: int, leaves: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each shape, and without what the step leaves."""
    gpu = _Gpu(free=10_000, takes=100, more=leaves)
    gpu.peak = peak
    gpu.stand_in(monkeypatch)
    recorder = CudaRecorder(torch.device("cpu"))
    recorder.usual(gpu.step, (8, 128))
    assert recorder.taken == {(8, 128): expected}
    gpu.takes, gpu.peak = 500, 0
    recorder.usual(gpu.step, (8, 128))
    assert recorder.taken == {(8, 128): expected}
    recorder.usual(gpu.step, (16, 128))
    assert recorder.taken == {(8, 128): expected, (16, 128): 500}


@pytest.mark.parametrize(
    ("free", "fits"),
    [(7 << 20, True), (4 << 20, True), (2 << 20, False)],
    ids=["twice", "as the first has it", "not"],
)
def test_a_graph_is_captured_if_it_fits(
    free: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once of each shape, after a usual step in a first draw, before any in the next. A second fits
    where the first has what it takes. If none does there is one warning."""
    model = language_model("gpt2")
    eager = plain(model, monkeypatch)
    gpu = _Gpu(free, takes=3 << 20)
    gpu.stand_in(monkeypatch)
    usual: list[tuple[int, int]] = []
    captured: list[tuple[int, int]] = []

    class Capturing(CudaRecorder):
        def usual(self, step: Callable[[], None], shape: tuple[int, int]) -> None:
            usual.append(shape)
            super().usual(lambda: (step(), gpu.step())[0], shape)

        def _captured(self, step: Any) -> Any:
            gpu.capture()
            _, row, reach = step.args
            captured.append((len(row), reach))
            return SimpleNamespace(replay=step)

    monkeypatch.setattr(sampler_module, "recorder_for", Capturing)
    monkeypatch.setitem(sampler_module.LEAST_SAVED, "cpu", 0)
    sampler = Sampler(LONG, batch_size=8)
    if not fits:
        match = "without CUDA graphs, .*: a step takes 3.0 MiB, and 2.0 are free. .* batch_size$"
        with pytest.warns(RuntimeWarning, match=match) as said:
            drawn = [draw(sampler, model) for _ in range(2)]
        assert (len(said), len(captured)) == (1, 0)
        assert_equal(drawn[0], eager)
        assert_equal(drawn[1], eager)
        return
    assert_equal(draw(sampler, model), eager)
    assert len(set(captured)) == len(captured) > 1
    assert len(set(usual)) == len(usual)
    assert set(captured) <= set(usual)
    usual.clear()
    captured.clear()
    assert_equal(draw(sampler, model), eager)
    assert len(set(captured)) == len(captured) > 1
    assert not usual
    captured.clear()
    draw(sampler, language_model("llama"))
    assert set(captured) <= set(usual)


@pytest.mark.parametrize(
    ("error", "tries"),
    # Out of memory: once more with the cache emptied, and again at the next draw.
    [(torch.OutOfMemoryError, 4), (RuntimeError, 1)],
    ids=str,
)
def test_a_graph_that_cannot_be_captured_is_done_without(
    error: type[RuntimeError], tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = language_model("gpt2")
    eager = plain(model, monkeypatch)
    tried = []

    class Refusing(CudaRecorder):
        def _captured(self, step: Callable[[], None]) -> Any:
            tried.append(step)
            raise error("It does not fit.\nAnd more")

    _Gpu(free=1).stand_in(monkeypatch)
    monkeypatch.setattr(sampler_module, "recorder_for", Refusing)
    sampler = Sampler(LONG, batch_size=8)
    match = r"without CUDA graphs, .*slower: It does not fit.$"
    with pytest.warns(RuntimeWarning, match=match) as said:
        found = [draw(sampler, model) for _ in range(2)]
    assert said[0].filename == __file__
    for rollout in found:
        assert_equal(rollout, eager)
    assert len(tried) == tries
    # What one model cannot do another may.
    with pytest.warns(RuntimeWarning, match="It does not fit"):
        draw(sampler, language_model("llama"))
    assert len(tried) > tries


@pytest.mark.parametrize("fails", ["nowhere", "in the step", "when it ends"])
def test_the_allocator_is_told_of_the_end_of_a_capture(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch, or, where CUDA has refused the capture and torch has not got to it, by us."""
    told: list[Any] = []

    class Stream:
        device_index = 3

        def wait_stream(self, other: object) -> None: ...

    class Graph:
        def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
            told.append(("begin", pool))

        def capture_end(self) -> None:
            if fails != "nowhere":
                raise RuntimeError("capture was invalidated")
            told.append("end")

        def replay(self) -> None:
            told.append("replay")

    _Gpu(free=1).stand_in(monkeypatch)
    cuda, private = torch.cuda, torch._C
    monkeypatch.setattr(cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(cuda, "MemPool", lambda: SimpleNamespace(id=(0, 7)))
    monkeypatch.setattr(cuda, "CUDAGraph", Graph)
    for context in ("device", "stream"):
        monkeypatch.setattr(cuda, context, contextlib.nullcontext)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        told_of = functools.partial(lambda name, *where: told.append((name, *where)), name)
        monkeypatch.setattr(private, name, told_of, raising=False)

    def step() -> None:
        told.append("step")
        if fails == "in the step":
            raise RuntimeError("no such thing in a capture\nand more")

    recorder = CudaRecorder(torch.device("cuda", 3))
    if fails == "nowhere":
        recorder.record(step)()
        assert told == [("begin", (0, 7)), "step", "end", "replay", "replay"]
        return
    with pytest.raises(NotRecordedError) as error:
        recorder.record(step)
    assert not error.value.done
    assert error.value.final
    assert "\n" not in str(error.value)
    ended = [("_cuda_endAllocateToPool", 3, (0, 7)), ("_cuda_releasePool", 3, (0, 7))]
    assert told == [("begin", (0, 7)), "step", *ended]


@pytest.mark.gpu
@pytest.mark.parametrize("invalid", [True, False], ids=["cuda says so", "python says so"])
def test_the_gpu_goes_on_after_a_capture_has_failed(invalid: bool) -> None:
    """With the allocator, random numbers and the next capture as if nothing had been."""
    device = torch.device("cuda")
    recorder = CudaRecorder(device)
    x = torch.ones(1000, device=device)

    def wrong() -> None:
        torch.empty(1 << 20, device=device).fill_(1)
        if invalid:
            x.sum().item()  # waits for the GPU
        raise ValueError("wrong")

    with pytest.raises(RuntimeError if invalid else ValueError):
        recorder.record(wrong)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.isfinite(torch.randn(10, device=device)).all()
    again = recorder.record(lambda: x.add_(torch.ones_like(x)))
    assert x.eq(2).all()
    again()
    assert x.eq(3).all()


@pytest.mark.gpu
def test_draws_take_no_more_memory_from_one_to_the_next() -> None:
    model = language_model("llama", device="cuda")
    sampler, reserved = Sampler(LONG, batch_size=8), []
    for _ in range(4):
        draw(sampler, model)
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[1] == reserved[3]
