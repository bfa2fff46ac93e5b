"""The index follows the encoder: documents encoded again inside the loop, every so many steps."""

import logging
import math
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
import numpy as np

from rqa.retrieval.background import BackgroundEncoding
from rqa.retrieval.retriever import Retriever
from rqa.retrieval.schedule import RefreshArguments, parse_schedule
from rqa.runtime import distributed
from rqa.runtime.files import fingerprint
from rqa.runtime.precision import autocast

log = logging.getLogger(__name__)


class Follower(Protocol):
    """What is made from a fresh index, and lasts until the next."""

    def __call__(self) -> None: ...

    def save(self, directory: Path) -> None: ...

    def load(self, directory: Path) -> None: ...


class Refresher:
    """`before_step` of the loop: an index with the current weights at the first step and then on schedule.

    Args:
        dtype: In which documents are encoded.
        then: Called after each refresh. Where passages are frozen it is called on schedule, and nothing is encoded.
            It is saved and loaded with the index if it can be.
    """

    def __init__(
        self,
        retriever: Retriever,
        arguments: RefreshArguments,
        dtype: torch.dtype = torch.float32,
        then: Follower | None = None,
    ) -> None:
        self.retriever = retriever
        self.arguments = arguments
        self.dtype = dtype
        self.then = then
        self.made_at = np.zeros(len(retriever.documents), dtype=np.int64)  # the step of each embedding's weights
        self.refreshes = 0
        self._spans = parse_schedule(arguments.refresh_step)
        self._embeddings: np.ndarray | None = None  # [N, D], kept where a refresh replaces a part of them
        self._work: BackgroundEncoding | None = None
        self._wanted = False

    def __call__(self, step: int) -> dict[str, float]:
        """Refresh if it is due after `step` optimizer steps, or if nothing is indexed yet.

        Returns:
            `index_staleness`: steps since the weights of the index's embeddings, the mean over documents; and
            `index_refreshed`, True, if the index is a new one.
        """
        refreshes = self.refreshes
        with autocast(self.retriever.encoder.backbone.device, self.dtype):
            if not len(self.retriever.index) or self._lacks_embeddings:
                self._refresh(np.arange(len(self.made_at)), step)
            elif step == 0:  # the index was opened before training
                if self.then:
                    self.then()
            elif self._frozen:
                if self.due(step) and self.then:
                    self.then()
            elif self.arguments.refresh_async:
                self._refresh_in_background(step)
            elif self.due(step):
                self._refresh(self._chosen(), step)
        if self._frozen:
            return {}
        news = {"index_staleness": step - float(self.made_at.mean())}
        return news | ({"index_refreshed": True} if self.refreshes > refreshes else {})

    def snapshot(self) -> Callable[[Path], None]:
        """What writes the index between two refreshes, so that a resumed run finds the very same documents.

        What is being encoded in the background is not kept: a resumed run begins it anew. Before the first step there
        is no index yet, and nothing is written.
        """
        found = np.array(distributed.total(self.retriever.found.tolist()))
        arrays = {
            "documents": np.array(self._documents),
            "made_at": self.made_at,
            "found": found,
            "wanted": np.array(self._wanted or self._work is not None),
        }
        if self._embeddings is not None:
            arrays["embeddings"] = self._embeddings

        def write(directory: Path) -> None:
            if not len(self.retriever.index):
                return
            np.savez(directory / "refresh.npz", **arrays)
            self.retriever.index.save(directory / "index")
            if self.then:
                self.then.save(directory)

        return write

    def load(self, directory: Path) -> None:
        """Restore what a snapshot wrote; where it is of other documents or another kind of index, encode anew."""
        if not (directory / "refresh.npz").exists():  # of a run that had not begun
            return
        with np.load(directory / "refresh.npz") as arrays:
            kept = dict(arrays)
        lacking = self.arguments.refresh_fraction < 1 and "embeddings" not in kept
        if lacking or str(kept["documents"]) != self._documents or not self.retriever.index.load(directory / "index"):
            log.warning("%s: its index is of other documents or another kind; encoding the documents anew", directory)
            return
        self.made_at, self._wanted = kept["made_at"], bool(kept["wanted"])
        self.retriever.found[:] = kept["found"] if distributed.is_main() else 0  # summed over processes when read
        self._embeddings = kept.get("embeddings") if self.arguments.refresh_fraction < 1 else None
        if self.then:
            self.then.load(directory)

    def due(self, step: int) -> bool:
        """Whether the schedule refreshes after so many steps."""
        return step > 0 and any(first <= step < end and step % every == 0 for first, end, every in self._spans)

    def close(self) -> None:
        """Give up what is being encoded in the background."""
        if self._work:
            self._work.close()
            self._work = None

    @cached_property
    def _documents(self) -> str:
        return fingerprint(*(document.fmt_content for document in self.retriever.documents))

    @property
    def _lacks_embeddings(self) -> bool:
        return self.arguments.refresh_fraction < 1 and self._embeddings is None

    @property
    def _frozen(self) -> bool:
        return self.retriever.encoder.passage_encoder is not None

    def _refresh(self, numbers: np.ndarray, step: int) -> None:
        started = time.perf_counter()
        self._replace(numbers, self.retriever.encode(distributed.share(numbers)), step)
        log.info("step %d  %d documents encoded in %.1f s", step, len(numbers), time.perf_counter() - started)

    def _refresh_in_background(self, step: int) -> None:
        """Swap in what is ready; begin what is due. What falls due while documents are encoded begins after that."""
        self._wanted |= self.due(step)
        if self._work and self._work.finished():
            work, self._work = self._work, None
            self._replace(work.numbers, work.result(), work.step)
            log.info("step %d  index of step %d swapped in after %.1f s", step, work.step, work.seconds)
        if self._wanted and not self._work:
            self._work, self._wanted = BackgroundEncoding(self.retriever, self._chosen(), step, self.dtype), False

    def _replace(self, numbers: np.ndarray, share: np.ndarray, step: int) -> None:
        embeddings = np.stack(distributed.gather(share))
        if self.arguments.refresh_fraction < 1:
            if self._embeddings is None:
                self._embeddings = embeddings
            self._embeddings[numbers] = embeddings
            embeddings = self._embeddings
        self.retriever.index.replace(embeddings)
        self.made_at[numbers] = step
        self.refreshes += 1
        if self.then:
            self.then()

    def _chosen(self) -> np.ndarray:
        found = np.array(distributed.total(self.retriever.found.tolist()))
        self.retriever.found[:] = 0
        return documents_to_encode(self.arguments.refresh_fraction, found, self.made_at)


def documents_to_encode(fraction: float, found: np.ndarray, made_at: np.ndarray) -> np.ndarray:
    """Which of N documents a refresh encodes: ceil(fraction * N) of them, in order. -> [n]

    At most half are documents found since the last refresh, the most often found first; the others are those with the
    oldest embeddings. So every document comes round within ceil(2 / fraction) refreshes, however many are found, and
    within ceil(1 / fraction) if none is.

    Args:
        found: How often each document was found. [N]
        made_at: When each document's embedding was made. [N]
    """
    n = math.ceil(fraction * len(found))
    lately = np.argsort(-found, kind="stable")[: min(n // 2, np.count_nonzero(found))]
    oldest = np.argsort(made_at, kind="stable")
    oldest = oldest[~np.isin(oldest, lately)][: n - len(lately)]
    return np.sort(np.concatenate([lately, oldest]))
