"""What the benchmarks measure with, and that a failed or endless check of gpu.py is told and ends no other."""

import json
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout, suppress
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import harness
import learning
import numpy as np
import pytest
import serving
from gpu_sections import Section, launch, llama
from harness import matmul_rate, measure_command, training_flops
from learning import intervals
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

import rqa
from rqa.data import read_examples
from rqa.evaluation.runtime import seconds
from rqa.recipe.system import ReaderArguments
from rqa.retrieval.refresh import BackgroundEncoding, Refresher
from rqa.runtime.files import write_json, write_jsonl


class Pipe(list):
    send = list.append


def divide() -> dict[str, Any]:
    return {"result": 1 / 0}


def test_a_check_that_fails_is_a_line_with_its_place_and_the_next_one_runs_if_there_is_time() -> None:
    lines = Pipe()
    section = Section(lines, "kernels", True, 60, "fork")
    section.check({"check": "first"}, divide)
    section.check({"check": "second"}, lambda: {"figure": 7})
    Section(lines, "kernels", True, 1, "fork").check({}, divide)
    failed, passed, skipped = lines
    assert failed["ok"] is False
    assert failed["error"].startswith("ZeroDivisionError")
    assert "tests/test_benchmarks.py:" in failed["error"]
    assert passed["ok"]
    assert passed["figure"] == 7
    assert skipped["skipped"] == "no time left"


def say_and(pipe: Any, then: str) -> None:
    pipe.send("begun")
    if then == "sleep":
        time.sleep(60)
    if then == "die":
        raise SystemExit(3)


@pytest.mark.parametrize(
    ("then", "ended"), [("end", ""), ("sleep", "stopped after 2 s"), ("die", "ended with status 3")]
)
def test_a_process_is_stopped_in_time_and_what_it_sent_is_kept(then: str, ended: str) -> None:
    sent: list[str] = []
    began = time.monotonic()
    assert launch(multiprocessing.get_context("fork"), say_and, 2, (then,), sent.append) == ended
    assert sent == ["begun"]
    assert time.monotonic() - began < 30


def counted(model: torch.nn.Module, lengths: list[int], **options: Any) -> int:
    """Floating-point operations of a step, as PyTorch counts them, one sequence at a time."""
    with FlopCounterMode(display=False) as counter:
        for length in lengths:
            model(torch.ones(1, length, dtype=torch.long), **options)[0].sum().backward()
    return counter.get_total_flops()


def test_the_work_of_a_step_is_what_pytorch_counts_with_half_of_causal_attention() -> None:
    lengths, shape = [9, 30], {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    bert = BertModel(BertConfig(**shape, num_attention_heads=4, attn_implementation="eager"), add_pooling_layer=False)
    assert training_flops(bert.config, lengths, None) == counted(bert, lengths)
    decoder = llama(Section(Pipe(), "sft", True, 60, "fork"), "1B", "eager", torch.float32)
    hidden_half = 6 * decoder.config.num_hidden_layers * decoder.config.hidden_size * sum(n * n for n in lengths)
    expected = training_flops(decoder.config, lengths, sum(lengths)) + hidden_half
    assert expected == pytest.approx(counted(decoder, lengths, use_cache=False), rel=0.01)  # and rotary embeddings


def test_the_rate_of_products_is_that_of_the_device_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    work: list[Any] = []
    monkeypatch.setattr("harness.seconds", lambda run: work.append(run) or 1.0)
    monkeypatch.setattr("harness.device", lambda: torch.device("meta"))
    assert matmul_rate(torch.bfloat16) == pytest.approx(2 * 1536**3 / 1e9)
    assert seconds(work[0]) < 1  # on that device, which computes nothing


def test_the_memory_of_a_command_is_that_of_all_its_processes_together(tmp_path: Path) -> None:
    script = tmp_path / "script.py"  # two processes that hold 300 MiB at once, and say so
    script.write_text(
        "import subprocess, sys, time\n"
        "held = b'x' * (300 << 20)\n"
        "if len(sys.argv) == 1:\n"
        "    subprocess.run([sys.executable, __file__, 'second'], check=True)\n"
        "    print('{\"answer\": 42}')\n"
        "time.sleep(0.5)\n"
    )
    row = measure_command([script])
    assert row["answer"] == 42
    assert row["seconds"] > 1
    assert 600 / 1024 < row["own"] < row["peak"] < 700 / 1024


@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_are_those_of_resampled_questions_and_seeds(seeds: int) -> None:
    chance = np.random.default_rng(1)
    values = chance.random((seeds, 40, 1)) + np.arange(seeds)[:, None, None]
    means = [
        np.mean([values[s, q, 0] for s in chance.integers(0, seeds, seeds) for q in asked])
        for asked in chance.integers(0, 40, (4000, 40))
    ]
    assert intervals(values)[0] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01 * seeds)


Learn = Callable[..., tuple[list[str], dict[str, Any]]]
PEERS = ["sentence-transformers", "sentence-transformers, mined", "trl SFT"]


@pytest.fixture
def learn(
    data: Path, encoder_path: str, lm_path: str, run_line: Callable[..., int], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> Learn:  # fmt: skip
    """Run learning.py on the cities: its commands run in this process, or leave only what a table needs.

    `meanwhile` is called as a command begins. -> the commands, and the table's rows by name
    """
    models = ["--embedding_model", encoder_path, "--qa_model_name_or_path", lm_path]
    common = ["--data", f"cities={data}", "--output_dir", tmp_path / "out", "--tiny", "--seeds", 0, *models]
    scores = dict.fromkeys((name for _, metrics in learning.METRICS for name in metrics.values()), 1.0)

    def run(
        *line: object, real: bool = False, meanwhile: Callable[[str], object] | None = None
    ) -> tuple[list[str], dict[str, Any]]:
        ran: list[str] = []

        def command(line: list[str], log: Path) -> tuple[float, float]:
            ran.append(Path(line[0]).name)
            said = meanwhile and meanwhile(ran[-1])
            if real:
                assert run_line(line[0], *line[1:]) == 0
            else:
                write_jsonl(log.parent / "test-predictions.jsonl", [{"question": "Why?", "scores": scores}])
                write_json(log.parent / "trainer_state.json", {"interrupted": said == "interrupted"})
            log.touch()
            return 60.0, 1.5

        monkeypatch.setattr(learning, "run_command", command)
        monkeypatch.setattr(sys, "argv", ["learning.py", *map(str, [*common, *line])])
        with suppress(SystemExit) if meanwhile else nullcontext():
            learning.main()
        last = capsys.readouterr().out.rpartition("\n{")[2]
        return ran, {row["system"]: row for row in json.loads("{" + last)["rows"]} if '"rows"' in last else {}

    return run


def test_each_system_of_the_table_is_made_by_commands_and_scored_by_its_run(learn: Learn, tmp_path: Path) -> None:
    bench = all(map(find_spec, ("sentence_transformers", "trl", "datasets")))
    every = [*learning.RETRIEVERS, *learning.READERS, "RPG, each epoch", "reranker"]
    systems = [system for system in every if bench or system not in PEERS]
    ran, rows = learn("--only", *systems, "--html", tmp_path / "page.html", real=True)
    assert {*ran} <= {"learning_peers.py", *os.listdir(learning.HERE.parent / "bin")}
    assert len(rows) == len(systems) - 1  # the reranker is in no table
    assert rows["DCA"]["minutes"] == 2  # its reader's, too
    assert rows["CTL + BM25 + reranker"]["minutes"] == 3  # CTL, the reranker and the test
    cell = tmp_path / "out/cities/seed-0/CTL-BM25-reranker"
    for path, system in (("any-seed/BM25", "BM25"), (cell, "CTL + BM25 + reranker"), ("seed-0/SwR", "SwR")):
        lines = (tmp_path / "out/cities" / path / "test-predictions.jsonl").read_text().splitlines()
        name = "gen/f1" if system == "SwR" else "retr/mrr@10"
        mean = np.mean([json.loads(line)["scores"][name] for line in lines])
        assert rows[system]["scores"]["F1" if system == "SwR" else "MRR@10"] == pytest.approx(mean, abs=1e-4)
    assert not [*tmp_path.glob("out/*/*/*/checkpoint-*")]
    assert (tmp_path / "page.html").read_text().count("<svg") == 6


def test_a_table_goes_on_where_it_was_ended_and_makes_nothing_twice(learn: Learn) -> None:
    systems = ["--only", "BM25", "CTL", "SFT", "SwR"]
    reached = ["evaluate_retriever", "train_ctl", "train_sft"]
    assert learn(*systems, meanwhile=lambda name: name == "train_sft" and sys.exit(130)) == (reached, {})
    ran, rows = learn(*systems)
    assert ran == ["train_sft", "train_swr"]
    assert [name for name, row in rows.items() if row["resumed"]] == ["SFT"]  # what it took before is not known
    assert learn(*systems) == learn(*systems, "--draw") == ([], rows)


def test_a_table_needs_no_more_of_a_cell_than_its_scores_until_another_one_needs_its_model(
    learn: Learn, tmp_path: Path
) -> None:
    _, rows = learn("--only", "BM25", "CTL")
    for path in [path for path in (tmp_path / "out/cities").rglob("*") if path.is_file() and path.name != "cell.json"]:
        path.unlink()
    assert learn("--only", "BM25", "CTL", "--draw", "--data", "cities=nowhere") == ([], rows)
    ran, again = learn("--only", "BM25", "CTL", "trained + BM25")
    assert ran == ["train_ctl", "evaluate_retriever"]
    assert again["CTL"]["scores"] == rows["CTL"]["scores"]


def test_a_cell_whose_trainer_was_interrupted_is_not_finished(learn: Learn) -> None:
    """A signal may reach the trainer alone, which saves a checkpoint and ends well."""
    interrupted = learn("--only", "BM25", "CTL", meanwhile=lambda name: "interrupted" * (name == "train_ctl"))
    assert list(interrupted[1]) == ["BM25"]
    ran, rows = learn("--only", "BM25", "CTL")
    assert (ran, list(rows)) == (["train_ctl"], ["BM25", "CTL"])


def test_a_command_that_fails_costs_only_the_cells_that_need_it(learn: Learn) -> None:
    fail = lambda name: name == "train_fid" and subprocess.run(["false"], check=True)  # noqa: E731
    ran, rows = learn("--only", "BM25", "DCA", "SFT", meanwhile=fail)
    assert (ran, list(rows)) == (["evaluate_retriever", "train_fid", "train_sft"], ["BM25", "SFT"])


def test_cells_are_made_at_a_time_and_what_they_share_once(learn: Learn) -> None:
    """Each of two tests ends only when the other one has begun; both need CTL."""
    both = threading.Barrier(2, timeout=60)
    wait = lambda name: name == "evaluate_retriever" and both.wait()  # noqa: E731
    ran, _ = learn("--jobs", 2, "--only", "trained + BM25", "trained + reranker", meanwhile=wait)
    assert sorted(ran) == ["evaluate_retriever", "evaluate_retriever", "train_ctl", "train_rerank"]


def test_another_trained_retriever_can_stand_behind_a_reader(learn: Learn) -> None:
    ran, rows = learn("--only", "SwR over trained", "--trained", "RPG")
    assert (ran, list(rows)) == (["train_rpg", "train_swr"], ["SwR over RPG"])


def test_settings_for_no_command_and_others_for_a_cell_that_is_there_are_refused(learn: Learn) -> None:
    with pytest.raises(SystemExit):
        learn("--only", "CTL", "--settings", "train_clt: --temperature 0.1")
    learn("--only", "CTL")
    with pytest.raises(SystemExit, match="seed-0/CTL: made of other data, models or settings"):
        learn("--only", "CTL", "--settings", "train_ctl: --temperature 0.1")


@pytest.mark.parametrize("path", ["README.md", "benchmarks/README.md"])
def test_tables_of_the_kept_cells_stand_in_the_readmes_as_their_commands_draw_them(
    path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """README.md prints the command that makes the cells, whose scores are in benchmarks/results."""
    root = learning.HERE.parent
    monkeypatch.chdir(root)
    readme = (root / path).read_text().replace("--output_dir out/learning", "--output_dir benchmarks/results/learning")
    commands = re.findall(r"^python (benchmarks/learning.py .*--only [^`]*)", readme.replace("\\\n", ""), re.MULTILINE)
    assert commands
    for command in map(shlex.split, commands):
        monkeypatch.setattr(sys, "argv", [*command, "--draw"])
        learning.main()
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        drawn = "\n".join(lines).replace("\n| ROUGE-L", "\n\n| ROUGE-L")
        assert len(lines) == len(command[command.index("--only") + 1 :]) + 2 * drawn.count("| --- |")
        assert drawn in readme


def test_questions_that_choose_share_no_passage_with_training_where_a_data_set_has_two_files(
    data: Path, tmp_path: Path
) -> None:
    for name in ("documents", "train_w_qa", "eval_w_qa"):
        shutil.copy(data / f"{name}.jsonl", tmp_path)
    files = learning.read_data(str(tmp_path), tmp_path / "out")
    assert files["test"] == str(tmp_path / "eval_w_qa.jsonl")
    train, chooses = (read_examples(files[name]) for name in ("train", "eval"))
    assert len(train) + len(chooses) == 16
    assert not {gold for each in train for gold in each.gold_docs} & {
        gold for each in chooses for gold in each.gold_docs
    }


def test_a_command_of_a_cell_is_timed_what_it_says_is_kept_and_after_a_signal_none_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "ENDED", threading.Event())
    script, log = tmp_path / "script.py", tmp_path / "log.txt"
    script.write_text("import sys, time\nheld = b'x' * (1 << 30)\nprint('said')\ntime.sleep(1)\nsys.exit(sys.argv[1])")
    with pytest.raises(subprocess.CalledProcessError, match="status 1"):
        learning.run_command([str(script), "refused"], log)
    script.write_text(script.read_text().replace("sys.exit", "id"))
    seconds, peak = learning.run_command([str(script), "accepted"], log)
    assert 1 < seconds < 20
    assert 1 < peak < 1.9  # of a process forked from this one, whose own memory may count
    for start in (learning.end, lambda: learning.run_command([str(script)], log)):
        with pytest.raises(SystemExit, match="130"):
            start()
    assert re.findall(r"said|refused|accepted", log.read_text()) == ["refused", "said", "refused", "accepted", "said"]


def test_a_server_s_clients_get_the_answers_that_its_reader_gives_alone(
    files: dict[str, Path], lm_path: str, encoder_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = ["--document_path", files["full_dataset_file_path"], "--eval_data_path", files["train_file"]]
    models = ["--qa_model_name_or_path", lm_path, "--embedding_model", encoder_path]
    line = ["serving.py", *corpus, *models, "--only", "rqa", "--rows", tmp_path / "rows.jsonl", "--tiny"]
    monkeypatch.setattr(sys, "argv", [*map(str, line)])
    monkeypatch.setattr(serving, "PROMPT", dict(serving.PROMPT))
    serving.main()
    retriever = rqa.Retriever(rqa.load_encoder(encoder_path), rqa.read_documents(corpus[1])).open()
    reader = rqa.load_reader(lm_path, ReaderArguments(**serving.PROMPT, bf16=False))
    alone = [rqa.answer(asked.question, retriever, reader)[0] for asked in rqa.read_examples(corpus[3])[:4]]
    for clients, row in enumerate(map(json.loads, (tmp_path / "rows.jsonl").open()), start=1):
        assert (row["clients"], row["answers"]) == (clients, alone)
        assert 0 < row["first_p50"] < row["whole_p95"] < 4 / row["rate"]


TOY = {  # benchmark -> flags of a run that takes seconds
    "evaluation_runtime": "--qa_model_name_or_path {lm} --embedding_model {encoder} --eval_data_path {test_file} "
    "--max_examples 2 --max_new_tokens 4 --max_seq_length 256",
    "fusion_in_decoder": "--tokenizer {encoder} --size tiny --n_context 2 --steps 1 --train_file {train_file}",
    "index_refresh": "--model_name_or_path {encoder} --steps 3 --every 1 --only 1 3 --batch_size 4 "
    "--train_file {train_file} --eval_file {test_file}",
    "limits": "--model_name_or_path {lm} --embedding_model {encoder} --documents 16 --steps 1 "
    "--train_file {train_file} --only 'SFT step' 'RPG step, cold' 'DCA scoring' refresh generation",
    "reranking": "--model_name_or_path {encoder} --questions 4 --passages 3 --batch_size 2 --negatives 2 --steps 1 "
    "--max_length 60 --only rqa CrossEncoder.predict --eval_data_path {test_file}",
    "retrieval_latency": "--embedding_model {encoder} --sizes 99 --factories Flat --seconds 0.01 --only rqa search "
    "--eval_data_path {test_file}",
    "retriever_training": "--model_name_or_path {encoder} --batch_size 4 --max_length 48 --steps 1 --only rqa "
    "--train_file {train_file}",
    "rpg_step": "--model_name_or_path {encoder} --lm_model_path {lm} --num_docs 2 --steps 1 --train_file {train_file}",
    "train_throughput": "--model_name_or_path {lm} --embedding_model {encoder} --steps 1 --only rqa "
    "--train_file {train_file}",
}


@pytest.mark.usefixtures("run_line")  # which takes back what an executable does to the log
@pytest.mark.parametrize("name", TOY)
def test_a_benchmark_measures_toy_models(
    name: str, files: dict[str, Path], lm_path: str, encoder_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each system runs in this process instead of its own."""

    def run(line: list[str], **_: Any) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", line[1:])
        with redirect_stdout(StringIO()) as printed:
            runpy.run_path(line[1], run_name="__main__")
        return SimpleNamespace(stdout=printed.getvalue())

    monkeypatch.setattr(harness, "subprocess", SimpleNamespace(run=run, PIPE=None))
    for owner, method in ((Refresher, "__call__"), (BackgroundEncoding, "finished")):  # index_refresh replaces them
        monkeypatch.setattr(owner, method, getattr(owner, method))
    flags = shlex.split(TOY[name].format(lm=lm_path, encoder=encoder_path, **files))
    path = str(learning.HERE / f"{name}.py")
    printed = run([sys.executable, path, "--document_path", str(files["full_dataset_file_path"]), *flags]).stdout
    *table, result = printed.splitlines()
    assert len(table) > 1
    rows = json.loads(result)["rows"]
    assert rows
    assert max(row.get("gap", 0.0) for row in rows) < 1e-5  # a reranker's scores are its peer's
