"""Readers, teachers and judges behind a server: by themselves, and as a user runs them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import pytest
from openai_server import OpenAIServer
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from rqa.data import Document, Example, Turn
from rqa.endpoint.client import Endpoint
from rqa.endpoint.scorer import EndpointScorer, remote_scorer
from rqa.models.causal_lm import load_causal_lm
from rqa.objectives.teacher import AnswerScorer, Pair
from rqa.prompts import PromptArguments, Prompter
from rqa.recipe.retriever import TeacherArguments
from rqa.recipe.system import EndpointReader

Run = Callable[[str, dict[str, object]], int]


def reader(server: OpenAIServer, **prompt: Any) -> EndpointReader:
    return EndpointReader(Endpoint(f"openai::{server.url}"), PromptArguments(**prompt))


def test_the_reader_asks_what_every_other_reader_sees_and_leaves_the_format_to_the_server(
    server: OpenAIServer, documents: list[Document], examples: list[Example]
) -> None:
    asked = Example("And Brask?", chat_history=(Turn("user", "Where is Arlen?"), Turn("assistant", "By the sea.")))
    ours = reader(server, chat_format="template", max_new_tokens=9)
    answers = ours.answer([asked, examples[0]], [documents[:2], []])
    body, _ = sorted(server.of("chat/completions"), key=lambda body: -len(body["messages"]))
    assert [turn["role"] for turn in body["messages"]] == ["user", "assistant", "user"]
    passages = f"[1] {documents[0].fmt_content}\n\n[2] {documents[1].fmt_content}"
    expected = ours.prompter.instruction.replace("{passages}", passages).replace("{question}", "And Brask?")
    assert body["messages"][-1]["content"] == expected
    assert body["max_tokens"] == 9
    assert answers[0].text.endswith("And Brask?")
    assert answers[0].num_tokens > 10
    assert answers[1].text.endswith(examples[0].question)


def test_what_is_too_long_by_estimate_loses_passage_text_and_a_question_that_is_too_long_stays_unanswered(
    server: OpenAIServer, caplog: pytest.LogCaptureFixture
) -> None:
    long = Document("wool " * 5000, {"source": "s"})
    ours = reader(server, max_seq_length=300, max_new_tokens=50)
    answers = ours.answer([Example("Why? " * 400), Example("Why?")], [[long], [long]])
    (sent,) = server.questions
    assert 600 < len(sent) <= 250 * 3
    assert sent.endswith("Question: Why?")
    assert (answers[0].text, answers[0].num_tokens, answers[0].seconds) == ("", 0, None)
    assert answers[1].text.endswith("Question: Why?")
    assert "it is left unanswered" in caplog.text


@pytest.fixture
def scoring(lm_path: str, tokenizer: PreTrainedTokenizerBase, server: OpenAIServer) -> OpenAIServer:
    """Serves the tiny language model's log-probabilities of a prompt."""
    model = load_causal_lm(lm_path).eval()

    @torch.no_grad()
    def echo(body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        encoded = tokenizer(prompt, return_offsets_mapping=True, add_special_tokens=False)
        ids = torch.tensor(encoded["input_ids"])
        values = model(ids[None]).logits[0].log_softmax(-1)
        spans = [*encoded["offset_mapping"], (len(prompt), len(prompt) + 1)]
        logprobs = {
            "tokens": [prompt[begin:end] for begin, end in spans],
            "token_logprobs": [None, *values[:-1].gather(1, ids[1:, None])[:, 0].tolist(), values[-1].max().item()],
            "text_offset": [begin for begin, _ in spans],
        }
        return {"choices": [{"text": prompt + "!", "logprobs": logprobs}], "usage": {"completion_tokens": 1}}

    server.complete = echo
    return server


@pytest.mark.parametrize("limit", [256, 100])
def test_scores_from_a_server_equal_those_of_the_same_model_here_and_what_does_not_fit_is_not_asked_for(
    limit: int, scoring: OpenAIServer, lm_path: str, tokenizer: PreTrainedTokenizerBase, documents: list[Document],
    examples: list[Example],
) -> None:  # fmt: skip
    too_long = Pair(Example("Why? " * 200, gold_answer="So."), documents[0])
    pairs = [too_long, *(Pair(example, document) for example in examples[:4] for document in documents[:3])]
    prompter = Prompter(tokenizer, PromptArguments(max_seq_length=limit, max_new_tokens=1))
    assert any(len(prompter.encode(pair.example, [pair.document]).ids) > 75 for pair in pairs[1:])
    here = dict(AnswerScorer(load_causal_lm(lm_path), prompter, 400)(pairs))
    there = dict(EndpointScorer(Endpoint(f"openai::{scoring.url}"), prompter)(pairs))
    numbers = range(1, len(pairs))
    assert [there[i] for i in numbers] == pytest.approx([here[i] for i in numbers], abs=1e-5)
    assert set(there) == set(here)
    assert len(scoring.of("completions")) == len(pairs) - 1


def test_a_scorer_without_a_tokenizer_cuts_by_estimate(
    scoring: OpenAIServer, documents: list[Document], examples: list[Example]
) -> None:
    flags = TeacherArguments(lm_model_path=f"openai::{scoring.url}", text_maxlength=70, endpoint_model="tiny")
    scorer, identity = remote_scorer(flags)
    assert len(list(scorer([Pair(example, documents[0]) for example in examples[:4]]))) == 4
    assert 200 < max(len(body["prompt"]) for body in scoring.of("completions")) <= 70 * 3
    assert remote_scorer(replace(flags, endpoint_model="other"))[1] != identity


@pytest.fixture
def rpg(data: Path, encoder_path: str, tmp_path: Path) -> dict[str, object]:
    files = {"train_file": data / "train_w_qa.jsonl", "document_path": data / "documents.jsonl"}
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "num_docs": 4, "learning_rate": 1e-3}
    return {"model_name_or_path": encoder_path, "output_dir": tmp_path / "out", **files, **settings}


def test_train_rpg_learns_from_a_server_what_it_learns_from_the_same_model_here(
    rpg: dict[str, object], scoring: OpenAIServer, lm_path: str, run_executable: Run, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rpg["text_maxlength"] = 256
    served = {"lm_model_path": f"openai::{scoring.url}", "lm_tokenizer": lm_path, "endpoint_api_key": "secret"}
    assert run_executable("train_rpg", {**rpg, **served}) == 0
    assert run_executable("train_rpg", {**rpg, "lm_model_path": lm_path, "output_dir": tmp_path / "here"}) == 0
    there, here = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "here"))
    for name, weight in here.items():
        # Adam steps as far for a tiny gradient as for a large one: where it is nearly zero, rounding shows.
        assert (there[name] - weight).abs().mean() < 1e-5
        torch.testing.assert_close(there[name], weight, rtol=0, atol=1e-3)
    assert {seen.key for seen in scoring.seen} == {"secret"}
    assert "secret" not in (tmp_path / "out/all_args.json").read_text() + (tmp_path / "out/train.log").read_text()
    assert run_executable("train_rpg", {**rpg, "lm_model_path": lm_path, "lm_tokenizer": lm_path}) == 2
    assert "--lm_tokenizer: a local model brings its own" in capsys.readouterr().err


def grade(messages: list[dict[str, str]]) -> str:
    """Answers every question with its own words; as a judge finds every second answer right."""
    if messages[0]["role"] != "system":
        return messages[-1]["content"].rpartition("Question: ")[2]
    founded = "founded" in messages[1]["content"]
    return json.dumps({"reason": "", "verdict": "correct" if founded else "incorrect"})


def test_evaluate_rqa_reads_and_judges_by_servers_and_asks_nothing_twice(
    data: Path, encoder_path: str, server: OpenAIServer, run_executable: Run, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    server.say = grade
    flags = {
        "qa_model_name_or_path": f"openai::{server.url}",
        "embedding_model_name_or_path": encoder_path,
        "document_path": data / "documents.jsonl",
        "eval_data_path": data / "test_w_qa.jsonl",
        "output_dir": tmp_path / "out",
    }
    judged = {"gen_gpt4eval": "true", "judge_model": "tiny", "judge_base_url": server.url}
    assert run_executable("evaluate_rqa", {**flags, **judged}) == 0
    scores = json.loads((tmp_path / "out/score.json").read_text())
    assert (scores["test_gen/gpt4eval"], scores["test_gen/gpt4eval_unparsed"]) == (0.5, 0)
    assert scores["test_gen/tokens_per_second"] > 0
    rows = [json.loads(line) for line in (tmp_path / "out/test-predictions.jsonl").open()]
    assert [row["generated_answer"] for row in rows] == [row["question"] for row in rows]
    assert len(server.questions) == 2 * len(rows)
    assert run_executable("evaluate_rqa", {**flags, **judged, "output_dir": tmp_path / "again"}) == 0
    assert len(server.questions) == 2 * len(rows)  # nothing is asked twice, and nothing is timed
    again = json.loads((tmp_path / "again/score.json").read_text())
    lost = scores.keys() - again.keys()
    assert "test_gen/tokens_per_second" in lost
    assert all("per_second" in name or "latency" in name for name in lost)
    assert all(scores[name] == value for name, value in again.items() if "retr/" not in name)
    server.key = "another"
    flags |= {"embedding_model_name_or_path": "bm25", "max_new_tokens": 9}
    assert run_executable("evaluate_rqa", flags) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert "401, Incorrect API key provided; the key is refused" in line


def test_a_trainers_final_test_is_judged_too(
    data: Path, lm_path: str, encoder_path: str, server: OpenAIServer, run_executable: Run, tmp_path: Path
) -> None:
    server.say = grade
    files = {"train_file": data / "train_w_qa.jsonl", "test_file": data / "test_w_qa.jsonl"}
    models = {"model_name_or_path": lm_path, "embedding_model": encoder_path, "document_path": data / "documents.jsonl"}
    flags = {**files, **models, "output_dir": tmp_path / "sft", "max_steps": 1, "max_new_tokens": 4}
    judge = {"gen_gpt4eval": "true", "judge_model": "tiny", "judge_base_url": server.url, "judge_max_examples": 3}
    assert run_executable("train_sft", {**flags, **judge}) == 0
    assert 0 <= json.loads((tmp_path / "sft/score.json").read_text())["test_gen/gpt4eval"] <= 1
    details = json.loads((tmp_path / "sft/score_details.json").read_text())["scores"]
    assert details["test_gen/gpt4eval"]["n"] == 3 == len(server.questions)
