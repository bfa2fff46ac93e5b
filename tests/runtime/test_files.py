"""What is written is whole or absent, wherever a kill comes, and links, modes and pipes stay what they are.

The store: what it was given comes back, from any process; a bad file or disk is one line.
"""

import json
import multiprocessing
import os
import signal
import sqlite3
import stat
import threading
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from fakes import full_disk

from rqa.evaluation.results import write_results
from rqa.runtime.errors import UserError
from rqa.runtime.files import Store, append_line, atomic_directory, claim, damage, read_jsonl, write_json, write_jsonl
from rqa.runtime.flags import Arguments
from rqa.training.checkpoint import promote

LONG_AGO = (0, 0)


def dies(work: Callable[[], Any], calls: int) -> bool:
    """Do work in a child, which is killed instead of its next rename or deletion after so many; whether it was."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = [calls]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def count(*given: Any, **named: Any) -> Any:
            left[0] -= 1
            return call(*given, **named) if left[0] >= 0 else os.kill(os.getpid(), signal.SIGKILL)

        return count

    os.replace, os.unlink = counted(os.replace), counted(os.unlink)
    try:
        work()
    finally:
        os._exit(0)


def forget_the_clock(directory: Path) -> None:
    for path in directory.rglob(".rqa-*"):
        os.utime(path, LONG_AGO)


def test_a_link_leads_to_its_file_which_keeps_its_mode_and_a_pipe_stays_a_pipe(tmp_path: Path) -> None:
    real, link, pipe, got = tmp_path / "real.json", tmp_path / "link.json", tmp_path / "pipe", []
    real.touch(0o640)
    link.symlink_to("real.json")
    write_json(link, {"a": 1})
    assert (link.is_symlink(), stat.S_IMODE(real.stat().st_mode)) == (True, 0o640)
    assert json.loads(real.read_text()) == {"a": 1}
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    write_jsonl(pipe, [{"a": 1}])
    reader.join(9)
    assert (got, pipe.is_fifo()) == (['{"a": 1}\n'], True)
    write_jsonl("/dev/null", [{"a": 1}])
    assert Path("/dev/null").is_char_device()
    write_jsonl(tmp_path / "packed.jsonl.gz", [{"a": 1}])
    assert list(read_jsonl(tmp_path / "packed.jsonl.gz")) == [(1, {"a": 1})]
    (tmp_path / "loop").symlink_to("loop")
    for place in (pipe, tmp_path / "loop"):
        with pytest.raises(UserError, match=f"{place.name}: is not a directory"), atomic_directory(place):
            pass
    with pytest.raises(OSError, match=r"Too many levels of symbolic links: .*/loop'"):
        write_json(tmp_path / "loop", {})
    assert (tmp_path / "loop").is_symlink()
    (tmp_path / "far").mkdir(0o700)
    (tmp_path / "near").symlink_to("far")
    with atomic_directory(tmp_path / "near"):
        pass
    assert (tmp_path / "near").is_symlink()
    assert stat.S_IMODE((tmp_path / "far").stat().st_mode) == 0o700


def test_scores_never_stand_beside_the_predictions_of_another_evaluation_and_a_trainer_s_arguments_stay(
    tmp_path: Path,
) -> None:
    def evaluate(output: Path, right: float) -> None:
        row = {"question": "a", "chat_history": [], "gold_answer": "b", "generated_answer": "c"}
        write_results(output, {"test_gen/f1": right}, [row | {"scores": {"gen/f1": right}}], Arguments())

    calls = killed = 0
    while killed == calls:
        output = tmp_path / str(calls)
        evaluate(output, 0.0)
        killed += dies(lambda output=output: evaluate(output, 1.0), calls)
        calls += 1
        if (output / "score.json").exists():
            (_, row), *_ = read_jsonl(output / "test-predictions.jsonl")
            shown = "1.000" in (output / "report.html").read_text()
            assert json.loads((output / "score.json").read_text()) == {"test_gen/f1": row["scores"]["gen/f1"]}
            assert shown == (row["scores"]["gen/f1"] == 1)
        forget_the_clock(output)
        evaluate(output, 1.0)
        names = {"all_args.json", "report.html", "score.json", "score_details.json", "test-predictions.jsonl"}
        assert {path.name for path in output.iterdir()} == names
    assert calls > 5
    for name in ("all_args.json", "trainer_state.json"):
        (output / name).write_text('{"of": "the trainer"}')
    evaluate(output, 1.0)
    assert json.loads((output / "all_args.json").read_text()) == {"of": "the trainer"}
    assert json.loads((output / "eval_args.json").read_text()) == {}


PLAIN = ("config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json")
LOADED = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "adapter_model.bin")
OWN = ("notes.json", "adapter_notes.txt", "model-card.safetensors", "model.bin")  # the user's
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json")


def model(path: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(path.name)
    return path


@pytest.mark.parametrize(("old", "new"), [(PLAIN, ADAPTER), (ADAPTER, PLAIN), (PLAIN, PLAIN)])
def test_a_model_takes_the_place_of_another_one_wherever_it_is_killed(
    old: tuple[str, ...], new: tuple[str, ...], tmp_path: Path
) -> None:
    first, second, calls, killed = model(tmp_path / "old", old), model(tmp_path / "new", new), 0, 0
    while killed == calls:
        output = tmp_path / f"out-{calls}"
        output.mkdir()
        promote(first, output)
        for name in OWN:
            (output / name).touch()
        killed += dies(lambda output=output: promote(second, output), calls)
        calls += 1
        configured = [(output / name).read_text() for name in (old[0], new[0]) if (output / name).exists()]
        if configured:
            kinds = {(output / names[0]).read_text() for names in (old[1:], new[1:]) if (output / names[0]).exists()}
            assert kinds <= set(configured), calls
        forget_the_clock(output)
        promote(second, output)
        left = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
        assert {name for name in left if not name.startswith(".rqa-")} == {*new, *OWN}
    assert calls > len(new)


def test_the_weights_of_a_merged_adapter_leave_its_tokenizer_and_files_of_the_user(tmp_path: Path) -> None:
    adapter, output = model(tmp_path / "adapter", ADAPTER), model(tmp_path / "out", (*LOADED, *OWN))
    promote(adapter, output)
    assert {path.name for path in output.glob("[!.]*")} == {*ADAPTER, *OWN}
    promote(model(tmp_path / "merged", PLAIN[:2]), output, whole=False)
    assert {path.name for path in output.glob("[!.]*")} == {*PLAIN[:3], *OWN}
    foreign = adapter / ADAPTER[0]
    (output / ".rqa-model.json").write_text(json.dumps([f"../adapter/{foreign.name}", str(foreign), "nul\0", 3]))
    promote(adapter, output)
    assert {path.name for path in output.glob("[!.]*")} == {*ADAPTER, *PLAIN[:2], *OWN}, "listed before, or not at all"
    assert foreign.exists()


@pytest.mark.parametrize("name", ["link", "../outside", "/dev/zero", "pipe", "sub/file", "nul\0", ""])
def test_only_regular_files_of_its_own_make_a_directory_whole(name: str, tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "whole") as directory:
        (directory / "file").touch()
    (tmp_path / "outside").touch()
    (tmp_path / "whole" / "link").symlink_to("file")
    (tmp_path / "whole" / "sub").symlink_to(".")
    os.mkfifo(tmp_path / "whole" / "pipe")
    assert damage(tmp_path / "whole") is None
    sums = json.loads((tmp_path / "whole" / "COMPLETE").read_text())
    (tmp_path / "whole" / "COMPLETE").write_text(json.dumps({name: sums["file"]}))
    assert damage(tmp_path / "whole") is not None
    (tmp_path / "whole" / "COMPLETE").write_text("{}")
    assert damage(tmp_path / "whole") == "COMPLETE is damaged"


def test_a_directory_belongs_to_one_process_until_that_is_killed(tmp_path: Path) -> None:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        claim(tmp_path)
        os.write(write, b"x")
        signal.pause()
    assert os.read(read, 1) == b"x"
    with pytest.raises(UserError, match="another run is writing there"):
        claim(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    claim(tmp_path)
    claim(tmp_path)


def test_lines_of_several_processes_are_whole_and_a_crash_s_half_line_spoils_none(tmp_path: Path) -> None:
    path, row = tmp_path / "lines.jsonl", {"text": "鹽" * 30_000}
    children = []
    for writer in range(4):
        if not (child := os.fork()):
            for number in range(20):
                append_line(path, row | {"line": [writer, number]})
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    rows = [found for _, found in read_jsonl(path)]
    assert sorted(found["line"] for found in rows) == [[writer, number] for writer in range(4) for number in range(20)]
    with path.open("a") as file:
        file.write('{"no": "end"}')
    append_line(path, {"after": "it"})
    assert [found for _, found in read_jsonl(path)][-2:] == [{"no": "end"}, {"after": "it"}]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_line(path, {"first": 1})
    before = path.read_bytes()
    with full_disk(len(before) + 10), pytest.raises(OSError, match=r"lines.jsonl"):  # a part of the line is written
        append_line(path, {"second": "x" * 100})
    assert path.read_bytes() == before
    append_line(path, {"third": 3})
    assert [row for _, row in read_jsonl(path)] == [{"first": 1}, {"third": 3}]


NO_CACHE = r"s\.sqlite: cannot be used as a cache"


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
    with pytest.raises(UserError, match=NO_CACHE):
        Store(path).get(["a"])


def test_a_full_disk_is_one_line_and_loses_nothing_that_was_kept_and_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=NO_CACHE + r" \(.*Not a directory"):
        Store(tmp_path / "file/deep/s.sqlite")
    with full_disk(0), pytest.raises(UserError, match=NO_CACHE):
        Store(tmp_path / "none" / "s.sqlite")
    store = Store(tmp_path / "s.sqlite")
    store.put({"a": 1})
    with full_disk(40_000), pytest.raises(UserError, match=NO_CACHE):
        store.put({str(number): "x" * 1000 for number in range(100)})
    store.put({"b": 2})
    assert store.get(["a", "0", "b"]) == {"a": 1, "b": 2}
