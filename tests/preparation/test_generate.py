"""Questions and answers written by a language model: a server on loopback, and a tiny local one."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import pytest
from openai_server import OpenAIServer
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
def writer(server: OpenAIServer) -> OpenAIServer:
    """Asks two numbered questions with the words of the passage, and answers the first with the passage."""

    def say(messages: list[dict[str, Any]]) -> str:
        text = messages[-1]["content"]
        passage = re.search(r"Content:\n(.*)", text)[1]
        if "Question: " in text:
            return "NO ANSWER." if "second" in text else f"Answer: {passage}"
        words = passage.rstrip(".").lower()
        return f"Sure!\n1. Is it true that {words}?\n2) **Who said second that {words}?**\nI hope this helps."

    server.say = say
    return server


SAMPLE = {"num_train_passages": 10, "num_eval_passages": 2, "num_test_passages": 4, "min_passage_words": 5}


@pytest.fixture
def flags(writer: OpenAIServer, data: Path, tmp_path: Path) -> dict[str, object]:
    model = {"model_name_or_path": f"openai::{writer.url}"}
    return {"document_path": data / "documents.jsonl", "output_dir": tmp_path / "out", **model, **SAMPLE}


def asking(model: object, inputs: object, output: Path) -> dict[str, object]:
    """The flags of generate_answers."""
    return {"model_name_or_path": model, "input_path": inputs, "output_dir": output}


def rows(path: Path) -> list[dict[str, Any]]:
    """Of a file, or of all files of a directory."""
    files = path.iterdir() if path.is_dir() else [path]
    return [json.loads(line) for file in files for line in file.open(encoding="utf-8")]


def questions_in(directory: Path) -> list[str]:
    return [question for row in rows(directory) for question in row["questions"]]


def test_questions_and_answers_in_the_fields_of_localrqa_split_by_passage_and_asked_for_once(
    writer: OpenAIServer, flags: dict[str, object], run_executable: Run, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    assert run_executable("generate_questions", flags) == 0
    printed = capsys.readouterr().out
    asked = {}
    for split, passages, questions in (("train", 10, 20), ("eval", 2, 4), ("test", 4, 8)):
        assert f"{split}_w_q.jsonl: {questions} questions" in printed
        asked[split] = rows(out / f"{split}_w_q.jsonl")
        assert len(asked[split]) == passages
    texts = set()
    for row in rows(out):
        text = row["gold_docs"][0]["page_content"]
        asks = [f"{begin} that {text.rstrip('.').lower()}?" for begin in ("Is it true", "Who said second")]
        assert row == {"gold_docs": row["gold_docs"], "chat_history": [], "questions": asks}
        texts.add(text)
    assert len(texts) == 16 == len(writer.questions)
    assert run_executable("generate_questions", {**flags, "output_dir": tmp_path / "again"}) == 0
    assert len(writer.questions) == 16
    for path in out.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    answers = asking(flags["model_name_or_path"], sorted(out.glob("*_w_q.jsonl")), out)
    assert run_executable("generate_answers", answers) == 0
    assert "16 answers, 16 questions left out without an answer" in capsys.readouterr().out
    for split, found in asked.items():
        examples = read_examples(out / f"{split}_w_qa.jsonl", answers=True)
        assert [example.question for example in examples] == [row["questions"][0] for row in found]
        assert all(example.gold_answer == example.gold_docs[0].page_content for example in examples)


def test_the_estimate_comes_first_and_alone_if_asked(
    writer: OpenAIServer, flags: dict[str, object], run_executable: Run, data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    answers = asking(flags["model_name_or_path"], data / "train_w_qa.jsonl", tmp_path / "out")
    for name, ours in (("questions", flags), ("answers", answers)):
        ours |= {"estimate_only": "true", "price": [1.0, 10.0], "max_new_tokens": 1000}
        assert run_executable(f"generate_{name}", ours) == 0
        told = capsys.readouterr().err
        given = int(re.search(r"16 replies, some ([\d,]+) tokens in, at most 16,000 out", told)[1].replace(",", ""))
        assert f"at most ${(given + 160_000) / 1e6:.2f}" in told
    assert not writer.seen
    assert not (tmp_path / "out").exists()


def test_the_round_trip_keeps_what_finds_its_passage_and_a_split_that_loses_all_is_not_written(
    writer: OpenAIServer, flags: dict[str, object], run_executable: Run, tmp_path: Path, encoder_path: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    passages = sample_passages(read_documents(str(flags["document_path"])), SampleArguments(**SAMPLE))
    original = writer.say

    def say(messages: list[dict[str, Any]]) -> str:
        asked, strange = messages[-1]["content"], f"\nZebra gnu yak {hash(str(messages))}?"
        (split,) = (name for name, found in passages.items() if any(d.page_content in asked for d in found))
        if "Question: " in asked:
            return "NO ANSWER" if split == "test" else original(messages)
        return strange if split == "eval" else original(messages).split("\n2)")[0] + strange

    writer.say = say
    assert run_executable("generate_questions", {**flags, "round_trip_k": 1}) == 0
    assert [question.startswith("Is it true") for question in questions_in(tmp_path / "out")] == [True] * 14
    printed = capsys.readouterr().out
    assert "16 questions left out by the round trip" in printed
    assert "eval_w_q.jsonl: not written, since no question is left" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test_w_q.jsonl", "train_w_q.jsonl"]
    answers = asking(flags["model_name_or_path"], sorted((tmp_path / "out").iterdir()), tmp_path / "answers")
    assert run_executable("generate_answers", answers) == 0
    assert "test_w_qa.jsonl: not written, since no question was answered" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "answers").iterdir()] == ["train_w_qa.jsonl"]
    flags |= {"round_trip_k": 24, "round_trip_model": encoder_path, "output_dir": tmp_path / "all"}
    assert run_executable("generate_questions", flags) == 0
    assert len(questions_in(tmp_path / "all")) == 30
    writer.say = lambda messages: f"Zebra gnu yak {hash(str(messages))}?"
    flags |= {"round_trip_k": 1, "round_trip_model": "bm25", "output_dir": tmp_path / "none", "max_new_tokens": 99}
    assert run_executable("generate_questions", flags) == 2
    assert "none: no question is left, and nothing is written: 16 passages" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_prompt_of_ones_own_a_question_that_fits_two_passages_and_splits_of_no_passages(
    writer: OpenAIServer, flags: dict[str, object], run_executable: Run, documents: list[Document], tmp_path: Path
) -> None:
    write_documents(tmp_path / "d.jsonl", documents[:3])
    (tmp_path / "prompt.txt").write_text("Frage {number} mal: {passage}\n")
    original = writer.say
    writer.say = lambda messages: original(messages).replace("Sure!", "What is said here?")
    flags |= {"num_train_passages": 3, "num_eval_passages": 0, "num_test_passages": 0, "questions_per_passage": 3}
    flags |= {"document_path": tmp_path / "d.jsonl", "prompt_template": tmp_path / "prompt.txt"}
    assert run_executable("generate_questions", flags) == 0
    assert [question.startswith("Frage 3 mal: Source:") for question in writer.questions] == [True] * 3
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train_w_q.jsonl"]
    examples = read_examples(tmp_path / "out/train_w_q.jsonl")
    assert {document for example in examples for document in example.gold_docs} == set(documents[:3])
    assert len(examples) == 6
    assert "What is said here?" not in {example.question for example in examples}


def test_bad_input_is_one_line_and_writes_nothing(
    flags: dict[str, object], writer: OpenAIServer, run_executable: Run, data: Path, tmp_path: Path,
    encoder_path: str, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    writer.say = lambda messages: "No answer"
    write_examples(tmp_path / "bare.jsonl", [Example("Who?")])
    (tmp_path / "prompt.txt").write_text("Frage: {passage}")
    flags["full_dataset_file_path"] = flags.pop("document_path")
    asked = asking(flags["model_name_or_path"], None, tmp_path / "out")
    for change, message in (
        ({"num_train_passages": 100}, "--num_train_passages 100: the database has 24 distinct passages"),
        ({"num_test_passages": 100}, "--num_test_passages 100"),
        ({"num_train_passages": -1}, "--num_train_passages"),
        ({"questions_per_passage": 0}, "--questions_per_passage 0"),
        ({"round_trip_k": -1}, "--round_trip_k -1"),
        ({"max_new_tokens": 0}, "--max_new_tokens 0"),
        ({"price": [1]}, "--price: takes two numbers"),
        ({"model_name_or_path": "/nowhere/model"}, "model /nowhere/model: cannot be loaded"),
        ({"prompt_template": "/nowhere/p.txt"}, "--prompt_template /nowhere/p.txt: cannot be read"),
        ({"prompt_template": tmp_path / "prompt.txt"}, "prompt.txt: the placeholder {number} is missing"),
        ({}, "none of 16 replies holds a question; the first: 'No answer'"),
        ({"input_path": data / "train_w_qa.jsonl"}, "answered none of 16 questions"),
        ({"input_path": tmp_path / "bare.jsonl"}, "bare.jsonl:1: field 'gold_docs' is empty"),
        ({"input_path": [data / "train_w_qa.jsonl"] * 2}, "train_w_qa_w_qa.jsonl would be written twice"),
        ({"input_path": data / "eval_w_qa.jsonl", "model_name_or_path": encoder_path}, "has no chat template"),
    ):
        name, given = ("generate_answers", asked) if "input_path" in change else ("generate_questions", flags)
        assert run_executable(name, given | change) == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        assert message in line
    assert not (tmp_path / "out").exists()


def test_no_text_and_on_demand_no_source_is_in_two_splits(documents: list[Document]) -> None:
    twins = [Document(d.page_content.upper(), {"source": "copy", "title": "t"}) for d in documents]

    def split(passages: list[Document], *sizes: int, **options: Any) -> list[list[Document]]:
        names = ("num_train_passages", "num_eval_passages", "num_test_passages")
        flags = SampleArguments(**dict(zip(names, sizes, strict=True)), min_passage_words=5, **options)
        found = [*sample_passages(passages, flags).values()]
        assert [len(part) for part in found] == list(sizes)
        return found

    for seed in range(5):
        texts = [normalize(d.page_content) for found in split([*documents, *twins], 12, 6, 6, seed=seed) for d in found]
        assert len(set(texts)) == 24
    grouped = [Document(f"a passage with number {n} in it", {"source": str(n // 3)}) for n in range(30)]
    sources = [{d.metadata["source"] for d in found} for found in split(grouped, 9, 4, 3, split_by="source")]
    assert sum(map(len, sources)) == len(set.union(*sources))


def test_questions_are_read_from_replies_of_many_shapes() -> None:
    what, who = "What is it?", "Who did that?"
    for reply, expected in {
        f"1. {what}\n2. {who}": [what, who],
        f"Here are two:\n\n- {what}\n* “{who}”\n• Where was it?": [what, who],
        f"Q1: {what}\nQuestion 2: {what}\n**Why is it?**": [what, "Why is it?"],
        "1990 saw what happen?\n3.5 is how much?": ["1990 saw what happen?", "3.5 is how much?"],
        f"What is the answer to the question: {what}\n1. A question: **Is it so?**": [what, "Is it so?"],
        "What is the purpose of this passage?\nWho sells the right of passage?": ["Who sells the right of passage?"],
        f"**Question 1:** {what}\n**Question: {who}**": [what, who],
        "Why?\nThis is none.\n": [],
        "": [],
    }.items():
        assert parse_questions(reply, 2) == expected


def test_answers_are_read_from_replies() -> None:
    none = ("NO ANSWER", "The passage says that it is so.", "So is it", "No answer.", " \n")
    for reply, expected in {"Answer: It\n is so.": "It is so.", "Noon.": "Noon.", **dict.fromkeys(none)}.items():
        assert parse_answer(reply, "So, is it?") == expected


def test_a_local_model_replies_as_it_does_alone_and_is_asked_once_by_executables_too(
    lm_path: str, tokenizer: PreTrainedTokenizerBase, documents: list[Document], data: Path, tmp_path: Path,
    run_executable: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
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
    monkeypatch.setattr(logging.getLogger("rqa"), "propagate", True)
    assert generator.generate([[{"role": "user", "content": "x y z " * 600}]]) == [""]
    assert "1 passages are longer than the model can read" in caplog.text
    answers = asking(lm_path, data / "eval_w_qa.jsonl", tmp_path / "out")
    assert run_executable("generate_answers", {**answers, "max_new_tokens": 6}) == 0
    assert len(read_examples(tmp_path / "out/eval_w_qa_w_qa.jsonl", answers=True)) == 4
