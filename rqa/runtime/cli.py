"""How every executable starts and ends: allocator, process group, log; errors as one line and an exit status."""

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from rqa.runtime.allocator import tune_allocator
from rqa.runtime.errors import UserError


class _OnlyMainProcess(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or os.environ.get("RANK", "0") == "0"


def start_logging() -> None:
    """Messages of `rqa` on the standard error stream, from the main process."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(_OnlyMainProcess())
    logger = logging.getLogger("rqa")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logging.raiseExceptions = False  # a log line that a full disk refuses is no reason for a traceback


def log_to_file(path: str) -> None:
    """Send the same messages to a file, too; appended, so that a resumed run keeps its log."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    handler.addFilter(_OnlyMainProcess())
    logging.getLogger("rqa").addHandler(handler)


def run(main: Callable[[], Any]) -> None:
    """Run an executable's main function and exit.

    Status 0, or 2 with one line for a `UserError` or a full or unwritable disk; 1 with one line if another process of
    the run is gone; anything else is our mistake and shows its traceback.
    """
    tune_allocator()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    start_logging()
    try:
        main()
    except UserError as error:
        sys.exit(_report(str(error)))
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        sys.exit(_report(f"{error.filename}: {error.strerror}"))
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        _report("another process of this run has ended, and so does this one; --resume_from_checkpoint true goes on")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _is_lost_peer(error: RuntimeError) -> bool:
    """Whether an exchange between processes failed: gloo raises plain RuntimeErrors, NCCL those of its own."""
    is_nccl = type(error).__name__ in ("DistBackendError", "DistNetworkError")
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and (is_nccl or "gloo/transport" in str(error))


def _report(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
