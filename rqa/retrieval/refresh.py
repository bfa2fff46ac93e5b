"""Refresh of the index during training: documents are encoded again with the current weights, on a schedule."""

import copy
import json
import logging
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import numpy as np

from rqa.documents import passages_of
from rqa.models.encoder import Encoder
from rqa.retrieval.faiss_index import FaissIndex
from rqa.retrieval.retriever import PassageRetriever, Retriever, index_at
from rqa.runtime import distributed
from rqa.runtime.errors import UserError
from rqa.runtime.files import fingerprint, read_json
from rqa.runtime.flags import Arguments, flag

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RefreshArguments(Arguments):
    """Refreshes of the index during training."""

    refresh_step: str = flag("100", 'Steps between two refreshes of the index, or spans such as "0-100:10,100-900:50".')
    refresh_async: bool = flag(
        False, "Whether to encode documents in the background while training; runs are then not reproducible."
    )
    train_query_encoder_only: bool = flag(
        False, "Whether passages keep the initial encoder, which is saved beside the trained one.", rare=True
    )

    def check(self) -> None:
        schedule(self.refresh_step)
        if self.train_query_encoder_only and self.refresh_async:
            raise UserError("--train_query_encoder_only true: passages are never encoded again; remove --refresh_async")

    def freeze_passages(self, encoder: Encoder) -> None:
        """Freeze the passage encoder if `train_query_encoder_only`."""
        if self.train_query_encoder_only:
            encoder.freeze_passages()
        elif encoder.passage_encoder:
            advice = "add --train_query_encoder_only true to train the query encoder"
            raise UserError(f"--model_name_or_path: has a separate passage encoder, which cannot be trained; {advice}")


def schedule(written: str) -> Callable[[int], bool]:
    """A function of the steps done: whether a refresh is due."""
    spans: list[tuple[int, float, int]] = []  # first step, end, interval
    for part in written.split(","):
        match = re.fullmatch(r"\s*(?:(\d+)-(\d+):)?(\d+)\s*", part)
        if not match or int(match[3]) < 1 or (match[1] and int(match[1]) >= int(match[2])):
            raise UserError(f'--refresh_step {written}: write a number of steps, or "0-100:10,100-1000:100"')
        spans.append((int(match[1] or 0), float(match[2] or "inf"), int(match[3])))
    return lambda step: step > 0 and any(first <= step < end and step % every == 0 for first, end, every in spans)


class Refresher:
    """`before_step` of the loop, and a `LiveState`: refreshes the index before step 0 and then on schedule.

    `then`, such as CTL's mined negatives, is called after each refresh, and is saved and loaded with the index. If
    passages are frozen, it is called on schedule but nothing is encoded.
    """

    retriever: Any  # a `Retriever`; another kind only if nothing is ever encoded

    def __init__(self, retriever: PassageRetriever, flags: Any, then: Any = None) -> None:
        self.retriever, self.flags, self.then = retriever, flags, then
        self.made_at = 0  # the step whose weights made the index; if frozen, the step of the last call of `then`
        self._begun_at = 0  # the step whose weights encode in the background
        self.due = schedule(flags.refresh_step)
        self._work: BackgroundEncoding | None = None
        self._ready = False  # whether there is a complete index with its `then`

    def __call__(self, step: int) -> dict[str, float]:
        """Refresh if it is due after `step` optimizer steps, or if nothing is indexed yet. -> statistics"""
        index, frozen = self.retriever.index, self.retriever.encoder.passage_encoder is not None
        if not len(index):
            self._refresh(step)
        elif step == 0 or (frozen and self.then and self.due(step)):  # an index from disk, or frozen passages
            self._follow(step)
        elif self.flags.refresh_async and not frozen:
            self._refresh_in_background(step)
        elif self.due(step) and not frozen:
            self._refresh(step)
        if frozen:
            return {}
        news = {"index_staleness": float(step - self.made_at)}
        return news | ({} if self.retriever.index is index else {"index_refreshed": 1.0})

    @property
    def version(self) -> str | None:
        """The name of the present index in this run; None before there is one."""
        return f"index-{self.made_at}" if self._ready else None

    def collect(self) -> None:
        if isinstance(index := self.retriever.index, FaissIndex):
            index.collect()

    def save(self, directory: Path) -> None:
        """Write the index and `then`, so that a resumed run finds the very same documents."""
        state = {"made_at": self.made_at, "documents": self._documents()}
        if isinstance(index := self.retriever.index, FaissIndex):
            index.save(directory / "index")
        elif index is not None:  # Milvus stores it
            state |= {"index_path": index.path, "version": index.version}
        (directory / "refresh.json").write_text(json.dumps(state), encoding="utf-8")
        if self.then:
            self.then.save(directory)

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote; if it is for other documents or another kind of index, encode again."""
        state = read_json(directory / "refresh.json")
        index, where = self.retriever.index, directory / "index"
        if path := state.get("index_path"):
            index, where = index_at(self.retriever.flags.index_path or path, index.documents, index.flags), None
        same = state["documents"] == self._documents() and (index is None or index.load(where))
        if not same or (index is not None and where is None and index.version != state["version"]):
            log.warning("%s: its index has other documents or another kind; encoding the documents again", directory)
            return
        self.retriever.index, self._ready = index, True
        self.made_at = self._begun_at = state["made_at"]
        if self.then:
            self.then.load(directory)

    def close(self) -> None:
        if self._work:
            self._work.close()
            self._work = None

    def _documents(self) -> str:
        return fingerprint(passages_of(self.retriever.documents).tobytes())

    def _refresh(self, step: int) -> None:
        started = time.perf_counter()
        self.retriever.refresh()
        log.info("step %d  documents encoded in %.1f s", step, time.perf_counter() - started)
        self._begun_at = step
        self._follow(step)

    def _refresh_in_background(self, step: int) -> None:
        """Swap in a finished index; begin the next if one is due, or fell due during the previous one."""
        if self._work and self._work.finished():
            work, self._work = self._work, None
            self.retriever.replace(work.embeddings.result())
            log.info("step %d  index of step %d swapped in after %.1f s", step, self._begun_at, work.seconds)
            self._follow(self._begun_at)
        if not self._work and any(map(self.due, range(self._begun_at + 1, step + 1))):
            self._work, self._begun_at = BackgroundEncoding(self.retriever), step

    def _follow(self, step: int) -> None:
        self.made_at = step
        if self.then:
            self.then()
        self._ready = True


class BackgroundEncoding:
    """Encodes this process's share of the documents with a copy of the present weights while training continues.

    The copy costs memory until the object is dropped; on a GPU it runs in its own stream. It includes the tokenizer,
    which two threads must not share.
    """

    def __init__(self, retriever: Retriever) -> None:
        self.seconds = 0.0
        self._cancelled = threading.Event()
        self._retriever = retriever
        self._encoder = copy.deepcopy(retriever.encoder.passage_side).requires_grad_(False).eval()
        self._encoder.register_forward_pre_hook(self._stop_if_cancelled)
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())  # which makes the copy
        self.embeddings = ThreadPoolExecutor(1, "encode documents").submit(self._run)

    def finished(self) -> bool:
        """Whether every process is done; all call it at the same step. Raises the error of any thread."""
        done = self.embeddings.done()
        error = self.embeddings.exception() if done else None
        dones, failures = distributed.total([done, error is not None])
        if failures:
            self.close()
            raise error or UserError("another process could not encode its documents; its log says why")
        return int(dones) == distributed.world_size()

    def close(self) -> None:
        """Stop before the next batch of documents, and wait for that."""
        self._cancelled.set()
        wait([self.embeddings])

    def _run(self) -> np.ndarray:
        """Embeddings of this process's documents. -> float32 [n, D]"""
        started = time.perf_counter()
        with torch.cuda.stream(self._stream):  # None: nothing changes
            embeddings = self._retriever.encode(self._encoder, desc=None)
        self.seconds = time.perf_counter() - started
        return embeddings

    def _stop_if_cancelled(self, *_: object) -> None:
        if self._cancelled.is_set():
            raise InterruptedError("the embeddings are no longer needed")
