"""Readers, teachers and judges behind a server, as a user runs them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import pytest
from openai_server import OpenAIServer, serve
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from rqa.data import Document, Example
from rqa.endpoint.client import Endpoint, EndpointArguments
from rqa.endpoint.roles import EndpointScorer
from rqa.models.causal_lm import load_causal_lm
from rqa.objectives.teacher import AnswerScorer, Pair
from rqa.prompts import PromptArguments, Prompter

Run = Callable[[str, dict[str, object]], int]


@pytest.fixture
def server(
    lm_path: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[OpenAIServer]:
    """Serves the tiny language model's log-probabilities of a prompt."""
    monkeypatch.setenv("RQA_CACHE", str(tmp_path / "cache"))
    model = load_causal_lm(lm_path).eval()

    @torch.no_grad()
    def echo(body: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer(body["prompt"], return_offsets_mapping=True, add_special_tokens=False)
        ids = torch.tensor(encoded["input_ids"])
        values = model(ids[None]).logits[0].log_softmax(-1)
        values = [*values[:-1].gather(1, ids[1:, None])[:, 0].tolist(), values[-1].max().item()]
        spans = [*encoded["offset_mapping"], (len(body["prompt"]), len(body["prompt"]) + 1)]
        logprobs = {
            "tokens": [body["prompt"][begin:end] for begin, end in spans],
            "token_logprobs": [None, *values],
            "text_offset": [begin for begin, _ in spans],
        }
        return {"choices": [{"text": body["prompt"] + "!", "logprobs": logprobs}], "usage": {"completion_tokens": 1}}

    with serve() as ours:
        ours.complete = echo
        yield ours


@pytest.mark.parametrize("limit", [256, 100])
def test_scores_from_a_server_equal_those_of_the_same_model_here(
    limit: int, server: OpenAIServer, lm_path: str, tokenizer: PreTrainedTokenizerBase, documents: list[Document],
    examples: list[Example],
) -> None:  # fmt: skip
    pairs = [Pair(example, document) for example in examples[:4] for document in documents[:3]]
    prompter = Prompter(tokenizer, PromptArguments(max_seq_length=limit, max_new_tokens=1))
    assert any(len(prompter.encode(*pair[:1], [pair.document]).ids) > 75 for pair in pairs)
    here = dict(AnswerScorer(load_causal_lm(lm_path), prompter, 400)(pairs))
    endpoint = Endpoint(f"openai::{server.url}", EndpointArguments())
    there = dict(EndpointScorer(endpoint, prompter)(pairs))
    assert [there[i] for i in range(len(pairs))] == pytest.approx([here[i] for i in range(len(pairs))], abs=1e-5)


def test_a_pair_that_does_not_fit_is_not_asked_for(
    server: OpenAIServer, tokenizer: PreTrainedTokenizerBase, documents: list[Document], examples: list[Example]
) -> None:
    prompter = Prompter(tokenizer, PromptArguments(max_seq_length=100, max_new_tokens=1))
    pairs = [Pair(Example("Why? " * 100, gold_answer="So."), documents[0]), Pair(examples[0], documents[0])]
    scores = dict(EndpointScorer(Endpoint(f"openai::{server.url}", EndpointArguments()), prompter)(pairs))
    assert set(scores) == {0, 1}
    assert len(server.of("completions")) == 1


@pytest.fixture
def rpg(data: Path, encoder_path: str, tmp_path: Path) -> dict[str, object]:
    return {
        "model_name_or_path": encoder_path,
        "train_file": data / "train_w_qa.jsonl",
        "full_dataset_file_path": data / "documents.jsonl",
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_docs": 4,
        "text_maxlength": 256,
        "learning_rate": 1e-3,
        "logging_steps": 1,
    }


def test_train_rpg_learns_from_a_server_what_it_learns_from_the_same_model_here(
    rpg: dict[str, object], server: OpenAIServer, lm_path: str, run_executable: Run, tmp_path: Path
) -> None:
    served = {"lm_model_path": f"openai::{server.url}", "lm_tokenizer": lm_path, "endpoint_api_key": "secret"}
    assert run_executable("train_rpg", {**rpg, **served}) == 0
    assert run_executable("train_rpg", {**rpg, "lm_model_path": lm_path, "output_dir": tmp_path / "here"}) == 0
    there, here = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "here"))
    for name, weight in here.items():
        # Adam steps as far for a tiny gradient as for a large one: where it is nearly zero, rounding shows.
        assert (there[name] - weight).abs().mean() < 1e-5
        torch.testing.assert_close(there[name], weight, rtol=0, atol=1e-3)
    assert {seen.key for seen in server.seen} == {"secret"}
    assert "secret" not in (tmp_path / "out/all_args.json").read_text() + (tmp_path / "out/train.log").read_text()


def test_train_rpg_cuts_by_estimate_where_it_has_no_tokenizer(
    rpg: dict[str, object], server: OpenAIServer, run_executable: Run
) -> None:
    assert run_executable("train_rpg", {**rpg, "lm_model_path": f"openai::{server.url}", "text_maxlength": 70}) == 0
    sizes = [len(body["prompt"]) for body in server.of("completions")]
    assert 200 < max(sizes) <= 70 * 3


def test_a_tokenizer_for_a_local_model_is_refused(
    rpg: dict[str, object], lm_path: str, run_executable: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_executable("train_rpg", {**rpg, "lm_model_path": lm_path, "lm_tokenizer": lm_path}) == 2
    assert "--lm_tokenizer: a local model brings its own" in capsys.readouterr().err


@pytest.fixture
def evaluated(data: Path, encoder_path: str, tmp_path: Path, server: OpenAIServer) -> dict[str, object]:
    return {
        "qa_model_name_or_path": f"openai::{server.url}",
        "embedding_model_name_or_path": encoder_path,
        "document_path": data / "documents.jsonl",
        "eval_data_path": data / "test_w_qa.jsonl",
        "output_dir": tmp_path / "out",
    }


def grade(messages: list[dict[str, str]]) -> str:
    """Answers every question with its own words; as a judge finds every second answer right."""
    if messages[0]["role"] != "system":
        return messages[-1]["content"].rpartition("Question: ")[2]
    founded = "founded" in messages[1]["content"]
    return json.dumps({"reason": "", "verdict": "correct" if founded else "incorrect"})


def test_evaluate_rqa_reads_and_judges_by_servers(
    evaluated: dict[str, object], server: OpenAIServer, run_executable: Run, tmp_path: Path
) -> None:
    server.say = grade
    judged = {"gen_gpt4eval": "true", "judge_model": "tiny", "judge_base_url": server.url}
    assert run_executable("evaluate_rqa", {**evaluated, **judged}) == 0
    scores = json.loads((tmp_path / "out/score.json").read_text())
    assert scores["test_gen/gpt4eval"] == 0.5
    assert scores["test_gen/gpt4eval_unparsed"] == 0
    assert scores["test_gen/tokens_per_second"] > 0
    rows = [json.loads(line) for line in (tmp_path / "out/test-predictions.jsonl").open()]
    assert [row["generated_answer"] for row in rows] == [row["question"] for row in rows]
    assert len(server.of("chat/completions")) == 2 * len(rows)
    assert run_executable("evaluate_rqa", {**evaluated, **judged, "output_dir": tmp_path / "again"}) == 0
    assert len(server.of("chat/completions")) == 2 * len(rows)  # nothing is asked twice, and nothing is timed
    again = json.loads((tmp_path / "again/score.json").read_text())
    assert {name: scores[name] for name in again if "retr/" not in name} == {
        name: value for name, value in again.items() if "retr/" not in name
    }
    assert {name for name in scores.keys() - again.keys() if "per_second" in name or "latency" in name} == (
        scores.keys() - again.keys()
    )
    assert "test_gen/tokens_per_second" not in again


def test_a_server_that_refuses_the_key_is_one_line_and_status_2(
    evaluated: dict[str, object], server: OpenAIServer, run_executable: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    server.key = "another"
    assert run_executable("evaluate_rqa", {**evaluated, "embedding_model_name_or_path": "bm25"}) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "401, Incorrect API key provided; the key is refused" in lines[0]


def test_a_trainers_final_test_is_judged_too(
    data: Path, lm_path: str, encoder_path: str, server: OpenAIServer, run_executable: Run, tmp_path: Path
) -> None:
    server.say = grade
    flags = {
        "model_name_or_path": lm_path,
        "train_file": data / "train_w_qa.jsonl",
        "test_file": data / "test_w_qa.jsonl",
        "full_dataset_file_path": data / "documents.jsonl",
        "eval_embedding_model": encoder_path,
        "output_dir": tmp_path / "sft",
        "max_steps": 1,
        "max_new_tokens": 4,
        "gen_gpt4eval": "true",
        "judge_model": "tiny",
        "judge_base_url": server.url,
        "judge_max_examples": 3,
    }
    assert run_executable("train_sft", flags) == 0
    scores = json.loads((tmp_path / "sft/score.json").read_text())
    assert 0 <= scores["test_gen/gpt4eval"] <= 1
    details = json.loads((tmp_path / "sft/score_details.json").read_text())["scores"]
    assert details["test_gen/gpt4eval"]["n"] == 3 == len(server.of("chat/completions"))
