"""Files that are whole or absent: atomic writes, checksums, JSON; and a store of what was expensive to compute."""

import gzip
import hashlib
import json
import logging
import os
import shutil
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from io import BufferedIOBase
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import uuid4

from rqa.runtime.errors import UserError
from rqa.runtime.text import parse_json

log = logging.getLogger(__name__)

COMPLETION_MARK = "COMPLETE"
KEYS_PER_QUERY = 500  # SQLite built with its oldest limit takes 999
LONGEST = 2**28  # bytes of a JSON file, or of a line
SECONDS_TO_WAIT = 60  # for another process's transaction


def cache_root() -> Path:
    """Where what may be reused between runs lives: `$RQA_CACHE`, by default `~/.cache/rqa`."""
    return Path(os.environ.get("RQA_CACHE") or Path.home() / ".cache" / "rqa").expanduser()


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and takes `path`'s name."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _renaming_to(path):
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary directory; on success it is marked complete (with checksums), synced, and is `path`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    retired = temporary.with_suffix(".old")
    try:
        with _renaming_to(path):
            temporary.mkdir()
            yield temporary
            files = sorted(child for child in temporary.rglob("*") if child.is_file())
            sums = {str(child.relative_to(temporary)): _sha256(child) for child in files}
            (temporary / COMPLETION_MARK).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
            for child in (*sorted(temporary.rglob("*")), temporary):
                _sync(child)
            if path.exists():
                os.replace(path, retired)
            os.replace(temporary, path)
    finally:
        for left in (temporary, retired):
            shutil.rmtree(left, ignore_errors=True)


def _sync(path: Path) -> None:
    """Flush a file or directory to the disk, so that a rename after it never precedes its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _renaming_to(path: Path) -> Iterator[None]:
    """Make the directory of `path`, and afterwards sync it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
        _sync(path.parent)
    except OSError as error:  # a full disk does not say which file it refused; the user needs to know
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def is_complete(directory: str | Path) -> bool:
    """Whether `atomic_directory` finished this directory; cheap, its files are not read."""
    return (Path(directory) / COMPLETION_MARK).is_file()


def damage(directory: str | Path) -> str | None:
    """What is wrong with a directory that `atomic_directory` should have written; None if every file is as it was."""
    directory = Path(directory)
    if not is_complete(directory):
        return "it is incomplete" if directory.is_dir() else "no such directory"
    try:
        sums = parse_json((directory / COMPLETION_MARK).read_bytes())
        for name, expected in sums.items():
            if _sha256(directory / name) != expected:
                return f"{name} is damaged"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        name = getattr(error, "filename", None)
        return f"{Path(name).name} cannot be read" if name else f"{COMPLETION_MARK} is damaged"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_leftovers(directory: str | Path) -> None:
    """Delete what a crash left of `atomic_file` and `atomic_directory`; no process may be writing there."""
    for path in sorted(Path(directory).glob(".*.tmp")) + sorted(Path(directory).glob(".*.old")):
        original = path.with_name(path.name[1:].rsplit(".", 2)[0])
        if path.suffix == ".old" and not original.exists():  # the crash came between `atomic_directory`'s two renames
            os.replace(path, original)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_json(path: str | Path, kind: type = dict) -> Any:
    """The value in a JSON file, which must be of this kind."""
    with reading(path) as file:
        data = file.read(LONGEST + 1)
    try:
        return _parse(data, kind)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(line number, object)` for each line that is not blank; of a `.gz`, too."""
    mended = False
    with reading(path) as file:
        for number, line in enumerate(iter(partial(file.readline, LONGEST + 1), b""), start=1):
            try:
                if not line.decode("utf-8-sig", "replace").strip():
                    continue
                row = _parse(line, dict)
            except UnicodeDecodeError as error:
                cure = "convert the file to UTF-8"
                raise UserError(f"{path}:{number}: not UTF-8 text ({error.reason}); {cure}") from None
            except ValueError as error:
                reason = getattr(error, "msg", None) or str(error)
                raise UserError(f"{path}:{number}: not valid JSON ({reason}); write one JSON object a line") from None
            if not mended and (mended := b"\\ud" in line.lower() and "\ufffd" in json.dumps(row, ensure_ascii=False)):
                log.warning("%s:%d: holds half a character; U+FFFD takes its place here and further on", path, number)
            yield number, row


def _parse(data: bytes, kind: type) -> Any:
    if len(data) > LONGEST:
        raise ValueError(f"longer than {LONGEST >> 20} MiB")
    return parse_json(data, kind)


@contextmanager
def reading(path: str | Path) -> Iterator[BufferedIOBase]:
    """An open file, unpacked if it is gzipped; one line for what is wrong with it."""
    try:
        if not Path(path).is_file() and Path(path).exists():  # a pipe may never end, nor a device
            raise UserError(f"{path}: is no regular file")
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); convert the file to UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def fingerprint(*parts: str | bytes, more: Iterable[bytes] = ()) -> str:
    """A sha256 over the parts, each preceded by its length so that boundaries count; `more` come one at a time."""
    digest = hashlib.sha256()
    for part in chain(parts, more):
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


class Store:
    """JSON values by key, in one SQLite file, which is made if absent.

    Each `put` is one transaction: it is kept whole or not at all, whatever kills the process. Several processes may
    use one file. The journal is SQLite's default, since its write-ahead log does not work on network file systems.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._one_line_for_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=SECONDS_TO_WAIT)
            self._database.execute("CREATE TABLE IF NOT EXISTS kept (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")

    def get(self, keys: Iterable[str]) -> dict[str, Any]:
        """The values of those keys that are kept."""
        names = list(keys)
        found: dict[str, Any] = {}
        with self._one_line_for_errors():
            for start in range(0, len(names), KEYS_PER_QUERY):
                part = names[start : start + KEYS_PER_QUERY]
                query = f"SELECT key, value FROM kept WHERE key IN ({','.join('?' * len(part))})"
                found.update((key, json.loads(value)) for key, value in self._database.execute(query, part))
        return found

    def put(self, values: Mapping[str, Any]) -> None:
        """Keep all these values, or on an error none; a key's older value is replaced."""
        rows = [(key, json.dumps(value)) for key, value in values.items()]
        with self._one_line_for_errors(), self._database:
            self._database.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?)", rows)

    @contextmanager
    def _one_line_for_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:
            cure = "free its disk, delete the file if it is damaged, or set another $RQA_CACHE"
            raise UserError(f"{self.path}: nothing can be kept there ({error}); {cure}") from None
