"""The index follows the encoder: documents encoded again inside the loop, every so many steps."""

import logging
import re
import time
from collections.abc import Callable

from rqa.retrieval.retriever import Retriever
from rqa.runtime.errors import UserError

log = logging.getLogger(__name__)


class Refresher:
    """`before_step` of the loop: an index with the current weights at the first step and then on schedule.

    Args:
        schedule: Steps between two refreshes: `10`, or `0-100:10,100-1000:100` for spans of steps.
        then: Called after each refresh.

    Raises:
        UserError: the schedule cannot be read.
    """

    def __init__(self, retriever: Retriever, schedule: str, then: Callable[[], None] | None = None) -> None:
        self.retriever = retriever
        self.then = then
        self._spans = parse_schedule(schedule)

    def __call__(self, step: int) -> None:
        """Refresh if it is due after `step` optimizer steps, or if nothing is indexed yet."""
        if len(self.retriever.index) and not self.due(step):
            return
        started = time.perf_counter()
        self.retriever.refresh()
        if self.then:
            self.then()
        log.info("step %d  index refreshed in %.1f s", step, time.perf_counter() - started)

    def due(self, step: int) -> bool:
        """Whether the schedule refreshes after so many steps."""
        return step > 0 and any(first <= step < end and step % every == 0 for first, end, every in self._spans)


def parse_schedule(schedule: str) -> list[tuple[int, float, int]]:
    """Spans of (first step, end, interval).

    Raises:
        UserError: it is neither a number of steps nor a list of spans.
    """
    spans = []
    for part in schedule.split(","):
        match = re.fullmatch(r"\s*(?:(\d+)-(\d+):)?(\d+)\s*", part)
        if not match or int(match[3]) < 1 or (match[1] and int(match[1]) >= int(match[2])):
            raise UserError(f'--refresh_step {schedule}: write a number of steps, or "0-100:10,100-1000:100"')
        spans.append((int(match[1] or 0), float(match[2] or "inf"), int(match[3])))
    return spans
