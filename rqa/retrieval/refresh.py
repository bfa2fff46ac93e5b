"""The index follows the encoder: documents encoded again inside the loop, every so many steps."""

import copy
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
import numpy as np

from rqa.models.encoder import Encoder
from rqa.retrieval.retriever import Retriever
from rqa.runtime import distributed
from rqa.runtime.distributed import autocast
from rqa.runtime.errors import UserError, check_bounds
from rqa.runtime.files import fingerprint


@dataclass
class RefreshArguments:
    """When documents are encoded again in training, and how many of them."""

    refresh_step: str = field(
        default="10", metadata={"help": 'Steps between two refreshes of the index, or "0-100:10,100-900:50".'}
    )
    refresh_fraction: float = field(
        default=1.0,
        metadata={
            "help": "Share of the documents that a refresh encodes: up to one half those found most often since the "
            "last one, otherwise those whose embeddings are oldest."
        },
    )
    refresh_async: bool = field(
        default=False,
        metadata={"help": "Encode on a copy of the weights while training goes on; swap the index when ready."},
    )
    train_query_encoder_only: bool = field(
        default=False,
        metadata={"help": "Passages keep the initial encoder, which is saved beside the trained one; no refresh."},
    )

    def __post_init__(self) -> None:
        parse_schedule(self.refresh_step)
        check_bounds(self, "refresh_fraction", above=0, at_most=1)
        if self.train_query_encoder_only and self.cheaper:
            raise UserError(f"--train_query_encoder_only true: documents never change; leave out --{self.cheaper}")

    @property
    def cheaper(self) -> str:
        """The flag that makes a refresh cheaper; empty if there is none."""
        return "refresh_async" if self.refresh_async else "refresh_fraction" if self.refresh_fraction < 1 else ""

    def freeze_passages(self, encoder: Encoder) -> None:
        """Let passages keep the encoder that they have now, if that is asked for.

        Raises:
            UserError: the model's passages are frozen already, and all of it is to be trained.
        """
        if self.train_query_encoder_only:
            encoder.freeze_passages()
        elif encoder.passage_encoder:
            raise UserError(
                "--model_name_or_path: holds a passage encoder of its own, which stays as it is; "
                "train its encoder of questions with --train_query_encoder_only true"
            )


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


class BackgroundEncoding:
    """This process's share of some documents, encoded with the weights of now.

    It costs the memory of the weights once more until it is dropped, and on a GPU runs in a stream of its own. The
    copy has its own tokenizer, too: two threads must not share one.

    Args:
        numbers: Positions in the database, the same on every process.
        step: The optimizer steps that made the weights.
        dtype: Of autocast, which holds for one thread only.
    """

    def __init__(self, retriever: Retriever, numbers: Sequence[int], step: int, dtype: torch.dtype) -> None:
        self.numbers = numbers
        self.step = step
        self.seconds = 0.0
        self._embeddings: np.ndarray | None = None
        self._error: BaseException | None = None
        self._cancelled = threading.Event()
        self._retriever = retriever
        self._dtype = dtype
        self._encoder = copy.deepcopy(retriever.encoder.passage_side).requires_grad_(False).eval()
        self._encoder.register_forward_pre_hook(self._stop_if_cancelled)
        self._device = self._encoder.backbone.device
        self._stream = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))  # the copy is being made there
        self._thread = threading.Thread(target=self._run, name="encode documents", daemon=True)
        self._thread.start()

    def finished(self) -> bool:
        """Whether every process is done. All ask at the same step; the thread itself never talks to another process.

        Raises:
            BaseException: what ended the thread of this process.
            UserError: that of another one failed.
        """
        done = not self._thread.is_alive()
        dones, failures = distributed.total([done, done and self._error is not None])
        if failures:
            self.close()
            raise self._error or UserError("documents could not be encoded; another process says why")
        return int(dones) == distributed.world_size()

    def result(self) -> np.ndarray:
        """This process's embeddings, once it is finished. float32 [n, D]"""
        assert self._embeddings is not None, "not finished"
        return self._embeddings

    def close(self) -> None:
        """Stop before the next batch of documents, and wait for that."""
        self._cancelled.set()
        self._thread.join()

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            with (
                torch.cuda.stream(self._stream) if self._stream else nullcontext(),
                autocast(self._device, self._dtype),
            ):
                self._embeddings = self._retriever.encode(distributed.share(self.numbers), self._encoder)
        except _Cancelled:
            pass
        except BaseException as error:  # it belongs to the main thread
            self._error = error
        self.seconds = time.perf_counter() - started

    def _stop_if_cancelled(self, *_: object) -> None:
        if self._cancelled.is_set():
            raise _Cancelled


class _Cancelled(Exception):
    """Nobody waits for the embeddings any more."""


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
