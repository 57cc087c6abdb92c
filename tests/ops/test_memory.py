"""Large results take over the memory of those before them, and never that of one still in use."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from fdpg_fast import ops
from fdpg_fast.ops import memory
from fdpg_fast.ops.memory import lasting_empty

LIKE = torch.empty(0)


@pytest.fixture(autouse=True)
def _least(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(memory, "LEAST_BYTES", 1 << 10)
    memory._spare.clear()
    yield
    gc.collect()
    memory._spare.clear()


def bytes_of(x: Tensor) -> range:
    storage = x.untyped_storage()
    return range(storage.data_ptr(), storage.data_ptr() + storage.nbytes())


def overlap(a: Tensor, b: Tensor) -> bool:
    return max(bytes_of(a).start, bytes_of(b).start) < min(bytes_of(a).stop, bytes_of(b).stop)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_is_a_tensor_as_any(dtype: torch.dtype) -> None:
    x = lasting_empty(nn.Parameter(LIKE), (33, 65), dtype)
    assert (x.dtype, x.shape, x.requires_grad) == (dtype, (33, 65), False)
    assert x.is_contiguous()
    assert x.data_ptr() % 64 == 0
    assert torch.equal(x.fill_(2), torch.full((33, 65), 2, dtype=dtype))


def test_what_is_freed_is_lent_again() -> None:
    x = lasting_empty(LIKE, (4000,), torch.float32)
    at = x.data_ptr()
    del x
    for size, dtype in (((4000,), torch.float32), ((1000, 7), torch.bfloat16)):
        assert lasting_empty(LIKE, size, dtype).data_ptr() == at


def test_of_those_that_fit_the_smallest() -> None:
    held = [lasting_empty(LIKE, (n,), torch.float32) for n in (6000, 4000, 5000)]
    at = [x.data_ptr() for x in held]
    del held
    assert lasting_empty(LIKE, (3500,), torch.float32).data_ptr() == at[1]
    assert lasting_empty(LIKE, (4500,), torch.float32).data_ptr() == at[2]


@pytest.mark.parametrize("size", [4001, 1900])
def test_one_too_small_or_far_too_large_stays(size: int) -> None:
    x = lasting_empty(LIKE, (4000,), torch.float32)
    at = x.data_ptr()
    del x
    other = lasting_empty(LIKE, (size,), torch.float32)
    assert at not in bytes_of(other)
    again = lasting_empty(LIKE, (4000,), torch.float32)
    assert again.data_ptr() == at
    assert not overlap(again, other)


def test_a_view_keeps_its_memory() -> None:
    x = lasting_empty(LIKE, (4000,), torch.float32).fill_(1)
    view = x.view(50, 80)[7:9].t()
    del x
    other = lasting_empty(LIKE, (4000,), torch.float32).fill_(2)
    assert not overlap(view, other)
    assert bool((view == 1).all())


def test_no_more_than_a_few_are_spare() -> None:
    held = [lasting_empty(LIKE, (4000,), torch.float32) for _ in range(6)]
    at = [x.data_ptr() for x in held]
    while held:
        del held[0]
    assert len(memory._spare) == 3
    again = [lasting_empty(LIKE, (4000,), torch.float32) for _ in range(3)]
    assert {x.data_ptr() for x in again} == set(at[3:])  # the latest


def test_small_fake_and_other_devices_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_take", lambda needed: pytest.fail("took memory"))
    lasting_empty(LIKE, (255,), torch.float32)
    assert lasting_empty(LIKE.to("meta"), (4000,), torch.float32).device.type == "meta"
    with FakeTensorMode():
        assert type(lasting_empty(torch.empty(0), (4000,), torch.float32)) is not Tensor


def test_threads_do_not_share() -> None:
    wrong: list[int] = []

    def work(mine: int) -> None:
        for i in range(300):
            x = lasting_empty(LIKE, (3000 + 17 * (i % 5),), torch.float32).fill_(mine)
            y = lasting_empty(LIKE, (3000,), torch.float32).fill_(-mine)
            if not (bool((x == mine).all()) and bool((y == -mine).all())):
                wrong.append(mine)

    threads = [threading.Thread(target=work, args=(1 + k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("way", ["linear_logprob", "policy_gradient"])
def test_gradients_outlive_the_next_call(way: str) -> None:
    """Those of a first call are what they were after a second, which has other memory; once they
    are dropped the third has theirs."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 16), torch.randn(300, 16)
    target, coefficient = torch.randint(300, (40,)), torch.randn(40)

    def gradient(sign: float) -> Tensor:
        if way == "policy_gradient":
            found = ops.policy_gradient(hidden, weight, target, sign * coefficient).weight
            assert found is not None
            return found
        leaf = nn.Parameter(weight)
        ops.linear_logprob(hidden, leaf, target).logp.backward(sign * coefficient)
        assert leaf.grad is not None
        return leaf.grad

    first = gradient(1.0)
    before = first.clone()
    second = gradient(-1.0)
    assert torch.equal(first, before)
    assert torch.equal(second, -before)
    at = {first.data_ptr(), second.data_ptr()}
    del first, second
    assert gradient(1.0).data_ptr() in at


def test_nothing_is_said_at_the_end_of_a_program() -> None:
    """With tensors alive in globals, and in a cycle that nobody collects."""
    program = """if True:
        import torch
        from fdpg_fast.ops.memory import LEAST_BYTES, lasting_empty
        held = lasting_empty(torch.empty(0), (LEAST_BYTES,), torch.float32)
        class Cycle: pass
        cycle = Cycle()
        cycle.itself, cycle.held = cycle, lasting_empty(held, (LEAST_BYTES,), torch.float32)
        del held
    """
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
