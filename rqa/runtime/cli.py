"""Around every executable: allocator, log, progress, exit status, and signals that end work between two steps."""

import ctypes
import logging
import os
import platform
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from errno import EDQUOT, EIO, ENOSPC
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from rqa.runtime.errors import UserError

log = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
THEIR_SETTINGS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
SECONDS_BETWEEN_LINES = 30  # of progress, where there is no terminal
# What a terminal obeys, what turns the direction of text, and halves of characters, which no encoding has.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def run(main: Callable[[], Any]) -> None:
    """Run an executable's main function and exit.

    Status 0, or 2 with one line for a `UserError` or a full or unwritable disk; 1 with one line if another process of
    the run is gone; as a signal ends it, if nobody reads its output; anything else is our mistake, with its traceback.
    """
    tune_allocator()
    quiet = {"TOKENIZERS_PARALLELISM": "true", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    # oneDNN keeps 1,024 products of different shapes, in bf16 on a CPU 0.6 MiB each; packed batches never repeat one.
    quiet["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "128"
    os.environ |= {name: value for name, value in quiet.items() if name not in os.environ}
    logger = logging.getLogger("rqa")
    logger.handlers, logger.propagate = [], False
    logger.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a log line that a full disk refuses is no reason for a traceback
    log_to()
    if sys.stdout:
        with suppress(AttributeError):  # in a notebook, say
            sys.stdout.reconfigure(errors="backslashreplace")  # as standard error: what it cannot encode is no mistake
        write = sys.stdout.write
        sys.stdout.write = lambda text: write(printable(text))
    try:
        main()
        print(end="", flush=True)
        return
    except UserError as error:
        status, message = 2, str(error)
    except BrokenPipeError:  # nobody reads its output any more, as behind `| head`
        status, message = 128 + signal.SIGPIPE, ""
    except OSError as error:
        if not error.strerror or (error.filename is None and error.errno not in (ENOSPC, EDQUOT, EIO)):
            raise
        status, message = 2, f"{error.filename or 'standard output'}: {error.strerror}"
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors, NCCL those of its own
        is_nccl = type(error).__name__ in ("DistBackendError", "DistNetworkError")
        if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not (is_nccl or "gloo/transport" in str(error)):
            raise
        message = "another process of this run has ended, and so does this one; --resume_from_checkpoint true goes on"
        status = 1
    except KeyboardInterrupt:
        sys.exit(130)
    with suppress(OSError):
        print(f"error: {printable(message)}\n" if message else "", end="", file=sys.stderr)
    try:
        print(end="", flush=True)
    except OSError:  # it would fail once more when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(status)


def told(executable: Path, words: Sequence[str], flags: Mapping[str, object], launcher: str = "") -> list[str]:
    """The line that runs an executable of this toolkit, printed as one to paste; `launcher` takes Python's place."""
    start, rest = shlex.split(launcher), [*words, *as_words(flags)]
    print("\n$ " + shlex.join([*start, os.path.relpath(executable), *rest]), flush=True)
    return [*(start or [sys.executable]), str(executable), *rest]


def as_words(flags: Mapping[str, object]) -> list[str]:
    """Flags as a command line has them."""
    values = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in flags.items()}
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey: `\\x1b` is written out."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def tune_allocator() -> None:
    """Have large blocks come from the heap, and the heap keep what is freed. Call it before the first large allocation.

    It does nothing without glibc, and nothing where the user has chosen an allocator (`LD_PRELOAD`) or its settings
    (`MALLOC_*`, `GLIBC_TUNABLES`). Source: mallopt(3). On CUDA, segments that grow leave no gaps between batches of
    different lengths; `PYTORCH_*ALLOC_CONF` says otherwise. Source: "Memory management" in PyTorch's CUDA notes.
    """
    if not any(name.startswith("PYTORCH_") and name.endswith("ALLOC_CONF") for name in os.environ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(THEIR_SETTINGS) for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def trim_heap() -> None:
    """Give back to the system what `tune_allocator` has the heap keep, where long work leaves it in pieces."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def release_threads() -> None:
    """End the threads that OpenMP keeps for the calling one; they come back when they are needed.

    GNU's OpenMP has waiting threads sleep instead of spin while a process has more threads than cores, idle ones
    included: beside those of another thread, SmolLM2-135M took 63 ms a token instead of 45 (2 cores).
    """
    with suppress(OSError, AttributeError):  # without GNU's OpenMP
        ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD).omp_pause_resource_all(2)  # omp_pause_hard


def log_to(path: str | None = None) -> None:
    """Send messages of `rqa`, from the main process, to standard error or, appended, to a file."""
    handler = logging.FileHandler(path, encoding="utf-8") if path else logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", None if path else "%H:%M:%S"))
    handler.addFilter(_is_shown)
    logging.getLogger("rqa").addHandler(handler)


def _is_shown(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), ()
    return record.levelno >= logging.ERROR or os.environ.get("RANK", "0") == "0"


def progress(items: Iterable[Any] | None = None, *, disable: bool = False, leave: bool = False, **options: Any) -> tqdm:
    """tqdm with tqdm's arguments: a bar on a terminal, elsewhere a log line every half minute."""
    kind = tqdm if sys.stderr.isatty() else _ProgressLines
    options |= {"disable": True} if disable else {}  # otherwise $TQDM_DISABLE decides
    return kind(items, leave=leave, **options)


class _ProgressLines(tqdm):
    """A bar without its carriage returns, which make a file of them unreadable."""

    def __init__(self, iterable: Iterable[Any] | None, **options: Any) -> None:
        self.started = self.last_line = time.monotonic()
        super().__init__(iterable, file=StringIO(), mininterval=1, **options)

    def display(self, *_: object, **__: object) -> None:
        now = time.monotonic()
        if now < self.last_line + SECONDS_BETWEEN_LINES:
            return
        self.last_line = now
        done = f"{self.n:,} of {self.total:,}" if self.total else f"{self.n:,}"
        rate = (self.n - self.initial) / (now - self.started)
        left = f", {self.format_interval((self.total - self.n) / rate)} left" if self.total and rate else ""
        log.info("%s: %s, %s/s%s", self.desc, done, f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}", left)


@contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT inside the block; a second one of a kind acts as it would have without us."""
    received: list[int] = []

    def receive(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        signal.signal(signum, signal.SIG_DFL if signum == signal.SIGTERM else signal.default_int_handler)

    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
