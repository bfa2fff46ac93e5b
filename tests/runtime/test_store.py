"""The store: what it was given comes back, from any process; a bad file or disk is one line."""

import multiprocessing
import os
import resource
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from rqa.runtime.errors import UserError
from rqa.runtime.files import Store


def test_what_was_put_comes_back_and_outlives_the_store(tmp_path: Path) -> None:
    values = {"text": "ein Glas Öl \ud800", "number": -1.25, "list": [1, None, {"a": True}], "none": None}
    Store(tmp_path / "new/deep/s.sqlite").put(values)
    assert Store(tmp_path / "new/deep/s.sqlite").get([*values, "absent"]) == values


def test_more_keys_than_one_query_takes(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")
    values = {str(number): number for number in range(2345)}
    store.put(values)
    assert store.get(values) == values
    assert store.get([]) == {}


def test_a_later_value_replaces_an_earlier_one(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")
    store.put({"a": 1, "b": 2})
    store.put({"a": 3})
    store.put({})
    assert store.get("ab") == {"a": 3, "b": 2}


def put_alone(path: Path, name: str, die: bool, together: Barrier) -> None:
    together.wait(60)
    store = Store(path)
    for number in range(30):
        store.put({f"{name}/{number}/{part}": number for part in range(3)})
        if die and number == 20:
            os.kill(os.getpid(), signal.SIGKILL)


def test_processes_open_and_write_one_file_at_the_same_time_and_a_kill_leaves_whole_batches(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    together = fork.Barrier(4)
    arguments = [(tmp_path / "s.sqlite", name, name == "d", together) for name in "abcd"]
    workers = [fork.Process(target=put_alone, args=each) for each in arguments]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0, 0, -signal.SIGKILL]
    expected = {f"{name}/{i}/{part}" for name in "abcd" for i in range(21 if name == "d" else 30) for part in range(3)}
    names = [f"{name}/{i}/{part}" for name in "abcd" for i in range(30) for part in range(3)]
    assert set(Store(tmp_path / "s.sqlite").get(names)) == expected


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "s.sqlite").write_text("not a database " * 1000)
    with pytest.raises(UserError, match=r"s\.sqlite: nothing can be kept there \(file is not a database\)"):
        Store(tmp_path / "s.sqlite")


def test_a_file_damaged_in_the_middle_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    values = {str(number): "x" * 100 for number in range(2000)}
    Store(path).put(values)
    data = bytearray(path.read_bytes())
    data[8192:-4096] = b"\xff" * (len(data) - 8192 - 4096)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"s\.sqlite: nothing can be kept there"):
        Store(path).get(values)


def test_a_value_that_is_not_json_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")
    store.put({"a": 1})
    with sqlite3.connect(tmp_path / "s.sqlite") as database:
        database.execute("UPDATE kept SET value = '{'")
    with pytest.raises(UserError, match=r"s\.sqlite: nothing can be kept there"):
        store.get(["a"])


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"s\.sqlite: nothing can be kept there \(.*Not a directory"):
        Store(tmp_path / "file/deep/s.sqlite")


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: the kernel refuses the write, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_loses_nothing_that_was_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")
    store.put({"a": 1})
    with full_disk(40_000), pytest.raises(UserError, match=r"s\.sqlite: nothing can be kept there"):
        store.put({str(number): "x" * 1000 for number in range(100)})
    assert store.get(["a", "0"]) == {"a": 1}
    store.put({"b": 2})
    assert store.get(["b"]) == {"b": 2}


def test_a_disk_that_is_full_from_the_start_is_one_line(tmp_path: Path) -> None:
    with full_disk(0), pytest.raises(UserError, match=r"s\.sqlite: nothing can be kept there"):
        Store(tmp_path / "s.sqlite")
