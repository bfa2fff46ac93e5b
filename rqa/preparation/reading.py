"""Reading other projects' files of any size row by row: JSONL, JSON arrays, tab-separated values, gzipped or not."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from rqa.runtime.errors import UserError
from rqa.runtime.files import read_jsonl, reading
from rqa.runtime.text import LONGEST, finite, parse_json

START = 1 << 20  # characters read at once; the first ones distinguish arrays from JSONL
_BETWEEN = re.compile(r"\[\s*|\}\s*(?:,\s*|(?=\]))|")  # matches nothing where a comma is missing
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Row:
    """A JSON object and its place, so that an error can name the place and the field.

    Fields are named by paths: `Answer.Value` is a field of an inner object, `id|docid` the first of two that exists.
    """

    values: dict[str, Any]
    where: str

    def wrong(self, path: str, expected: str) -> UserError:
        return UserError(f"{self.where}: field '{self.find(path)[0]}' must be {expected}")

    def find(self, path: str) -> tuple[str, Any]:
        """The field's own name, and its value or None."""
        name, value = "", self.values
        for part in path.split("."):
            if not isinstance(value, dict):
                raise UserError(f"{self.where}: field '{name}' must be an object")
            names = part.split("|")
            name = next((name for name in names if value.get(name) is not None), names[0])
            value = value.get(name)
        return name, value

    def text(self, path: str, default: str | None = None) -> str:
        """A string or a number, as text; without a default it is required."""
        name, value = self.find(path)
        if isinstance(value, str | int | float):
            return str(value)
        if value is not None:
            raise self.wrong(path, "a string")
        if default is None:
            raise UserError(f"{self.where}: field '{name}' is missing")
        return default

    def number(self, path: str) -> float:
        try:
            return finite(float, self.text(path))
        except ValueError:
            raise self.wrong(path, "a number") from None

    def texts(self, path: str) -> list[str]:
        """A list of distinct strings; a single string counts as a list, a missing field as an empty list."""
        value = self.find(path)[1]
        value = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self.wrong(path, "a list of strings")
        return list(dict.fromkeys(value))

    def rows(self, path: str) -> list["Row"]:
        """A list of objects; an object of equally long lists, as read from Parquet files, is converted to one."""
        name, value = self.find(path)
        value = value or []
        columns = list(value.values()) if isinstance(value, dict) else []
        if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
            value = [dict(zip(value, items, strict=True)) for items in zip(*columns, strict=True)]
        if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
            raise self.wrong(path, "a list of objects")
        return [Row(row, f"{self.where}: {name}[{number}]") for number, row in enumerate(value)]


def read_rows(path: Path, key: str = "") -> Iterator[Row]:
    """Yield the objects of JSONL, of a JSON array, or of the array at `key` of an object; one in memory at a time."""
    with reading(path) as unpacked, TextIOWrapper(unpacked, "utf-8-sig") as file:
        text = file.read(START)
        begin = (re.search(rf'"{key}"\s*:\s*\[', text) if key else None) or re.match(r"\s*\[", text)
        if begin is None:
            yield from (Row(row, f"{path}:{line}") for line, row in read_jsonl(path))
            return
        at, number = begin.end() - 1, 1
        while True:
            start = next(_BETWEEN.finditer(text, at)).end()
            try:
                if text.startswith("]", start):
                    return
                end = _DECODER.raw_decode(text, start)[1]
                row = parse_json(text[start:end])
            except (ValueError, RecursionError) as error:  # is an error unless the item continues in unread text
                if len(text) - at < LONGEST and (more := file.read(max(START, len(text) - at))):
                    text, at = text[at:] + more, 0
                    continue
                reason = getattr(error, "msg", None) or str(error)
                raise UserError(f"{path}: item {number}: not valid JSON ({reason})") from None
            yield Row(row, f"{path}: item {number}")
            at, number = end - 1, number + 1


def read_table(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield `(file:line, fields)` of each line of tab-separated values that is not blank."""
    with reading(path) as unpacked, TextIOWrapper(unpacked, "utf-8-sig") as file:
        for number, line in enumerate(iter(partial(file.readline, LONGEST + 1), ""), start=1):
            if len(line) > LONGEST:
                raise UserError(f"{path}:{number}: is longer than {LONGEST >> 20} million characters; split the line")
            if line.strip():
                yield f"{path}:{number}", line.rstrip("\n").split("\t")
