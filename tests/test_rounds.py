"""Reader and retriever trained in turn: what runs, from what, when it ends, and how it goes on."""

import os
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trainers import BIN, calls, parsed, wait_for_checkpoint, written

from rqa.retrieval.retriever import Retriever
from rqa.training.checkpoint import checkpoints

Line = Callable[..., list[str]]
Steps = Callable[..., list[tuple[str, Any]]]
READER = "--max_steps 2 --per_device_train_batch_size 2"
SWR, FID = "--max_new_tokens 8 --max_seq_length 200", "--max_encoder_seq_length 64 --max_decoder_seq_length 16"
RETRIEVER = "--max_steps 2 --per_device_train_batch_size 4 --learning_rate 1e-3"
MEASURED = ("Recall@4", "ROUGE-L")
RPG, DCA = "--num_docs 4 --text_maxlength 256", "--n_context 4 --max_encoder_seq_length 64"


@pytest.fixture
def line(files: dict[str, Path], lm_path: str, encoder_path: str, tmp_path: Path) -> Line:
    """A command line of tiny models and one round; other flags by name."""
    usual = {f"{name}_file": files[f"{name}_file"] for name in ("train", "eval", "test")}
    usual |= {"model_name_or_path": lm_path, "embedding_model": encoder_path, "output_dir": tmp_path / "out"}
    usual |= {"document_path": files["full_dataset_file_path"], "rounds": 1}
    usual |= {"reader_flags": f"{READER} {SWR}", "retriever_flags": f"{RETRIEVER} {RPG}"}
    return lambda **own: [str(part) for flag, value in (usual | own).items() for part in (f"--{flag}", value)]


@pytest.fixture
def steps(run_line: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Run the rounds, their executables in this process. -> the name and the flags of each"""

    def run(words: list[str], **changed: Any) -> list[tuple[str, Any]]:
        rounds, ran = runpy.run_path(str(BIN / "train_rounds")), []

        def here(_: object, line: list[str]) -> int:
            ran.append((name := Path(line[1]).name, parsed(name, line[2:])))
            return run_line(name, *line[2:])

        for name, value in ({"status_of": here} | changed).items():
            monkeypatch.setattr(rounds["Rounds"], name, value)
        monkeypatch.setattr(sys, "argv", ["train_rounds", *words])
        rounds["main"]()
        return ran

    return run


def test_the_questions_that_choose_a_hybrid_s_weight_in_training_choose_it_in_evaluation(
    line: Line, steps: Steps, files: dict[str, Path], tmp_path: Path
) -> None:
    hybrid = f"{READER} {SWR} --retriever hybrid"
    ran = steps(line(reader_flags=hybrid))
    assert {flags.fusion_eval_path for name, flags in ran if name == "evaluate_rqa"} == {str(files["eval_file"])}
    ran = steps(line(reader_flags=f"{hybrid} --fusion_weight 0.5", output_dir=tmp_path / "fixed"))
    assert {flags.fusion_eval_path for name, flags in ran if name == "evaluate_rqa"} == {None}


def test_a_round_starts_from_the_one_before_and_nothing_is_done_or_encoded_twice(
    line: Line, steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    refused: Callable[..., None],
) -> None:  # fmt: skip
    built, out = calls(monkeypatch, Retriever, "_build"), tmp_path / "out"
    ran = steps(line())
    assert [name for name, _ in ran[:4]] == ["evaluate_rqa", "train_swr", "train_rpg", "evaluate_rqa"]
    (before, reader, retriever, after), tests = [flags for _, flags in ran[:4]], [flags for _, flags in ran[4:]]
    assert (before.max_seq_length, reader.index_path) == (200, f"{out}/round-0/index")
    assert (retriever.lm_model_path, retriever.lm_chat_format) == (reader.output_dir, "prefix")
    assert (after.qa_model_name_or_path, after.embedding_model) == (reader.output_dir, retriever.output_dir)
    record, printed = written(out, "rounds.json"), capsys.readouterr().out
    assert [flags.output_dir for flags in tests] == [f"{out}/round-{n}/test" for n in sorted({0, record["best_round"]})]
    assert len(built) == 2
    assert [[*record["rounds"][1][kind]["scores"]] for kind in ("reader", "retriever")] == [[*MEASURED], [MEASURED[0]]]
    assert shlex.join(shlex.split(record["rounds"][1]["reader"]["command"])[2:]) in printed
    assert steps(line()) == []
    assert capsys.readouterr().out == printed[printed.index(f"\n{record['ended']}") :]
    refused("holds rounds with another --seed; name another", "train_rounds", *line(seed=7))
    (out / "rounds.json").unlink()
    refused("round-0: exists without its rounds.json", "train_rounds", *line())


def test_fid_of_a_bert_has_no_answers_before_the_first_round_and_the_second_starts_from_it(
    line: Line, steps: Steps, encoder_path: str, tmp_path: Path
) -> None:
    flags = {"reader_flags": f"{READER} {FID} --bf16 true", "retriever_flags": f"{RETRIEVER} {DCA}", "readers": "fid"}
    ran = steps(line(model_name_or_path=f"bert::{encoder_path}", **flags, rounds=2))
    names = ["evaluate_retriever", *["train_fid", "train_dca", "evaluate_rqa"] * 2]
    assert [name for name, _ in ran[:7]] == names
    assert [ran[number][1].bf16 for number in range(4)] == [True, True, None, True]
    first, *more = (step["eval"]["scores"].keys() for step in written(tmp_path / "out", "rounds.json")["rounds"])
    assert ([*first], *map(list, more)) == ([MEASURED[0]], [*MEASURED], [*MEASURED])
    before, reader, retriever = (ran[number][1] for number in (3, 4, 5))
    assert reader.model_name_or_path == before.qa_model_name_or_path == f"{tmp_path}/out/round-1/reader"
    assert reader.embedding_model == retriever.model_name_or_path == before.embedding_model


@pytest.mark.parametrize(
    ("scores", "best"),
    [([(0.5, 0.3), (0.5, 0.3)], 0),
     ([(0.5, 0.3), (0.6, 0.2), (0.6, 0.2)], 0),
     ([(0.5, 0.3), (0.4, 0.4), (0.5, 0.4), (0.5, 0.4)], 2),  # of equal answers, better passages
     ([(0.1, 0.1), (0.2, 0.2), (0.3, 0.3), (0.4, 0.4)], 3)],
)  # fmt: skip
def test_training_ends_when_neither_score_gains(
    scores: list[tuple[float, float]], best: int, line: Line, steps: Steps, tmp_path: Path
) -> None:
    done: list[tuple[int, str]] = []

    def step(self: Any, number: int, kind: str) -> dict[str, float]:
        self.record["rounds"] += [{}] * (number == len(self.record["rounds"]))
        done.append((number, kind))
        return dict(zip(MEASURED, scores[number], strict=True))

    steps(line(rounds=3), step=step)
    assert [number for number, kind in done if kind == "eval"] == [*range(len(scores))]
    assert [number for number, kind in done if kind == "test"] == sorted({0, best})
    record = written(tmp_path / "out", "rounds.json")
    assert (record["best_round"], "neither" in record["ended"]) == (best, scores[-1] == scores[-2])


def test_sigterm_reaches_the_trainer_and_a_killed_one_goes_on(line: Line, steps: Steps, tmp_path: Path) -> None:
    reader, words = tmp_path / "out/round-1/reader", line(reader_flags=f"--max_steps 150 --save_steps 10 {SWR}")
    killed = f"error: bin/train_swr ended with status 137; see its message above, and its log in {reader}/train.log"
    for kills, status, message in ((False, 0, "interrupted; the same command continues"), (True, 137, killed)):
        command, seen = [sys.executable, BIN / "train_rounds", *words], checkpoints(reader)
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as ours:
            wait_for_checkpoint(reader, seen)
            child = int(Path(f"/proc/{ours.pid}/task/{ours.pid}/children").read_text())
            os.kill(child if kills else ours.pid, signal.SIGKILL if kills else signal.SIGTERM)
            _, errors = ours.communicate()
        assert (ours.returncode, errors.splitlines()[-1]) == (status, message)
        assert ("continuing from" in errors) == kills
    assert [name for name, _ in steps(words)][:2] == ["train_swr", "train_rpg"]
    assert written(reader, "trainer_state.json")["step"] == 150


@pytest.mark.parametrize(
    ("own", "message"),
    [({"reader_flags": "--learning_rat 1"}, "--reader_flags: --learning_rat: unknown flag; did you mean --learning"),
     ({"retriever_flags": "--num_docs 1"}, "--retriever_flags: --num_docs 1: must be at least 2"),
     ({"reader_flags": "--chat_format 'x"}, "--reader_flags: No closing quotation; correct its quotes"),
     ({"reader_flags": "--output_dir x"}, "--reader_flags: --output_dir cannot be set here; leave it out"),
     ({"reader_flags": "--gen_gpt4eval true --judge_api_key x"}, "--reader_flags: --judge_api_key cannot be set here"),
     ({"embedding_model": "bm25"}, "--embedding_model bm25: cannot be trained; name an encoder"),
     ({"rounds": 0}, "--rounds 0: must be at least 1"),
     ({"train_file": "/nowhere"}, "/nowhere: no such file"),
     ({"launcher": "/nowhere/torchrun"}, "/nowhere/torchrun: No such file or directory"),
     ({"model_name_or_path": "/nowhere"}, "bin/evaluate_rqa ended with status 2; see its message above")],
)  # fmt: skip
def test_what_cannot_run_is_one_line_and_status_2(
    own: dict[str, object], message: str, line: Line, refused: Callable[..., None]
) -> None:
    refused(message, "train_rounds", *line(**own))
