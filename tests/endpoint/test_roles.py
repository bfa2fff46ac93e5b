"""Readers, teachers and judges behind a server: by themselves, and as a user runs them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import pytest
from openai_server import OpenAIServer, error
from trainers import Run
from transformers import PreTrainedTokenizerBase

from rqa.data import Document, Example, Turn
from rqa.endpoint.client import Endpoint
from rqa.endpoint.scorer import EndpointScorer, remote_scorer
from rqa.models.loading import load_causal_lm
from rqa.objectives.teacher import Pair
from rqa.prompts import PromptArguments, Prompter
from rqa.recipe.retriever import TeacherArguments, open_teacher
from rqa.recipe.system import EndpointReader


def reader(server: OpenAIServer, **prompt: Any) -> EndpointReader:
    return EndpointReader(Endpoint(f"openai::{server.url}"), PromptArguments(**prompt))


def test_the_reader_asks_what_every_other_reader_sees_and_leaves_the_format_to_the_server(
    server: OpenAIServer, documents: list[Document], examples: list[Example]
) -> None:
    asked = Example("And Brask?", chat_history=(Turn("user", "Where is Arlen?"), Turn("assistant", "By the sea.")))
    ours = reader(server, chat_format="template", max_new_tokens=99)
    answers = ours.answer([asked, examples[0]], [documents[:2], []])
    body, _ = sorted(server.of("chat/completions"), key=lambda body: -len(body["messages"]))
    assert [turn["role"] for turn in body["messages"]] == ["user", "assistant", "user"]
    passages = f"[1] {documents[0].fmt_content}\n\n[2] {documents[1].fmt_content}"
    expected = ours.prompter.instruction.replace("{passages}", passages).replace("{question}", "And Brask?")
    assert (body["messages"][-1]["content"], body["max_tokens"]) == (expected, 99)
    assert [answer.text.rpartition(": ")[2] for answer in answers] == ["And Brask?", examples[0].question]
    assert answers[0].num_tokens > 10


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
    assert "it gets an empty answer" in caplog.text


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
def test_a_teacher_behind_a_server_scores_as_the_same_model_here_and_what_does_not_fit_is_not_asked_for(
    limit: int, scoring: OpenAIServer, lm_path: str, tokenizer: PreTrainedTokenizerBase, documents: list[Document],
    examples: list[Example],
) -> None:  # fmt: skip
    too_long = Pair(Example("Why? " * 200, gold_answer="So."), documents[0])
    pairs = [too_long, *(Pair(example, document) for example in examples[:4] for document in documents[:3])]
    server = {"lm_model_path": f"openai::{scoring.url}", "lm_tokenizer": lm_path}
    there, here = (
        open_teacher(TeacherArguments(text_maxlength=limit, dtype="float32", **flags))(pairs)
        for flags in (server, {"lm_model_path": lm_path, "lm_tokens_per_batch": 400})
    )
    assert there[1:] == pytest.approx(here[1:], abs=1e-5)
    asked = [len(tokenizer.encode(body["prompt"])) for body in scoring.of("completions")]
    assert len(asked) == len(pairs) - 1
    assert (limit - 20 < max(asked) <= limit) == (limit == 100)  # some are cut


def test_a_document_whose_score_is_refused_scores_as_the_others_of_its_question(
    scoring: OpenAIServer, tokenizer: PreTrainedTokenizerBase, documents: list[Document], examples: list[Example]
) -> None:
    pairs = [Pair(example, document) for example in examples[:2] for document in documents[:3]]
    scorer = EndpointScorer(Endpoint(f"openai::{scoring.url}"), Prompter(tokenizer, PromptArguments(max_new_tokens=1)))
    scorer.endpoint.flags.endpoint_concurrency = 1
    scoring.faults = [None, lambda: error(400, "filtered")]
    scores = [score for _, score in scorer(pairs)]
    assert scores[1] == pytest.approx((scores[0] + scores[2]) / 2)
    assert len(set(scores)) == len(scores)


def test_a_scorer_without_a_tokenizer_cuts_by_estimate(
    scoring: OpenAIServer, documents: list[Document], examples: list[Example]
) -> None:
    flags = TeacherArguments(lm_model_path=f"openai::{scoring.url}", text_maxlength=70, endpoint_model="tiny")
    scorer, identity = remote_scorer(flags)
    assert len(list(scorer([Pair(example, documents[0]) for example in examples[:4]]))) == 4
    assert 200 < max(len(body["prompt"]) for body in scoring.of("completions")) <= 70 * 3
    assert remote_scorer(replace(flags, endpoint_model="other"))[1] != identity


@pytest.mark.parametrize("trainer", ["train_rpg", "train_rerank"])
def test_a_trainer_learns_from_a_server_whose_key_it_writes_nowhere(
    trainer: str, train: Callable[..., Path], scoring: OpenAIServer, lm_path: str
) -> None:
    flags = {"max_steps": 1, "eval_file": None, "test_file": None, "refresh_step": None}
    served = {"lm_model_path": f"openai::{scoring.url}", "lm_tokenizer": lm_path, "endpoint_api_key": "secret"}
    output = train(trainer, **flags, **served)
    assert {seen.key for seen in scoring.seen} == {"secret"}
    assert "secret" not in (output / "all_args.json").read_text() + (output / "train.log").read_text()


@pytest.fixture
def judged(server: OpenAIServer) -> dict[str, object]:
    """Flags of a judge, who finds every second answer right; and the server repeats each question as its answer."""

    def grade(messages: list[dict[str, str]]) -> str:
        if messages[0]["role"] != "system":
            return messages[-1]["content"].rpartition("Question: ")[2]
        return json.dumps({"verdict": "correct" if "founded" in messages[1]["content"] else "incorrect"})

    server.say = grade
    return {"gen_gpt4eval": "true", "judge_model": "tiny", "judge_base_url": server.url}


def test_evaluate_rqa_reads_and_judges_by_servers_and_asks_nothing_twice(
    files: dict[str, Path], encoder_path: str, server: OpenAIServer, judged: dict[str, object], run_executable: Run,
    tmp_path: Path,
) -> None:  # fmt: skip
    flags = {"qa_model_name_or_path": f"openai::{server.url}", "embedding_model_name_or_path": encoder_path, **judged,
             "document_path": files["full_dataset_file_path"], "eval_data_path": files["test_file"]}  # fmt: skip
    assert run_executable("evaluate_rqa", {**flags, "output_dir": tmp_path / "out"}) == 0
    scores = json.loads((tmp_path / "out/score.json").read_text())
    assert (scores["test_gen/gpt4eval"], scores["test_gen/gpt4eval_unparsed"]) == (0.5, 0)
    assert scores["test_gen/tokens_per_second"] > 0
    rows = [json.loads(line) for line in (tmp_path / "out/test-predictions.jsonl").open()]
    assert [row["generated_answer"] for row in rows] == [row["question"] for row in rows]
    assert len(server.questions) == 2 * len(rows)
    assert run_executable("evaluate_rqa", {**flags, "output_dir": tmp_path / "again"}) == 0
    assert len(server.questions) == 2 * len(rows)  # nothing is asked twice, and nothing is timed
    again = json.loads((tmp_path / "again/score.json").read_text())
    lost = scores.keys() - again.keys()
    assert "test_gen/tokens_per_second" in lost
    assert all("per_second" in name or "latency" in name for name in lost)
    assert all(scores[name] == value for name, value in again.items() if "retr/" not in name)


def test_a_trainers_final_test_is_judged_too(
    train: Callable[..., Path], encoder_path: str, server: OpenAIServer, judged: dict[str, object]
) -> None:
    flags = {"eval_embedding_model": encoder_path, "max_steps": 1, "max_new_tokens": 4, "judge_max_examples": 3}
    details = json.loads((train("train_sft", **flags, **judged) / "score_details.json").read_text())["scores"]
    assert 0 <= details["test_gen/gpt4eval"]["value"] <= 1
    assert details["test_gen/gpt4eval"]["n"] == 3 == len(server.questions)
