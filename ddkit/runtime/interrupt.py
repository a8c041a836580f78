"""Ctrl-C, SIGTERM and the end of a time limit, handled at a chosen moment of a loop, so that its state is saved whole."""

from __future__ import annotations

import contextlib
import contextvars
import math
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

_time_is_up_at: contextvars.ContextVar[float] = contextvars.ContextVar("time_is_up_at", default=math.inf)


class StopRequest:
    """True once a signal has asked to stop, or the time limit around it is over."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None or time_is_up()

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler of a signal. A second one means that the user does not want to wait for the end of the step."""
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """In this context every StopRequest becomes true after so many seconds, as if a signal had asked to stop."""
    token = _time_is_up_at.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _time_is_up_at.reset(token)


def time_is_up() -> bool:
    """True if the time limit around the caller is over."""
    return time.monotonic() >= _time_is_up_at.get()


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """In this context the first SIGINT or SIGTERM only sets the yielded StopRequest; a second one interrupts at once.

    The loop tests it after each step, saves, and raises `ddkit.errors.InterruptedRunError`. A signal that arrives after the
    last test is raised again at the end, for the outer handler.
    Outside the main thread signals cannot be caught, and the request stays false.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    earlier = {number: signal.signal(number, request.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
    if request.signal is not None:
        signal.raise_signal(request.signal)
