"""`bin/ask` as a user meets it: one question, a prompt with a history, and what it cannot do."""

import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai_server import OpenAIServer, error
from trainers import BIN, calls

import rqa
from rqa.data import Document, Example, Turn
from rqa.recipe.system import ReaderArguments
from rqa.retrieval.hybrid import LexicalRetriever
from rqa.serving.engine import Engine

QUESTION = "What do they trade in Corvo?"
READER = {"max_new_tokens": 8, "max_seq_length": 256, "bf16": False}


@pytest.fixture
def line(files: dict[str, Path], lm_path: str) -> list[str]:
    flags = {
        "document_path": files["full_dataset_file_path"],
        "embedding_model": "bm25",
        "qa_model_name_or_path": lm_path,
    }
    return [part for flag, value in (flags | READER).items() for part in (f"--{flag}", str(value))]


def test_a_question_is_answered_as_from_python_and_its_passages_have_scores(
    line: list[str], lm_path: str, documents: list[Document], run_line: Callable[..., int], capsys: Any
) -> None:
    retriever = LexicalRetriever(documents)
    text, passages = rqa.answer(QUESTION, retriever, rqa.load_reader(lm_path, ReaderArguments(**READER)))
    (scores,) = retriever.retrieve([QUESTION], 3).scores
    assert run_line("ask", *QUESTION.split(), *line) == 0
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(text)
    heads = [f"{score:.3f} {passage.metadata['title']}" for score, passage in zip(scores, passages, strict=True)]
    assert re.findall(r"^\[\d\] (.*)", printed, re.MULTILINE) == heads


def test_the_prompt_keeps_the_history_until_it_is_told_to_begin_anew(
    line: list[str], run_line: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked = calls(monkeypatch, Engine, "reply")
    too_long = "why " * 2000
    typed = f"first\n\nsecond\n{too_long}\nthird\n/new\nfour\udcffth\n"  # with a byte that is no UTF-8
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert run_line("ask", *line, "--show_passages", "false") == 0
    out, err = capsys.readouterr()
    said = [part.strip() for part in out.split("\n\n")]
    examples = [example for example, *_ in asked]
    assert [example.question for example in examples] == ["first", "second", too_long.strip(), "third", "four\ufffdth"]
    turns = [Turn("user", "first"), Turn("assistant", said[0]), Turn("user", "second"), Turn("assistant", said[1])]
    assert examples[3] == Example("third", chat_history=tuple(turns))
    assert examples[4].chat_history == ()
    assert "error: question: question and answer alone take" in err


def test_without_a_reader_there_are_passages_and_the_flags_may_be_a_file(
    line: list[str], run_line: Callable[..., int], tmp_path: Path, capsys: Any, refused: Callable[..., None]
) -> None:
    flags = {name[2:]: value for name, value in zip(line[:4:2], line[1:4:2], strict=True)}
    (tmp_path / "flags.json").write_text(json.dumps(flags | {"embedding_max_num_to_retrieve": 2}))
    assert run_line("ask", *QUESTION.split(), tmp_path / "flags.json") == 0
    assert len(re.findall(r"^\[", capsys.readouterr().out, re.MULTILINE)) == 2
    refused("nothing.json: no such file", "ask", QUESTION, "nothing.json")


def test_a_server_answers_or_says_in_one_line_why_not(
    line: list[str], server: OpenAIServer, run_line: Callable[..., int], capsys: Any, refused: Callable[..., None]
) -> None:
    asked = [QUESTION, *line[:4], "--qa_model_name_or_path", f"openai::{server.url}"]
    assert run_line("ask", *asked) == 0
    assert capsys.readouterr().out.rstrip().endswith(f"Question: {QUESTION}")  # the end of what it was asked
    server.faults = [lambda: error(400, "no such thing")] * 9
    refused("no such thing", "ask", *asked)


def test_ctrl_c_stops_an_answer_and_not_the_prompt(line: list[str]) -> None:
    command = [sys.executable, str(BIN / "ask"), *line, "--max_seq_length", "20000", "--max_new_tokens", "19000"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(f"{QUESTION}\n")
        process.stdin.flush()
        assert any(line.startswith("[3]") for line in process.stdout)
        time.sleep(1)  # in the middle of the answer
        process.send_signal(signal.SIGINT)
        process.communicate("/new\n", timeout=20)
    assert process.returncode == 0
