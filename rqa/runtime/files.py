"""Files that are complete or absent: atomic writes, checksums, JSON; and a store of expensive results."""

import fcntl
import gzip
import hashlib
import json
import logging
import os
import re
import shutil
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from io import BufferedIOBase
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import uuid4

from rqa.runtime.errors import UserError
from rqa.runtime.text import LONGEST, parse_json

log = logging.getLogger(__name__)

COMPLETION_MARK = "COMPLETE"
DEVICES = {Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd")}  # /dev/stdout and the like, even if it is a file
OURS = re.compile(r"\.rqa-[0-9a-f]{32}(?:-(.+))?")  # a file being written, or an old directory with its former name
SECONDS_TO_LOCK = 1  # a new temporary file is locked within this time
BIG, ENDS = 2**28, 2**20  # bytes: of larger index files only the size and both ends are checked
SECONDS_TO_WAIT = 60  # for another process's transaction


def cache_root() -> Path:
    """The directory of files that runs share: `$RQA_CACHE`, by default `~/.cache/rqa`."""
    return Path(os.environ.get("RQA_CACHE") or Path.home() / ".cache" / "rqa").expanduser()


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a path to write; on success it is renamed to `path`. See `atomic_files`."""
    with atomic_files(Path(path).parent, [Path(path).name]) as places:
        yield places[Path(path).name]


@contextmanager
def atomic_files(directory: Path, names: Iterable[str]) -> Iterator[dict[str, Path]]:
    """Yield a path to write for each name; on success all files are synced, then renamed together.

    The first file is never seen beside older versions of the others: it is deleted before they are replaced, and
    renamed last. Links are followed, and modes kept. Pipes, /dev/stdout and the like are written directly.
    """
    with ExitStack() as stack:
        places = {name: stack.enter_context(_place(directory / name)) for name in names}
        yield {name: written for name, (written, _) in places.items()}
        renamed = [(written, target) for written, target in places.values() if target]
        for written, target in renamed:
            if os.path.lexists(target):  # so that a loop of links raises an error
                shutil.copymode(target, written)
            _sync(written)
        if len(renamed) > 1:
            renamed[0][1].unlink(missing_ok=True)
        for written, target in reversed(renamed):
            os.replace(written, target)


@contextmanager
def _place(path: Path) -> Iterator[tuple[Path, Path | None]]:
    """The path to write, and the path to rename it to afterwards, if any."""
    if path.parent in DEVICES or OURS.fullmatch(path.name) or (path.exists() and not path.is_file()):
        yield path, None
        with suppress(OSError):  # where standard output is a file, later prints must follow what was written
            os.lseek(1, 0, os.SEEK_END)
    else:
        target = Path(os.path.realpath(path))
        mode = 0o600 if target.exists() else 0o666
        with beside(target, lambda new: new.touch(mode, exist_ok=False)) as temporary:
            yield temporary, target


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary directory; on success it gets its files' checksums, is synced, and becomes `path`."""
    path = Path(os.path.realpath(path))
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{path}: is not a directory; name a directory or a path that does not exist")
    with beside(path) as temporary:
        yield temporary
        files = sorted(child for child in temporary.rglob("*") if child.is_file())
        sums = {str(child.relative_to(temporary)): _sha256(child) for child in files}
        (temporary / COMPLETION_MARK).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
        for child in (*sorted(temporary.rglob("*")), temporary):
            _sync(child)
        retired = path.with_name(f"{temporary.name}-{path.name}")
        if path.exists():
            shutil.copymode(path, temporary)
            os.replace(path, retired)
        os.replace(temporary, path)
    shutil.rmtree(retired, ignore_errors=True)


@contextmanager
def beside(path: Path, make: Callable[[Path], None] = Path.mkdir) -> Iterator[Path]:
    """Make a temporary directory (or file) with a random name beside `path`; it is deleted unless renamed."""
    temporary = path.with_name(f".rqa-{uuid4().hex}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        remove_leftovers(path.parent)
        make(temporary)
        with _locked(temporary):
            yield temporary
        _sync(path.parent)
    except OSError as error:  # the error of a full disk does not name the file, which the user needs to know
        if error.errno and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True) if temporary.is_dir() else temporary.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Lock a file or directory; even a killed process releases the lock. -> whether it was free and can be locked"""
    descriptor, free = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), False
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        yield free
    finally:
        os.close(descriptor)


@contextmanager
def alone(path: str | Path) -> Iterator[None]:
    """Let only one process at a time use this path; others wait. The lock is a file that remains in the cache."""
    lock = cache_root() / "locks" / fingerprint(os.path.realpath(path))
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        with suppress(OSError):  # some network file systems have no locks
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("%s: waiting for the process that builds there", path)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


@cache
def claim(directory: Path) -> None:
    """Lock a directory for this process until it ends; refuse one that another process has locked."""
    with suppress(OSError):
        try:
            fcntl.flock(os.open(directory, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--output_dir {directory}: another run is writing there; wait for its end, or name another"
            ) from None


def remove_leftovers(directory: str | Path) -> None:
    """Delete the temporary files of killed writers; a directory that its writer had moved aside gets its name back."""
    for path in Path(directory).glob(".rqa-*"):
        ours = OURS.fullmatch(path.name)
        with suppress(OSError):
            if not ours or time.time() - path.lstat().st_mtime < SECONDS_TO_LOCK:
                continue
            with _locked(path) as free:
                if free and ours[1] and not path.with_name(ours[1]).exists():
                    os.replace(path, path.with_name(ours[1]))
                elif free:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sync(path: Path) -> None:
    """Flush a file or directory to the disk, so that no later rename reaches the disk before the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_complete(directory: str | Path) -> bool:
    """Whether `atomic_directory` finished this directory; cheap, since its files are not read."""
    return is_own_file(directory, COMPLETION_MARK)


def is_own_file(directory: str | Path, name: str) -> bool:
    """Whether this relative path is a regular file inside the directory, reached without links."""
    path = f"{os.path.realpath(directory)}/{name}"
    return os.path.isfile(path) and os.path.realpath(path) == path


def damage(directory: str | Path) -> str | None:
    """What is wrong with a directory that `atomic_directory` wrote; None if every file has its checksum."""
    directory = Path(directory)
    if not is_complete(directory):
        return "it is incomplete" if directory.is_dir() else "no such directory"
    try:
        for name, expected in (read_json(directory / COMPLETION_MARK) or {COMPLETION_MARK: ""}).items():  # {}: damage
            if not is_own_file(directory, name):
                return f"{name} is not a regular file in it"
            if _sha256(directory / name) != expected:
                return f"{name} is damaged"
    except (UserError, OSError, ValueError) as error:
        name = getattr(error, "filename", None)
        return f"{Path(name).name} cannot be read" if name else f"{COMPLETION_MARK} is damaged"
    return None


def _sha256(path: Path) -> str:
    """Checksum of a file; of a large index, which would take seconds to read, only of its size and both ends."""
    with path.open("rb") as file:
        size = path.stat().st_size
        if size <= BIG or path.suffix not in (".faiss", ".npy", ""):
            return hashlib.file_digest(file, "sha256").hexdigest()
        start = file.read(ENDS)
        file.seek(-ENDS, os.SEEK_END)
        return fingerprint(str(size), start, file.read())


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line, atomically; gzipped if the path ends in `.gz`."""
    open_file = gzip.open if str(path).endswith(".gz") else open
    with atomic_file(path) as temporary, open_file(temporary, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def append_line(path: str | Path, row: dict[str, Any]) -> None:
    """Append one JSON object to a file as a line, and sync it; if that fails, the file is unchanged.

    The file is made if absent. Threads and processes take turns. A last line that a crash cut off is ended first.
    """
    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size
        try:
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            while line:  # a nearly full disk may take only part of it
                line = line[os.write(descriptor, line) :]
            os.fsync(descriptor)
        except BaseException:
            os.ftruncate(descriptor, size)
            raise
        if not size:
            _sync(Path(path).parent)
    except OSError as error:  # it does not name the file
        error.filename = error.filename or str(path)
        raise
    finally:
        os.close(descriptor)


def read_json(path: str | Path, kind: type = dict) -> Any:
    """The value in a JSON file, which must be of this kind."""
    try:
        with reading(path) as file:
            return parse_json(file.read(LONGEST + 1), kind)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(line number, object)` for each line that is not blank, of a plain or a `.gz` file."""
    return ((number, row) for number, _, _, row in jsonl_rows(path, path))


def jsonl_rows(content: str | Path, path: str | Path) -> Iterator[tuple[int, int, int, dict[str, Any]]]:
    """Yield `(line number, byte offset, bytes, object)` for each line that is not blank; errors name `path`."""
    warned, end = False, 0
    with reading(content) as file:
        for number, line in enumerate(iter(partial(file.readline, LONGEST + 1), b""), start=1):
            end += len(line)
            try:
                if not line.decode("utf-8-sig", "replace").strip():
                    continue
                row = parse_json(line)
            except UnicodeDecodeError as error:
                hint = "convert the file to UTF-8"
                raise UserError(f"{path}:{number}: not UTF-8 text ({error.reason}); {hint}") from None
            except ValueError as error:
                reason = getattr(error, "msg", None) or str(error)
                raise UserError(f"{path}:{number}: not valid JSON ({reason}); write one JSON object a line") from None
            if not warned and (warned := b"\\ud" in line.lower() and "\ufffd" in json.dumps(row, ensure_ascii=False)):
                log.warning("%s:%d: has a lone surrogate; U+FFFD replaces it and any later one", path, number)
            yield number, end - len(line), len(line), row


@contextmanager
def reading(path: str | Path) -> Iterator[BufferedIOBase]:
    """Open a file for reading, gzipped or not; errors become UserErrors."""
    try:
        if not Path(path).is_file() and Path(path).exists():  # a pipe or a device may never end
            raise UserError(f"{path}: is not a regular file")
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); convert the file to UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a complete gzip file ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def fingerprint(*parts: str | bytes, more: Iterable[bytes] = ()) -> str:
    """A sha256 of the parts, each preceded by its length so that boundaries count; `more` may be a long iterator."""
    digest = hashlib.sha256()
    for part in chain(parts, more):
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


class Store:
    """JSON values by key in an SQLite file, which is made if absent.

    Each `put` is one transaction: all of it is kept or nothing, even if the process is killed. Several processes may
    use one file. The journal is SQLite's default, since its write-ahead log does not work on network file systems.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._one_line_for_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=SECONDS_TO_WAIT)
            self._database.execute("CREATE TABLE IF NOT EXISTS kept (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")

    def get(self, keys: Iterable[str]) -> dict[str, Any]:
        """The stored values of these keys; unknown keys are left out."""
        query = "SELECT key, value FROM kept WHERE key IN (SELECT value FROM json_each(?))"
        with self._one_line_for_errors():
            rows = self._database.execute(query, [json.dumps(list(keys))])  # one statement locks the file only once
            return {key: json.loads(value) for key, value in rows}

    def put(self, values: Mapping[str, Any]) -> None:
        """Store all these values, or none if there is an error; older values of the same keys are replaced."""
        rows = [(key, json.dumps(value)) for key, value in values.items()]
        with self._one_line_for_errors(), self._database:
            self._database.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?)", rows)

    @contextmanager
    def _one_line_for_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:
            hint = "free disk space, delete the file if it is damaged, or set another $RQA_CACHE"
            raise UserError(f"{self.path}: cannot be used as a cache ({error}); {hint}") from None
