"""Documents encoded while training goes on: in a thread, on a copy of the weights."""

import copy
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import numpy as np

from rqa.retrieval.retriever import Retriever
from rqa.runtime import distributed
from rqa.runtime.errors import UserError
from rqa.runtime.precision import autocast


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
