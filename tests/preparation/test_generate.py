"""Questions and answers written by a language model: a server on loopback, and a tiny local one."""

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import pytest
from openai_server import OpenAIServer, serve
from transformers import PreTrainedTokenizerBase

from rqa.data import Document, Example, normalize, read_documents, read_examples, write_documents, write_examples
from rqa.models.causal_lm import load_causal_lm
from rqa.preparation.generate import (
    ASK_ANSWER,
    ASK_QUESTIONS,
    LocalGenerator,
    SampleArguments,
    ask_questions,
    parse_answer,
    parse_questions,
    sample_passages,
)

Run = Callable[[str, dict[str, object]], int]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    """Asks two numbered questions with the words of the passage, and answers with the passage."""
    monkeypatch.setenv("RQA_CACHE", str(tmp_path / "cache"))

    def say(messages: list[dict[str, Any]]) -> str:
        text = messages[-1]["content"]
        passage = re.search(r"Content:\n(.*)", text)[1]
        if "Question: " in text:
            return f"Answer: {passage}" if "second" not in text else "NO ANSWER."
        words = passage.rstrip(".").lower()
        return f"Sure!\n1. Is it true that {words}?\n2) **Who said second that {words}?**\nI hope this helps."

    with serve() as ours:
        ours.say = say
        yield ours


@pytest.fixture
def flags(server: OpenAIServer, data: Path, tmp_path: Path) -> dict[str, object]:
    return {"document_path": data / "documents.jsonl", "model_name_or_path": f"openai::{server.url}",
            "output_dir": tmp_path / "out", "num_train_passages": 10, "num_eval_passages": 2, "num_test_passages": 4,
            "min_passage_words": 5}  # fmt: skip


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def test_questions_and_answers_in_the_fields_of_localrqa_split_by_passage(
    server: OpenAIServer, flags: dict[str, object], run_executable: Run, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run_executable("generate_questions", flags) == 0
    printed = capsys.readouterr().out
    for name, count in {"train": 20, "eval": 4, "test": 8}.items():
        assert f"{name}_w_q.jsonl: {count} questions" in printed
    out = tmp_path / "out"
    asked = {split: rows(out / f"{split}_w_q.jsonl") for split in ("train", "eval", "test")}
    assert {split: len(found) for split, found in asked.items()} == {"train": 10, "eval": 2, "test": 4}
    for row in asked["train"]:
        assert set(row) == {"gold_docs", "chat_history", "questions"}
        words = row["gold_docs"][0]["page_content"].rstrip(".").lower()
        assert row["questions"] == [f"Is it true that {words}?", f"Who said second that {words}?"]
    passages = [row["gold_docs"][0]["page_content"] for found in asked.values() for row in found]
    assert len(set(passages)) == 16
    assert run_executable("generate_answers", {"input_path": sorted(out.glob("*_w_q.jsonl")), "output_dir": out,
                                               "model_name_or_path": flags["model_name_or_path"]}) == 0  # fmt: skip
    assert "16 questions left out without an answer" in capsys.readouterr().out
    for split, found in asked.items():
        examples = read_examples(out / f"{split}_w_qa.jsonl", answers=True)
        assert [example.question for example in examples] == [row["questions"][0] for row in found]
        assert all(example.gold_answer == example.gold_docs[0].page_content for example in examples)


def test_a_second_run_asks_nothing_and_writes_the_same(
    server: OpenAIServer, flags: dict[str, object], run_executable: Run, tmp_path: Path
) -> None:
    server.delay = 0.02
    assert run_executable("generate_questions", {**flags, "endpoint_concurrency": 4}) == 0
    assert len(server.of("chat/completions")) == 16
    assert 1 < server.most_at_once <= 4
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert run_executable("generate_questions", {**flags, "output_dir": tmp_path / "again"}) == 0
    assert len(server.of("chat/completions")) == 16
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == first


def test_the_estimate_comes_first_and_alone_if_asked(
    server: OpenAIServer, flags: dict[str, object], run_executable: Run, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    flags |= {"estimate_only": "true", "price": [1.0, 10.0], "max_new_tokens": 1000, "endpoint_model": "tiny"}
    assert run_executable("generate_questions", flags) == 0
    told = capsys.readouterr().err
    assert "16 replies" in told
    given = int(re.search(r"some ([\d,]+) tokens in, at most 16,000 out", told)[1].replace(",", ""))
    assert f"at most ${(given + 160_000) / 1e6:.2f}" in told
    assert not server.of("chat/completions")
    assert not (tmp_path / "out").exists()


def test_the_round_trip_keeps_what_finds_its_passage(
    server: OpenAIServer, flags: dict[str, object], run_executable: Run, tmp_path: Path, encoder_path: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    original = server.say
    server.say = lambda messages: original(messages).split("\n2)")[0] + f"\n2) Zebra gnu yak {hash(str(messages))}?"
    assert run_executable("generate_questions", {**flags, "round_trip_k": 1}) == 0
    questions = [q for path in (tmp_path / "out").iterdir() for row in rows(path) for q in row["questions"]]
    assert questions
    assert all(question.startswith("Is it true") for question in questions)
    assert len(questions) == 16
    assert "16 questions left out by the round trip" in capsys.readouterr().out
    flags |= {"round_trip_k": 24, "round_trip_model": encoder_path, "output_dir": tmp_path / "all"}
    assert run_executable("generate_questions", flags) == 0
    assert sum(len(row["questions"]) for path in (tmp_path / "all").iterdir() for row in rows(path)) == 32


def test_a_split_without_a_question_or_an_answer_is_not_written(
    server: OpenAIServer, flags: dict[str, object], run_executable: Run, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, original = tmp_path / "out", server.say
    passages = sample_passages(read_documents(str(flags["document_path"])), SampleArguments(10, 2, 4, "passage", 5))
    lost = [document.page_content for document in passages["eval"]]
    server.say = lambda messages: (
        "Zebra gnu yak?" if any(text in messages[-1]["content"] for text in lost) else original(messages)
    )
    assert run_executable("generate_questions", {**flags, "round_trip_k": 1}) == 0
    assert "eval_w_q.jsonl: not written, since no question is left" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["test_w_q.jsonl", "train_w_q.jsonl"]
    unanswered = [document.page_content for document in passages["test"]]
    server.say = lambda messages: (
        "NO ANSWER" if any(text in messages[-1]["content"] for text in unanswered) else original(messages)
    )
    answers = {"input_path": sorted(out.iterdir()), "output_dir": tmp_path / "answers",
               "model_name_or_path": flags["model_name_or_path"]}  # fmt: skip
    assert run_executable("generate_answers", answers) == 0
    assert "test_w_qa.jsonl: not written, since no question was answered" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "answers").iterdir()] == ["train_w_qa.jsonl"]
    server.say = lambda messages: f"Zebra gnu yak {hash(str(messages))}?"
    again = {**flags, "round_trip_k": 1, "output_dir": tmp_path / "none", "max_new_tokens": 99}
    assert run_executable("generate_questions", again) == 2
    assert "none: no question is left, and nothing is written: 16 passages" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_question_that_fits_two_passages_is_asked_of_neither(
    server: OpenAIServer, flags: dict[str, object], run_executable: Run, tmp_path: Path
) -> None:
    original = server.say
    server.say = lambda messages: original(messages).replace("Sure!", "What is said here?")
    assert run_executable("generate_questions", {**flags, "questions_per_passage": 3}) == 0
    questions = [q for path in (tmp_path / "out").iterdir() for row in rows(path) for q in row["questions"]]
    assert len(questions) == 32
    assert "What is said here?" not in questions


def test_prompts_of_ones_own(
    server: OpenAIServer, flags: dict[str, object], run_executable: Run, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "prompt.txt").write_text("Frage {number} mal: {passage}\n")
    assert run_executable("generate_questions", {**flags, "prompt_template": tmp_path / "prompt.txt"}) == 0
    assert all(
        body["messages"][0]["content"].startswith("Frage 2 mal: Source:") for body in server.of("chat/completions")
    )
    (tmp_path / "prompt.txt").write_text("Frage: {passage}")
    assert run_executable("generate_questions", {**flags, "prompt_template": tmp_path / "prompt.txt"}) == 2
    assert "prompt.txt: the placeholder {number} is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_train_passages": 100}, "--num_train_passages 100: the database has 24 distinct passages"),
        ({"num_test_passages": 100}, "--num_test_passages 100"),
        ({"num_train_passages": -1}, "--num_train_passages"),
        ({"questions_per_passage": 0}, "--questions_per_passage 0"),
        ({"round_trip_k": -1}, "--round_trip_k -1"),
        ({"max_new_tokens": 0}, "--max_new_tokens 0"),
        ({"price": [1]}, "--price: takes two numbers"),
        ({"model_name_or_path": "/nowhere/model"}, "model /nowhere/model: cannot be loaded"),
        ({"prompt_template": "/nowhere/p.txt"}, "--prompt_template /nowhere/p.txt: cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    change: dict[str, object], message: str, flags: dict[str, object], run_executable: Run, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run_executable("generate_questions", flags | change) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_replies_without_any_question_or_answer_are_an_error(
    server: OpenAIServer, flags: dict[str, object], run_executable: Run, data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    server.say = lambda messages: "No answer"
    assert run_executable("generate_questions", flags) == 2
    assert "none of 16 replies holds a question; the first: 'No answer'" in capsys.readouterr().err
    answers = {"input_path": data / "train_w_qa.jsonl", "output_dir": tmp_path / "out",
               "model_name_or_path": flags["model_name_or_path"]}  # fmt: skip
    assert run_executable("generate_answers", answers) == 2
    assert "answered none of 16 questions" in capsys.readouterr().err
    write_examples(tmp_path / "bare.jsonl", [Example("Who?")])
    assert run_executable("generate_answers", {**answers, "input_path": tmp_path / "bare.jsonl"}) == 2
    assert "bare.jsonl:1: field 'gold_docs' is empty" in capsys.readouterr().err
    twice = [data / "train_w_qa.jsonl", data / "train_w_qa.jsonl"]
    assert run_executable("generate_answers", {**answers, "input_path": twice}) == 2
    assert "two files would be written under one name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- parts


def test_no_text_and_on_demand_no_source_is_in_two_splits(documents: list[Document]) -> None:
    twins = [Document(d.page_content.upper(), {"source": "copy", "title": "t"}) for d in documents]
    sizes = {"num_train_passages": 12, "num_eval_passages": 6, "num_test_passages": 6, "min_passage_words": 5}
    for seed in range(5):
        splits = sample_passages([*documents, *twins], SampleArguments(**sizes, seed=seed))
        texts = [normalize(d.page_content) for found in splits.values() for d in found]
        assert len(texts) == len(set(texts)) == 24
    grouped = [Document(f"a passage with number {n} in it", {"source": str(n // 3)}) for n in range(30)]
    sizes |= {"num_train_passages": 9, "num_eval_passages": 4, "num_test_passages": 3}
    splits = sample_passages(grouped, SampleArguments(**sizes, split_by="source"))
    sources = {split: {d.metadata["source"] for d in found} for split, found in splits.items()}
    assert [len(found) for found in splits.values()] == [9, 4, 3]
    assert sum(map(len, sources.values())) == len(set.union(*sources.values()))


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("1. What is it?\n2. Who did that?", ["What is it?", "Who did that?"]),
        ("Here are two:\n\n- What is it?\n* “Who did that?”\n• Where was it?", ["What is it?", "Who did that?"]),
        ("Q1: What is it?\nQuestion 2: What is it?\n**Why is it?**", ["What is it?", "Why is it?"]),
        ("1990 saw what happen?\n3.5 is how much?", ["1990 saw what happen?", "3.5 is how much?"]),
        (
            "What is the answer to the question: What is it?\n1. A question: **Who did that?**",
            ["What is it?", "Who did that?"],
        ),
        ("What is the purpose of this passage?\nWho sells the right of passage?", ["Who sells the right of passage?"]),
        ("**Question 1:** What is it?\n**Question: Who did that?**", ["What is it?", "Who did that?"]),
        ("Why?\nThis is none.\n", []),
        ("", []),
    ],
)
def test_questions_are_read_from_replies_of_many_shapes(reply: str, expected: list[str]) -> None:
    assert parse_questions(reply, 2) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Answer: It\n is so.", "It is so."),
        ("NO ANSWER", None),
        ("The passage says that it is so.", None),
        ("So is it", None),
        ("No answer.", None),
        (" \n", None),
        ("Noon.", "Noon."),
    ],
)
def test_answers_are_read_from_replies(reply: str, expected: str | None) -> None:
    assert parse_answer(reply, "So, is it?") == expected


def test_a_local_model_replies_as_it_does_alone_and_is_asked_once(
    lm_path: str, tokenizer: PreTrainedTokenizerBase, documents: list[Document], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("RQA_CACHE", str(tmp_path))
    monkeypatch.setattr("rqa.models.generator.KEPT_AT_ONCE", 3)
    model = load_causal_lm(lm_path).eval()
    conversations = [ask_questions("{passage} {number}", document, 2) for document in documents[:7]]
    expected = []
    for turns in conversations:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        for _ in range(6):
            next_id = model(ids).logits[0, -1].argmax()
            if next_id in (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")):
                break
            ids = torch.cat([ids, next_id[None, None]], dim=1)
        prompt = len(tokenizer.encode(text, add_special_tokens=False))
        expected.append(tokenizer.decode(ids[0, prompt:], skip_special_tokens=True).strip())
    generator = LocalGenerator(model, tokenizer, 6)
    assert generator.generate(conversations) == expected
    monkeypatch.setattr(generator.reader, "generate", lambda prompts: pytest.fail("asked again"))
    assert generator.generate(conversations[::-1]) == expected[::-1]
    long = [{"role": "user", "content": "x y z " * 600}]
    monkeypatch.setattr(logging.getLogger("rqa"), "propagate", True)
    assert generator.generate([long]) == [""]
    assert "1 passages are longer than the model can read" in caplog.text


def test_the_executables_take_a_local_model(
    data: Path, lm_path: str, encoder_path: str, run_executable: Run, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("RQA_CACHE", str(tmp_path / "cache"))
    answers = {"input_path": data / "eval_w_qa.jsonl", "output_dir": tmp_path / "out", "max_new_tokens": 6}
    assert run_executable("generate_answers", {**answers, "model_name_or_path": lm_path}) == 0
    (out,) = (tmp_path / "out").iterdir()
    assert out.name == "eval_w_qa_w_qa.jsonl"
    assert len(read_examples(out, answers=True)) == 4
    assert run_executable("generate_answers", {**answers, "model_name_or_path": encoder_path}) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_the_default_prompts_have_their_placeholders() -> None:
    assert all(name in ASK_QUESTIONS for name in ("{passage}", "{number}"))
    assert all(name in ASK_ANSWER for name in ("{passage}", "{question}"))


def test_a_database_of_files_becomes_questions(
    server: OpenAIServer, flags: dict[str, object], run_executable: Run, documents: list[Document], tmp_path: Path
) -> None:
    """The questions of a split of no passages are not written."""
    write_documents(tmp_path / "d.jsonl", documents[:3])
    flags |= {"document_path": tmp_path / "d.jsonl", "num_train_passages": 3, "num_eval_passages": 0,
              "num_test_passages": 0}  # fmt: skip
    assert run_executable("generate_questions", flags) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train_w_q.jsonl"]
    gold = {d.key for e in read_examples(tmp_path / "out/train_w_q.jsonl") for d in e.gold_docs}
    assert gold == {d.key for d in read_documents(tmp_path / "d.jsonl")}
