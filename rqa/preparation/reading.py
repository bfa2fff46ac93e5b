"""Other projects' files row by row, whatever their size: JSONL, JSON arrays, tab-separated values, gzipped or not."""

import gzip
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rqa.runtime.errors import UserError

BLOCK = 1 << 20  # characters read at once


_BETWEEN = re.compile(r"[\s,]*")


@dataclass(frozen=True)
class Row:
    """A JSON object and where it stands: whatever is missing or of the wrong type is named by file, line and field."""

    values: dict[str, Any]
    where: str

    def wrong(self, name: str, expected: str) -> UserError:
        return UserError(f"{self.where}: field '{name}' must be {expected}")

    def text(self, *names: str, default: str | None = None) -> str:
        """The first of these fields that is there, a string or a number; without a default it must be there."""
        for name in names:
            value = self.values.get(name)
            if isinstance(value, str | int | float):
                return str(value)
            if value is not None:
                raise self.wrong(name, "a string")
        if default is None:
            raise UserError(f"{self.where}: field '{names[0]}' is missing")
        return default

    def texts(self, *names: str) -> list[str]:
        """A list of strings, none twice; one string counts as a list, a missing field as an empty one."""
        name = next((name for name in names if self.values.get(name) is not None), names[0])
        value = self.values.get(name)
        value = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self.wrong(name, "a list of strings")
        return list(dict.fromkeys(value))

    def rows(self, name: str) -> list["Row"]:
        """A list of objects; an object of equally long lists, as Parquet files give it, is turned into one."""
        value = self.values.get(name) or []
        columns = list(value.values()) if isinstance(value, dict) else []
        if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
            value = [dict(zip(value, items, strict=True)) for items in zip(*columns, strict=True)]
        if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
            raise self.wrong(name, "a list of objects")
        return [Row(row, f"{self.where}: {name}[{number}]") for number, row in enumerate(value)]


def read_rows(path: Path, key: str = "") -> Iterator[Row]:
    """Yield the objects of a JSONL file or of a JSON array, one in memory at a time.

    Args:
        key: The field whose value is the array, where the file is one object.

    Raises:
        UserError: the file is missing, not UTF-8, or not what it should be.
    """
    with _open(path) as file:
        start = file.read(BLOCK)
        array = re.search(rf'"{key}"\s*:\s*\[' if key else r"\A\s*\[", start)
        found = _array(path, file, start, array.end()) if array else _lines(path, file, start)
        for line, value in found:
            if not isinstance(value, dict):
                raise UserError(f"{path}:{line}: expected a JSON object, found {type(value).__name__}")
            yield Row(value, f"{path}:{line}")


def read_table(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield `(file:line, fields)` of each line of tab-separated values that is not blank."""
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", line.rstrip("\n").split("\t")


@contextmanager
def _open(path: Path) -> Iterator[IO[str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); convert the file to UTF-8") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path}: not a whole gzip file ({error})") from None


def _lines(path: Path, file: IO[str], start: str) -> Iterator[tuple[int, Any]]:
    number, rest = 0, start
    while rest:
        *lines, rest = rest.split("\n")
        for number, line in enumerate(lines, start=number + 1):  # noqa: B020
            if line.strip():
                yield number, _decode(path, number, line)
        block = file.read(BLOCK)
        if not block and rest:
            if rest.strip():
                yield number + 1, _decode(path, number + 1, rest)
            return
        rest += block


def _decode(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}:{number}: not valid JSON ({getattr(error, 'msg', error)})") from None


def _array(path: Path, file: IO[str], buffer: str, position: int) -> Iterator[tuple[int, Any]]:
    """Decode element by element; where one is not whole yet, read as much again and try once more."""
    decoder = json.JSONDecoder()
    line = 1 + buffer.count("\n", 0, position)
    while True:
        between = _BETWEEN.match(buffer, position)
        assert between  # nothing at all matches, too
        line, position = line + buffer.count("\n", position, between.end()), between.end()
        if buffer[position : position + 1] == "]":
            return
        try:
            value, end = decoder.raw_decode(buffer, position)
        except (ValueError, RecursionError) as error:
            block = file.read(max(BLOCK, len(buffer) - position))
            if not block:
                reason = getattr(error, "msg", error) if position < len(buffer) else "the array does not end"
                raise UserError(f"{path}:{line}: not valid JSON ({reason})") from None
            buffer, position = buffer[position:] + block, 0
            continue
        yield line, value
        line, position = line + buffer.count("\n", position, end), end
