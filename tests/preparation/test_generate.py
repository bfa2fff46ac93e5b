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
    LocalGenerator,
    SampleArguments,
    parse_answer,
    parse_questions,
    question_conversations,
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


SAMPLE = {"num_train_passages": 10, "num_eval_passages": 2, "num_test_passages": 4, "min_passage_words": 5}


@pytest.fixture
def flags(server: OpenAIServer, data: Path, tmp_path: Path) -> dict[str, object]:
    model = f"openai::{server.url}"
    return {"document_path": data / "documents.jsonl", "model_name_or_path": model, "output_dir": tmp_path / "out",
            **SAMPLE}  # fmt: skip


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def questions_in(directory: Path) -> list[str]:
    return [question for path in directory.iterdir() for row in rows(path) for question in row["questions"]]


def test_questions_and_answers_in_the_fields_of_localrqa_split_by_passage_and_asked_for_once(
    server: OpenAIServer, flags: dict[str, object], run_executable: Run, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    server.delay = 0.02
    assert run_executable("generate_questions", {**flags, "endpoint_concurrency": 4}) == 0
    printed = capsys.readouterr().out
    for name, count in {"train": 20, "eval": 4, "test": 8}.items():
        assert f"{name}_w_q.jsonl: {count} questions" in printed
    assert 1 < server.most_at_once <= 4
    out = tmp_path / "out"
    asked = {split: rows(out / f"{split}_w_q.jsonl") for split in ("train", "eval", "test")}
    assert {split: len(found) for split, found in asked.items()} == {"train": 10, "eval": 2, "test": 4}
    for row in asked["train"]:
        assert set(row) == {"gold_docs", "chat_history", "questions"}
        words = row["gold_docs"][0]["page_content"].rstrip(".").lower()
        assert row["questions"] == [f"Is it true that {words}?", f"Who said second that {words}?"]
    passages = [row["gold_docs"][0]["page_content"] for found in asked.values() for row in found]
    assert len(set(passages)) == 16 == len(server.of("chat/completions"))
    assert run_executable("generate_questions", {**flags, "output_dir": tmp_path / "again"}) == 0
    assert len(server.of("chat/completions")) == 16
    for path in out.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    answers = {"input_path": sorted(out.glob("*_w_q.jsonl")), "output_dir": out, "price": [1, 2]}
    capsys.readouterr()
    assert run_executable("generate_answers", {**answers, "model_name_or_path": flags["model_name_or_path"]}) == 0
    told = capsys.readouterr()
    assert "16 answers, 16 questions left out without an answer" in told.out
    assert re.search(r"32 replies, some [\d,]+ tokens in, at most 8,192 out, at most \$0\.0\d;", told.err)
    for split, found in asked.items():
        examples = read_examples(out / f"{split}_w_qa.jsonl", answers=True)
        assert [example.question for example in examples] == [row["questions"][0] for row in found]
        assert all(example.gold_answer == example.gold_docs[0].page_content for example in examples)


def test_the_estimate_comes_first_and_alone_if_asked(
    server: OpenAIServer, flags: dict[str, object], run_executable: Run, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    flags |= {"estimate_only": "true", "price": [1.0, 10.0], "max_new_tokens": 1000}
    assert run_executable("generate_questions", flags) == 0
    told = capsys.readouterr().err
    given = int(re.search(r"16 replies, some ([\d,]+) tokens in, at most 16,000 out", told)[1].replace(",", ""))
    assert f"at most ${(given + 160_000) / 1e6:.2f}" in told
    assert not server.seen
    assert not (tmp_path / "out").exists()


def test_the_round_trip_keeps_what_finds_its_passage(
    server: OpenAIServer, flags: dict[str, object], run_executable: Run, tmp_path: Path, encoder_path: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    original = server.say
    server.say = lambda messages: original(messages).split("\n2)")[0] + f"\n2) Zebra gnu yak {hash(str(messages))}?"
    assert run_executable("generate_questions", {**flags, "round_trip_k": 1}) == 0
    questions = questions_in(tmp_path / "out")
    assert len(questions) == 16
    assert all(question.startswith("Is it true") for question in questions)
    assert "16 questions left out by the round trip" in capsys.readouterr().out
    flags |= {"round_trip_k": 24, "round_trip_model": encoder_path, "output_dir": tmp_path / "all"}
    assert run_executable("generate_questions", flags) == 0
    assert len(questions_in(tmp_path / "all")) == 32


def test_a_split_without_a_question_or_an_answer_is_not_written(
    server: OpenAIServer, flags: dict[str, object], run_executable: Run, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, original = tmp_path / "out", server.say
    passages = sample_passages(read_documents(str(flags["document_path"])), SampleArguments(**SAMPLE))

    def say_of(split: str, reply: str) -> Callable[[list[dict[str, Any]]], str]:
        texts = [document.page_content for document in passages[split]]
        return lambda messages: reply if any(text in messages[-1]["content"] for text in texts) else original(messages)

    server.say = say_of("eval", "Zebra gnu yak?")
    assert run_executable("generate_questions", {**flags, "round_trip_k": 1}) == 0
    assert "eval_w_q.jsonl: not written, since no question is left" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["test_w_q.jsonl", "train_w_q.jsonl"]
    server.say = say_of("test", "NO ANSWER")
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


def test_a_question_that_fits_two_passages_is_asked_of_neither_and_an_empty_split_is_not_written(
    server: OpenAIServer, flags: dict[str, object], run_executable: Run, documents: list[Document], tmp_path: Path
) -> None:
    write_documents(tmp_path / "d.jsonl", documents[:3])
    original = server.say
    server.say = lambda messages: original(messages).replace("Sure!", "What is said here?")
    flags |= {"full_dataset_file_path": tmp_path / "d.jsonl", "num_train_passages": 3, "num_eval_passages": 0,
              "num_test_passages": 0, "questions_per_passage": 3}  # fmt: skip
    del flags["document_path"]
    assert run_executable("generate_questions", flags) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train_w_q.jsonl"]
    examples = read_examples(tmp_path / "out/train_w_q.jsonl")
    assert {document.key for e in examples for document in e.gold_docs} == {document.key for document in documents[:3]}
    assert len(examples) == 6
    assert "What is said here?" not in {example.question for example in examples}


def test_prompts_of_ones_own(
    server: OpenAIServer, flags: dict[str, object], run_executable: Run, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "prompt.txt").write_text("Frage {number} mal: {passage}\n")
    assert run_executable("generate_questions", {**flags, "prompt_template": tmp_path / "prompt.txt"}) == 0
    for body in server.of("chat/completions"):
        assert body["messages"][0]["content"].startswith("Frage 2 mal: Source:")
    (tmp_path / "prompt.txt").write_text("Frage: {passage}")
    assert run_executable("generate_questions", {**flags, "prompt_template": tmp_path / "prompt.txt"}) == 2
    assert "prompt.txt: the placeholder {number} is missing" in capsys.readouterr().err


def test_bad_input_is_one_line_and_writes_nothing(
    flags: dict[str, object], server: OpenAIServer, run_executable: Run, data: Path, tmp_path: Path,
    encoder_path: str, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    server.say = lambda messages: "No answer"
    answers = {"model_name_or_path": flags["model_name_or_path"], "output_dir": tmp_path / "out"}
    write_examples(tmp_path / "bare.jsonl", [Example("Who?")])
    for name, change, message in (
        ("questions", {"num_train_passages": 100}, "--num_train_passages 100: the database has 24 distinct passages"),
        ("questions", {"num_test_passages": 100}, "--num_test_passages 100"),
        ("questions", {"num_train_passages": -1}, "--num_train_passages"),
        ("questions", {"questions_per_passage": 0}, "--questions_per_passage 0"),
        ("questions", {"round_trip_k": -1}, "--round_trip_k -1"),
        ("questions", {"max_new_tokens": 0}, "--max_new_tokens 0"),
        ("questions", {"price": [1]}, "--price: takes two numbers"),
        ("questions", {"model_name_or_path": "/nowhere/model"}, "model /nowhere/model: cannot be loaded"),
        ("questions", {"prompt_template": "/nowhere/p.txt"}, "--prompt_template /nowhere/p.txt: cannot be read"),
        ("questions", {}, "none of 16 replies holds a question; the first: 'No answer'"),
        ("answers", {"input_path": data / "train_w_qa.jsonl"}, "answered none of 16 questions"),
        ("answers", {"input_path": tmp_path / "bare.jsonl"}, "bare.jsonl:1: field 'gold_docs' is empty"),
        ("answers", {"input_path": [data / "train_w_qa.jsonl"] * 2}, "train_w_qa_w_qa.jsonl would be written twice"),
        ("answers", {"input_path": data / "eval_w_qa.jsonl", "model_name_or_path": encoder_path}, "no chat template"),
    ):
        assert run_executable(f"generate_{name}", (flags if name == "questions" else answers) | change) == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        assert message in line
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
        ("What is the answer to the question: What is it?\n1. A question: **Is it so?**", ["What is it?", "Is it so?"]),
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
    monkeypatch.setattr("rqa.preparation.generate.KEPT_AT_ONCE", 3)
    model = load_causal_lm(lm_path).eval()
    conversations = question_conversations({"train": documents[:7]}, "{passage} {number}", 2)
    expected = []
    for turns in conversations:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer.encode(text, add_special_tokens=False)
        ids = torch.tensor([prompt])
        for _ in range(6):
            next_id = model(ids).logits[0, -1].argmax()
            if next_id in (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")):
                break
            ids = torch.cat([ids, next_id[None, None]], dim=1)
        expected.append(tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True).strip())
    generator = LocalGenerator(model, tokenizer, 6)
    assert generator.generate(conversations) == expected
    monkeypatch.setattr(generator.reader, "generate", lambda prompts: pytest.fail("asked again"))
    assert generator.generate(conversations[::-1]) == expected[::-1]
    long = [{"role": "user", "content": "x y z " * 600}]
    monkeypatch.setattr(logging.getLogger("rqa"), "propagate", True)
    assert generator.generate([long]) == [""]
    assert "1 passages are longer than the model can read" in caplog.text


def test_the_executables_take_a_local_model(
    data: Path, lm_path: str, run_executable: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RQA_CACHE", str(tmp_path / "cache"))
    answers = {"input_path": data / "eval_w_qa.jsonl", "output_dir": tmp_path / "out", "max_new_tokens": 6}
    assert run_executable("generate_answers", {**answers, "model_name_or_path": lm_path}) == 0
    (out,) = (tmp_path / "out").iterdir()
    assert out.name == "eval_w_qa_w_qa.jsonl"
    assert len(read_examples(out, answers=True)) == 4
