"""Ctrl-C and SIGTERM at a moment of the loop's choosing, so that state can be saved whole."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class StopRequest:
    """Whether somebody asked to stop; true once a signal came."""

    def __init__(self) -> None:
        self._signal: int | None = None

    def __bool__(self) -> bool:
        return self._signal is not None

    def pass_on(self) -> None:
        """Send the signal again, if one came."""
        if self._signal is not None:
            signal.raise_signal(self._signal)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            # Asked twice: the person does not want to wait for the end of the step.
            raise KeyboardInterrupt
        self._signal = number


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside, the first SIGINT or SIGTERM only marks the yielded StopRequest; a second one interrupts at once.

    The loop looks at it after each step, saves, and raises `ddkit.errors.InterruptedRunError`. A signal that came too late for
    it to be looked at is passed on to whoever handles them outside: it is not for the loop's end to swallow.
    Outside the main thread signals cannot be caught and the request stays false.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    earlier = {number: signal.signal(number, request._receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
    request.pass_on()
