"""The store: what it was given comes back, from any process; a bad file or disk is one line."""

import multiprocessing
import os
import signal
import sqlite3
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from fakes import full_disk

from rqa.runtime.errors import UserError
from rqa.runtime.files import Store

REFUSED = r"s\.sqlite: cannot be used as a cache"


def test_what_was_put_comes_back_and_outlives_the_store_and_the_latest_value_counts(tmp_path: Path) -> None:
    store = Store(tmp_path / "new/deep/s.sqlite")
    store.put({"text": "old"})
    values = {"text": "ein Glas Öl \ud800", "number": -1.25, "list": [1, None, {"a": True}], "none": None}
    store.put(values)
    store.put({})
    assert Store(tmp_path / "new/deep/s.sqlite").get([*values, *map(str, range(100_000))]) == values
    assert store.get([]) == {}


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
    names = [f"{name}/{i}/{part}" for name in "abcd" for i in range(30) for part in range(3)]
    assert Store(tmp_path / "s.sqlite").get(names).keys() == {*names[: 3 * (30 + 30 + 30 + 21)]}


def keep_no_json(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("UPDATE kept SET value = '{'")


@pytest.mark.parametrize("harm", [lambda path: path.write_text("not a database " * 1000), keep_no_json])
def test_a_damaged_file_is_named(harm: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    Store(path).put({"a": 1})
    harm(path)
    with pytest.raises(UserError, match=REFUSED):
        Store(path).get(["a"])


def test_a_full_disk_is_one_line_and_loses_nothing_that_was_kept_and_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=REFUSED + r" \(.*Not a directory"):
        Store(tmp_path / "file/deep/s.sqlite")
    with full_disk(0), pytest.raises(UserError, match=REFUSED):
        Store(tmp_path / "none" / "s.sqlite")
    store = Store(tmp_path / "s.sqlite")
    store.put({"a": 1})
    with full_disk(40_000), pytest.raises(UserError, match=REFUSED):
        store.put({str(number): "x" * 1000 for number in range(100)})
    store.put({"b": 2})
    assert store.get(["a", "0", "b"]) == {"a": 1, "b": 2}
