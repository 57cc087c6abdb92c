"""A decoding step that is done again without the Python around its operations.

A step is a function of memory that is there before it and of the number of keys that it attends to,
so what it calls, with the very tensors that it gives them, is the same each time. On a GPU it
becomes a CUDA graph; on a CPU a list of the operations that PyTorch was asked for, written out as a
function, which is worth most in small models: what transformers does around them takes there as
long as they do.

It is recorded at the first steps of a shape; nothing is recorded or probed before. A graph takes
from memory of its own what a step takes as usual, which is measured as the first of a shape is
done: where less is free, or what is free does not do after all, steps go on as usual, with a
warning. Each draw records anew, for a recording may name weights as autocast has rounded them for
one draw. On a CPU, where it names none but those whose memory the next draw rounds them into again
(ops/matmul.py), a draw from the same model into the same memory goes on with what the last has
recorded, once a step of its own, of more than one key, has come to the same as one that is
replayed.

The steps of families without a slot cache are not recorded, nor on a CPU those of compiled models
and of short draws.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fdpg_fast.attention import rounded_reach
from fdpg_fast.ops.matmul import packed_now

__all__ = ["Recorder", "Recordings", "Replays", "Tape", "lasting", "recorder_for"]

Step = Callable[[], None]
Recordings = dict[int, dict[int, Step]]  # by the number of slots, and the reach


class NotRecordedError(RuntimeError):
    """A step that could not be recorded.

    Attributes:
        done: whether it has been done.
        final: whether no later draw of the model need try.
    """

    def __init__(self, why: str, *, done: bool, final: bool) -> None:
        super().__init__(why)
        self.done, self.final = done, final


class Recorder(Protocol):
    """Keeps from one draw to the next what recording takes.

    Attributes:
        refused: whether there has been a step that cannot be recorded, of the model at hand.
        warned: whether that has been said.
        taken: by the number of slots and the reach, how many bytes a usual step has at most taken
            that it gave back, of the model at hand; where that is measured.
        verifies: whether the first replays of a model are to be compared with its steps.
        every_draw: whether the first step of every draw makes what must outlive it (weights that
            are rounded for a draw), rather than the first of a reach in the first draw.
        keeps: whether recordings serve later draws, too, if they are :func:`lasting`.
    """

    device: torch.device
    refused: bool
    warned: bool
    taken: dict[tuple[int, int], int]
    verifies: bool
    every_draw: bool
    keeps: bool

    def usual(self, step: Step, shape: tuple[int, int]) -> None:
        """Does ``step`` as usual; of a ``shape`` that is new it may measure what that takes."""

    def record(self, step: Step, takes: int = 0) -> Step:
        """Does ``step``, which takes so many bytes, and returns what does it again.

        Raises:
            NotRecordedError: it cannot be recorded.
        """


def recorder_for(device: torch.device) -> Recorder:
    return CudaRecorder(device) if device.type == "cuda" else TapeRecorder(device)


def lasting(recordings: Recordings) -> bool:
    """Whether all that they read in 16 bits is written by every draw, and has been by this one."""
    read = (
        id(tensor)
        for steps in recordings.values()
        for step in steps.values()
        if isinstance(step, _Replay)
        for tensor in step.rounded
    )
    return packed_now().issuperset(read)


class Replays:
    """A step on some slots, recorded for each number of keys that it attends to, and replayed.

    The first step of a reach runs as usual and makes what must outlive it (buffers, handles of
    libraries), unless an earlier draw or step has, and is measured; the next is recorded.

    Args:
        step: of a reach.
        memory: what it writes, and the next one and whoever comes after the last reads; of the
            first, one entry for each slot.
        recorder: what makes recordings.
        recordings: of an earlier draw in the same memory; those of this one are added.
        warm: whether an earlier draw was of the same model, and on the same memory.
    """

    def __init__(
        self,
        step: Callable[[int], None],
        memory: Sequence[Tensor],
        recorder: Recorder,
        recordings: Recordings,
        warm: bool,
    ) -> None:
        self.step, self.memory, self.recorder = step, memory, recorder
        self.recordings = recordings
        self.ready = False  # whether this draw has made what must outlive it, once for all shapes
        self.verifies = recorder.verifies and not warm
        # The weights have changed since, and perhaps how they are used: one step tells, but for
        # one of a single key, where all that attention could do comes to the same.
        self.doubtful = bool(recordings)
        self.unverified: set[int] = set()
        if not warm:  # another model may do better
            recorder.refused = recorder.warned = False
            recorder.taken.clear()
        self.refused = recorder.refused

    def of(self, step: Callable[[int], None], memory: Sequence[Tensor]) -> Replays:
        """The same of the step that follows, on fewer slots: what an earlier draw has recorded of
        it, if any."""
        other = copy.copy(self)
        other.step, other.memory = step, memory
        other.unverified = set()
        return other

    def __call__(self, reach: int) -> None:
        recorder = self.recorder
        untold = self.doubtful and reach == 1  # a replay might leave other keys than its own behind
        reach = rounded_reach(reach, recorder.device)
        shape, replay = (len(self.memory[0]), reach), self.replays.get(reach)
        if replay is not None and not untold:
            self._again(reach, replay)
        elif (self.ready or shape in recorder.taken) and not self.refused and not untold:
            self._record(reach, recorder.taken.get(shape, 0))
        else:
            recorder.usual(functools.partial(self.step, reach), shape)
            self.ready |= recorder.every_draw

    @property
    def replays(self) -> dict[int, Step]:
        return self.recordings.setdefault(len(self.memory[0]), {})

    def _record(self, reach: int, takes: int) -> None:
        if self.doubtful:  # to be compared, it would say nothing of those from before
            self._forget()
        step = functools.partial(self.step, reach)
        try:
            self.replays[reach] = self.recorder.record(step, takes)
        except NotRecordedError as error:
            self.refused, self.recorder.refused = True, error.final
            if not error.done:
                if not self.recorder.warned:
                    self._warn(f"sampling without CUDA graphs, which is right but slower: {error}")
                self.recorder.warned = True
                step()
            return
        if self.verifies:
            self.unverified.add(reach)

    def _again(self, reach: int, replay: Step) -> None:
        if not self.doubtful and reach not in self.unverified:
            return replay()
        kept, self.doubtful = self.doubtful, False
        self.unverified.discard(reach)
        if self._repeats(reach, replay, kept):
            self.ready |= self.recorder.every_draw
            return None
        self._forget()
        if kept:  # by what is not of the past it may be recorded as well
            return None
        self.refused = self.recorder.refused = True
        self._warn(
            "sampling by the model's own steps, which is right but slower: a step that was "
            "recorded and replayed gave other tokens. Does the model keep numbers in Python?"
        )
        return None

    def _forget(self) -> None:
        """What is recorded, of this draw and before; what will be is compared."""
        self.recordings.clear()
        self.unverified.clear()
        self.doubtful, self.verifies = False, self.recorder.verifies

    def _repeats(self, reach: int, replay: Step, kept: bool) -> bool:
        """Does a step, and whether ``replay``, ``kept`` from the last draw or not, comes to the
        same, and will."""
        before = [tensor.clone() for tensor in self.memory]
        self.step(reach)
        if kept and not lasting(self.recordings):
            return False
        usual = [tensor.clone() for tensor in self.memory]
        self._restore(before)
        replay()
        if all(map(_same, self.memory, usual)):
            return True
        self._restore(before)
        self.step(reach)  # which writes keys and values again
        return False

    def _restore(self, values: Sequence[Tensor]) -> None:
        for tensor, value in zip(self.memory, values, strict=True):
            tensor.copy_(value)

    def _warn(self, what: str) -> None:
        warnings.warn(what, RuntimeWarning, stacklevel=8)  # who asked for the draw


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())


# --------------------------------------------------------------------------------------------------
# On a GPU


class CudaRecorder:
    """Makes CUDA graphs, on one stream and from one pool of memory, which are kept.

    torch's allocator knows free memory by its pool and stream. So the graphs of a draw, no two of
    which run at once, share their temporary memory, and those of the next draw have it again.
    """

    verifies = False  # CUDA refuses what a graph cannot hold
    every_draw = keeps = False

    def __init__(self, device: torch.device) -> None:
        self.device, self.refused, self.warned = device, False, False
        self.taken: dict[tuple[int, int], int] = {}
        self.stream = torch.cuda.Stream(device)

    @functools.cached_property
    def pool(self) -> torch.cuda.MemPool:
        with torch.cuda.device(self.device):
            return torch.cuda.MemPool()

    def usual(self, step: Step, shape: tuple[int, int]) -> None:
        if shape in self.taken:
            return step()
        before = torch.cuda.memory_stats(self.device)
        step()
        after, given = torch.cuda.memory_stats(self.device), "allocated_bytes.all"
        # Two bounds: what there was at a time, perhaps before, for the peak is the user's and so is
        # not reset; and what the step was given, one after the other.
        at_a_time = after[f"{given}.peak"] - after[f"{given}.current"]
        kept = max(0, after[f"{given}.current"] - before[f"{given}.current"])  # buffers, a cache
        in_turn = after[f"{given}.allocated"] - before[f"{given}.allocated"] - kept
        self.taken[shape] = min(at_a_time, in_turn)
        return None

    def _free(self) -> int:
        """How many bytes a graph may take: of the GPU, and of what the allocator has and nobody
        uses, which is that of earlier graphs, too."""
        there: int = torch.cuda.mem_get_info(self.device)[0]
        kept, used = torch.cuda.memory_reserved, torch.cuda.memory_allocated
        return there + kept(self.device) - used(self.device)

    def record(self, step: Step, takes: int = 0) -> Step:
        if takes > (free := self._free()):
            raise NotRecordedError(
                f"a step takes {takes / 2**20:.1f} MiB, and {free / 2**20:.1f} are free. "
                "Way out: a smaller batch_size",
                done=False,
                final=False,
            )
        try:
            try:
                graph = self._captured(step)
            except torch.OutOfMemoryError:  # what the allocator keeps for others may do
                torch.cuda.empty_cache()
                graph = self._captured(step)
        except RuntimeError as error:  # no memory, or an operation that no graph can hold
            why = str(error).partition("\n")[0]
            final = not isinstance(error, torch.OutOfMemoryError)
            raise NotRecordedError(why, done=False, final=final) from error
        graph.replay()
        replay: Step = graph.replay
        return replay

    def _captured(self, step: Step) -> torch.cuda.CUDAGraph:
        """What ``step`` does on the GPU, which it does not yet do.

        Not by ``torch.cuda.graph``, which empties the allocator's cache at every capture.
        """
        graph = torch.cuda.CUDAGraph()
        pool: Any = self.pool.id  # a type of its own in some versions of torch
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            try:
                # What other threads do meanwhile is no concern of it.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                step()
                graph.capture_end()
            except BaseException:
                self._give_up(graph)
                raise
        current.wait_stream(self.stream)
        return graph

    def _give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
            return
        # Then it has not told the allocator, which would believe in a capture for ever: and as
        # long as it does, to empty its cache is an internal error.
        with contextlib.suppress(RuntimeError):  # or it has, and failed later
            index = self.stream.device_index
            torch._C._cuda_endAllocateToPool(index, self.pool.id)
            torch._C._cuda_releasePool(index, self.pool.id)


# --------------------------------------------------------------------------------------------------
# On a CPU


class TapeRecorder:
    """Has a :class:`Tape` of each step. What bypasses PyTorch's dispatcher is not on it, hence the
    comparison."""

    verifies = every_draw = keeps = True

    def __init__(self, device: torch.device) -> None:
        self.device, self.refused, self.warned = device, False, False
        self.taken: dict[tuple[int, int], int] = {}

    def usual(self, step: Step, shape: tuple[int, int]) -> None:
        step()

    def record(self, step: Step, takes: int = 0) -> Step:
        tape = Tape()
        with tape:
            step()
        return _Replay(tape.function(), tape.rounded())


@dataclass(frozen=True)
class _Replay:
    """A step, and what it reads in 16 bits and does not write."""

    replay: Step
    rounded: list[Tensor]

    def __call__(self) -> None:
        self.replay()


class Tape(TorchDispatchMode):
    """The operations that are called while it is entered, and a function that calls them again:
    on the same memory where they were given such, on each other's results where they were given
    those. Views of memory that was there are kept, not made again.

    The operations are those below autocast and autograd, which the function stays below, too.
    """

    # What an operation may be given that is as well written out.
    _LITERALS = (bool, int, str, type(None))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would go through its compiler, and import it, at every operation

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lines: list[str] = []
        # Names of the tensors that operations have made, by id, which another may have once they
        # are gone.
        self.names: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self.last_use: dict[str, int] = {}  # of each of those: the line
        self.globals: dict[str, Any] = {}
        self.constants: dict[int, str] = {}  # names in globals, by id
        self.written: set[int] = set()  # where memory of 16 bits is that operations write
        self.refusal = ""

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = op(*args, **(kwargs or {}))
        if not self.refusal:
            self._write(op, args, kwargs or {}, out)
        return out

    def function(self) -> Step:
        """Does what was recorded.

        Raises:
            NotRecordedError: a number was asked of a tensor, or a size depends on one.
        """
        if self.refusal:
            raise NotRecordedError(self.refusal, done=True, final=True)
        done: dict[int, list[str]] = {}
        for name, number in self.last_use.items():
            done.setdefault(number, []).append(name)
        body = []
        for number, line in enumerate(self.lines):
            body.append(f"        {line}\n")
            if number in done:
                body.append(f"        del {', '.join(done[number])}\n")
        code = "def replay():\n    with autocast_off(), below_autograd():\n" + "".join(body)
        names = self.globals
        names["autocast_off"] = functools.partial(torch.autocast, "cpu", enabled=False)
        names["below_autograd"] = torch._C._AutoDispatchBelowAutograd
        exec(_compiled(code), names)
        replay: Step = names.pop("replay")  # no cycle: what it holds goes with it
        return replay

    def rounded(self) -> list[Tensor]:
        """What of the memory that it names has 16 bits and is not written: weights, as they were
        rounded."""
        known = filter(_is_16_bit, self.globals.values())
        return [tensor for tensor in known if _place(tensor) not in self.written]

    def _write(self, op: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        given: dict[int, str | None] = {}  # tensors by id; the names of those that were made
        words = [self._word(value, given) for value in args]
        words += [f"{key}={self._word(value, given)}" for key, value in kwargs.items()]
        results = out if isinstance(out, (tuple, list)) else (out,)
        asks, is_view = _nature(op)
        if (asks and not _by_numbers(op, args)) or (
            given and not all(x is None or isinstance(x, Tensor) for x in results)
        ):
            self.refusal = f"{op} asks for the values of a tensor"
            return
        used = [name for name in given.values() if name is not None]
        if is_view and not used:
            return
        number = len(self.lines)
        targets: list[str] = []
        for value in results:
            name = "_"
            if isinstance(value, Tensor) and id(value) not in given:
                name = f"t{number}_{len(targets)}"
                self.names[id(value)] = weakref.ref(value), name
                used.append(name)
            targets.append(name)
        for name in used:
            self.last_use[name] = number
        self.written.update(map(_place, filter(_is_16_bit, _written(op, args, kwargs))))
        call = f"{self._constant(op)}({', '.join(words)})"
        if any(name != "_" for name in targets):
            comma = "" if results[0] is out else ","
            call = f"{', '.join(targets)}{comma} = {call}"
        self.lines.append(call)

    def _word(self, value: Any, given: dict[int, str | None]) -> str:
        """How an argument is written; tensors in it are added to ``given``."""
        if isinstance(value, Tensor):
            reference, name = self.names.get(id(value), (None, None))
            if reference is None or reference() is not value:
                name = None
            given[id(value)] = name
            return name or self._constant(value)
        if isinstance(value, (list, tuple)):
            return f"[{', '.join([self._word(x, given) for x in value])}]"
        if type(value) in self._LITERALS or (type(value) is float and math.isfinite(value)):
            return repr(value)
        return self._constant(value)

    def _constant(self, value: Any) -> str:
        name = self.constants.get(id(value))
        if name is None:
            name = self.constants[id(value)] = f"c{len(self.constants)}"
            self.globals[name] = value
        return name


@functools.lru_cache(maxsize=64)  # the next draw's tape of a reach reads the same
def _compiled(code: str) -> CodeType:
    return compile(code, "<tape>", "exec")


@functools.cache
def _nature(op: Any) -> tuple[bool, bool]:
    """Whether it may tell Python a number of a tensor, or have a size that depends on one; and
    whether all its results are of the memory that it is given, of which it writes none."""
    tags, returns = torch.Tag, op._schema.returns
    asking = (tags.data_dependent_output, tags.dynamic_output_shape, tags.inplace_view)
    aliases = [r.alias_info for r in returns]
    is_view = all(alias is not None and not alias.is_write for alias in aliases)
    return any(tag in op.tags for tag in asking), bool(returns) and is_view


def _written(op: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[Any]:
    for place, key in _outputs(op):
        value = args[place] if place < len(args) else kwargs.get(key)
        yield from value if isinstance(value, (list, tuple)) else [value]


@functools.cache
def _outputs(op: Any) -> list[tuple[int, str]]:
    """Of those that it is given and writes: where they stand, and what they are called."""
    arguments = enumerate(op._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def _is_16_bit(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype.itemsize == 2


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _by_numbers(op: Any, args: Any) -> bool:
    """Whether it is an index by numbers, whose result has the size of the index."""
    if op not in (torch.ops.aten.index.Tensor, torch.ops.aten._unsafe_index.Tensor):
        return False
    return not any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
