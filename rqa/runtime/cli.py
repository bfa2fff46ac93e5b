"""The frame of every executable: allocator, log, progress, exit status, and deferred signals."""

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
SECONDS_BETWEEN_LINES = 30  # between progress lines in a log
# Control characters, characters that change the direction of text, and lone surrogates, which cannot be encoded.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def run(main: Callable[[], Any]) -> None:
    """Run an executable's main function and exit.

    The status is 0; 2, with a one-line message, after a `UserError` or when a disk is full or cannot be written; 1,
    with a one-line message, when another process of the run has died; 141 when nobody reads the output any more; 130
    after Ctrl-C. Any other exception is a bug of ours and keeps its traceback.
    """
    tune_allocator()
    # oneDNN caches 1,024 kernels by shape, each 0.6 MiB in bf16 on a CPU; packed batches never repeat a shape.
    defaults = {"TOKENIZERS_PARALLELISM": "true", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}
    os.environ |= {name: value for name, value in defaults.items() if name not in os.environ}
    if "TRANSFORMERS_VERBOSITY" not in os.environ:  # which transformers read when it was imported
        logging.getLogger("transformers").setLevel(logging.ERROR)
    logger = logging.getLogger("rqa")
    logger.handlers, logger.propagate = [], False
    logger.setLevel(logging.INFO)
    logging.raiseExceptions = False  # no traceback when a full disk refuses a log line
    log_to()
    if sys.stdout:
        with suppress(AttributeError):  # a notebook's output cannot be reconfigured
            sys.stdout.reconfigure(errors="backslashreplace")  # escapes what it cannot encode, as standard error does
        write = sys.stdout.write
        sys.stdout.write = lambda text: write(printable(text))
    try:
        main()
        print(end="", flush=True)
        return
    except UserError as error:
        status, message = 2, str(error)
    except BrokenPipeError:  # nobody reads the output any more, as in `| head`
        status, message = 128 + signal.SIGPIPE, ""
    except OSError as error:
        if not error.strerror or (error.filename is None and error.errno not in (ENOSPC, EDQUOT, EIO)):
            raise
        status, message = 2, f"{error.filename or 'standard output'}: {error.strerror}"
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors, NCCL its own subclasses
        is_nccl = type(error).__name__ in ("DistBackendError", "DistNetworkError")
        if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not (is_nccl or "gloo/transport" in str(error)):
            raise
        message = "another process of this run has ended, so this one ends; continue with --resume_from_checkpoint true"
        status = 1
    except KeyboardInterrupt:
        sys.exit(130)
    with suppress(OSError):
        print(f"error: {printable(message)}\n" if message else "", end="", file=sys.stderr)
    try:
        print(end="", flush=True)
    except OSError:  # Python's own flush at exit would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(status)


def print_command(executable: Path, words: Sequence[str], flags: Mapping[str, object], launcher: str = "") -> list[str]:
    """Print the command that runs an executable of this toolkit. -> its words, for `subprocess`

    `launcher`, such as torchrun and its flags, replaces the Python interpreter.
    """
    start, rest = shlex.split(launcher), [*words, *as_words(flags)]
    print("\n$ " + shlex.join([*start, os.path.relpath(executable), *rest]), flush=True)
    return [*(start or [sys.executable]), str(executable), *rest]


def as_words(flags: Mapping[str, object]) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", as_word(value))]


def as_word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def printable(text: str) -> str:
    """Text with what a terminal would interpret escaped, such as `\\x1b`."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def tune_allocator() -> None:
    """Make glibc's malloc take large blocks from the heap, and keep freed memory. Call it before large allocations.

    Without glibc, or where the user has set an allocator (`LD_PRELOAD`) or its options (`MALLOC_*`, `GLIBC_TUNABLES`),
    malloc stays as it is. Source: mallopt(3). On CUDA, expandable segments avoid gaps between batches of different
    lengths, unless `PYTORCH_*ALLOC_CONF` is set. Source: "Memory management" in PyTorch's CUDA notes.
    """
    if not any(name.startswith("PYTORCH_") and name.endswith("ALLOC_CONF") for name in os.environ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(THEIR_SETTINGS) for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # never trim


def trim_heap() -> None:
    """Return the heap's free memory to the system, after long work that fragments it; see `tune_allocator`."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def release_threads() -> None:
    """End the OpenMP threads of the calling thread; OpenMP starts them again when they are needed.

    While a process has more threads than cores, idle ones included, GNU OpenMP's waiting threads sleep instead of
    spinning: with a second pool alive, SmolLM2-135M took 63 ms per token instead of 45 (2 cores).
    """
    with suppress(OSError, AttributeError):  # not GNU's OpenMP
        ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD).omp_pause_resource_all(2)  # omp_pause_hard


def log_to(path: str | None = None) -> None:
    """Send messages of `rqa` to standard error, or append them to a file; only errors, if not the main process."""
    handler = logging.FileHandler(path, encoding="utf-8") if path else logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", None if path else "%H:%M:%S"))
    handler.addFilter(_is_shown)
    logging.getLogger("rqa").addHandler(handler)


def _is_shown(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), ()
    return record.levelno >= logging.ERROR or os.environ.get("RANK", "0") == "0"


def progress(items: Iterable[Any] | None = None, *, disable: bool = False, leave: bool = False, **options: Any) -> tqdm:
    """A tqdm bar on a terminal, with tqdm's arguments; elsewhere a log line every 30 seconds."""
    kind = tqdm if sys.stderr.isatty() else _ProgressLines
    options |= {"disable": True} if disable else {}  # otherwise $TQDM_DISABLE decides
    return kind(items, leave=leave, **options)


class _ProgressLines(tqdm):
    """A bar that writes log lines, since carriage returns make a log file unreadable."""

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
    """Collect SIGTERM and SIGINT inside the block; a second signal of the same kind has its default effect."""
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
