"""SIGTERM and Ctrl-C as a wish that work in steps can honour between two of them."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """Whether somebody asked this process to stop."""

    def __init__(self) -> None:
        self.requested = False

    def request(self, signum: int, frame: FrameType | None) -> None:
        """Remember the first signal; a second one acts as it would have without us."""
        self.requested = True
        signal.signal(signum, signal.SIG_DFL if signum == signal.SIGTERM else signal.default_int_handler)


@contextmanager
def deferred_signals() -> Iterator[Interruption]:
    """Turn SIGTERM and SIGINT into `Interruption.requested` inside the block."""
    interruption = Interruption()
    before = {number: signal.signal(number, interruption.request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
