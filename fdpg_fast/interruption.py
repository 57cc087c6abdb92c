"""Leaving between two steps when asked: Ctrl-C and SIGTERM become a flag the trainer looks at."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interruption"]


class Interruption:
    """While active, the first signal sets :attr:`signal`; a second one ends the process at once.

    Signals can be caught in the main thread only; elsewhere this does nothing.
    """

    CAUGHT = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, note: Callable[[str], None]) -> None:
        self.signal: signal.Signals | None = None
        self._note = note
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._catch) for number in self.CAUGHT}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            # Not an exception: whatever is being written is left as it is, and resume copes.
            os._exit(128 + number)
        self.signal = signal.Signals(number)
        self._note(f"{self.signal.name}: saving after this step. Once more: stop at once, unsaved")
