"""A second stage beside a plain loop over what the first stage finds, and wherever a retriever is used."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from milvus_lite.server_manager import server_manager_instance
from trainers import Run, Train, calls, scores

from rqa.data import Document
from rqa.models.reranker import load_reranker
from rqa.retrieval import reranking
from rqa.retrieval.hybrid import RetrieverArguments, open_retriever
from rqa.retrieval.reranking import RerankingRetriever
from rqa.retrieval.retriever import Hits

Open = Callable[..., Any]
QUESTIONS = ["What does Arlen trade in?", "when was BRASK founded", "amber honey", "zzz"]


@pytest.mark.parametrize(("depth", "k", "at_once"), [(6, 3, 1), (2, 5, 20), (99, 99, 99), (9, 1, 10**6)])
def test_the_depth_best_are_ordered_by_score_and_equals_as_they_were(
    depth: int, k: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a loop: some questions find fewer passages or none, some passages have the same text or score."""
    chance, read, wide = random.Random(depth), [], min(max(depth, k), 12)
    documents = [Document(f"text {n % 7}", {"n": n}) for n in range(12)]
    found = [chance.sample(range(12), chance.choice([0, 5, 12])) for _ in range(20)]

    def retrieve(questions: Sequence[str], k: int) -> Hits:
        rows = [(found[int(question)] + [-1] * 12)[: min(k, 12)] for question in questions]
        ids = np.array(rows)
        return Hits(ids, np.zeros(ids.shape))

    def score(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        read.append(pairs)
        return np.array([len(question) + int(text[-1]) // 2 for question, text in pairs], dtype=np.float32)

    monkeypatch.setattr(reranking, "PAIRS_AT_ONCE", at_once)
    first: Any = SimpleNamespace(retrieve=retrieve, documents=documents, encoder=None)
    ranker: Any = SimpleNamespace(score=score)
    hits = RerankingRetriever(first, ranker, depth).retrieve([str(n) for n in range(20)], k)
    assert hits.ids.shape == (20, min(k, 12))
    for number, row in enumerate(found):
        worth = {i: len(str(number)) + i % 7 // 2 for i in row[:wide]}
        expected = sorted(worth, key=lambda i: -worth[i])[:k]  # stable
        empty = hits.ids.shape[1] - len(expected)
        assert hits.ids[number].tolist() == expected + [-1] * empty
        assert hits.scores[number].tolist() == [worth[i] for i in expected] + [-np.inf] * empty
    assert len({pair for part in read for pair in part}) == sum(map(len, read))  # each text of a question is read once
    assert max(map(len, read)) <= max(at_once, wide)


def test_a_weight_adds_the_first_stage_s_scores_to_the_reranker_s_both_from_0_to_1() -> None:
    found = Hits(np.array([[4, 2, 0, -1]]), np.array([[30.0, 20.0, 10.0, -np.inf]], dtype=np.float32))
    texts = [Document(str(n)) for n in range(5)]
    first: Any = SimpleNamespace(retrieve=lambda questions, k: found, documents=texts, encoder=None)
    worth = {"4": -2.0, "2": 2.0, "0": 0.0}
    ranker: Any = SimpleNamespace(score=lambda pairs: np.array([worth[text] for _, text in pairs], dtype=np.float32))
    hits = RerankingRetriever(first, ranker, 9, 0.25).retrieve(["?"], 3)
    assert hits.ids.tolist() == [[4, 2, 0]]
    assert hits.scores.tolist() == [[0.75, 0.625, 0.125]]  # 0.25 * (0, 1, 0.5) + 0.75 * (1, 0.5, 0)


@pytest.fixture
def opened(encoder_path: str, reranker_path: str, documents: list[Document], tmp_path: Path) -> Iterator[Open]:
    def opened_with(kind: str, **flags: Any) -> Any:
        where = {"index_path": f"milvus::{tmp_path}/a.db/wiki", "filter": 'source != "guide/3"'}
        given = {"retriever": "dense"} | where if kind == "milvus" else {"retriever": kind}
        given |= {"reranker": reranker_path, "rerank_depth": 7, "dtype": "float32"} | flags
        return open_retriever(RetrieverArguments(**given), encoder_path, documents)

    yield opened_with
    server_manager_instance.release_server(f"{tmp_path}/a.db")


@pytest.mark.parametrize("kind", ["dense", "bm25", "hybrid", "milvus"])
def test_whatever_the_first_stage_finds_is_ranked_by_the_reranker(
    kind: str, opened: Open, reranker_path: str, documents: list[Document]
) -> None:
    both, ranker = opened(kind), load_reranker(reranker_path)
    candidates, hits = both.first.retrieve(QUESTIONS, 7), both.retrieve(QUESTIONS, 3)
    for question, row, ids, found in zip(QUESTIONS, candidates.ids, hits.ids, hits.scores, strict=True):
        alone = {i: ranker.score([(question, documents[i].fmt_content)])[0] for i in row if i >= 0}
        expected = sorted(alone, key=lambda i: -alone[i])[:3]
        assert ids[ids >= 0].tolist() == expected
        np.testing.assert_allclose(found[ids >= 0], [alone[i] for i in expected], atol=1e-5)
    assert (hits.ids[3] == -1).all() == (kind == "bm25")


def test_whatever_decides_what_is_found_makes_another_identity(opened: Open, reranker_path: str) -> None:
    made, ranker = opened("bm25"), load_reranker(reranker_path)
    assert opened("bm25").identity() == made.identity()
    ranker.model.get_input_embeddings().weight.data[9] += 1
    others = [opened("bm25", rerank_depth=8), opened("bm25", dtype="bfloat16"), opened("dense"), made.first,
              RerankingRetriever(made.first, ranker, 7)]  # fmt: skip
    assert len({retriever.identity() for retriever in [made, *others]}) == 6


def test_an_evaluation_tells_the_times_of_both_stages_apart(
    files: dict[str, Path], reranker_path: str, run_executable: Run, tmp_path: Path
) -> None:
    flags = {"embedding_model": "bm25", "reranker": reranker_path, "output_dir": tmp_path,
             "document_path": files["full_dataset_file_path"], "eval_data_path": files["test_file"]}  # fmt: skip
    assert run_executable("evaluate_retriever", flags) == 0
    figures = {f"{stage}latency_p{p}_ms" for stage in ("", "first_stage_", "reranking_") for p in (50, 95, 99)}
    assert {f"test_retr/{figure}" for figure in figures} <= scores(tmp_path).keys()
    assert {line.split()[-1] for line in (tmp_path / "run.trec").open()} == {"bm25-reranked"}


@pytest.mark.parametrize(("trainer", "times"), [("sft", 2), ("swr", 3), ("fid", 3), ("dca", 1)])
def test_a_trainer_reads_what_a_reranker_ranks_first(
    trainer: str, times: int, train: Train, encoder_path: str, reranker_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training, evaluation and test; a retriever in training is evaluated by itself."""
    ranked = calls(monkeypatch, RerankingRetriever, "rerank")
    own = {} if trainer == "dca" else {"embedding_model": encoder_path}
    train(f"train_{trainer}", reranker=reranker_path, rerank_depth=6, max_steps=1, **own)
    assert [hits.ids.shape[1] for _, hits, _ in ranked] == [10 if len(q) == 4 else 6 for q, *_ in ranked]
    assert len(ranked) == times


def test_a_reranker_that_cannot_be_used_is_one_line_before_an_index_is_built(
    files: dict[str, Path], encoder_path: str, refused: Callable[..., None], tmp_path: Path
) -> None:
    for flags, message in {
        f"--reranker {encoder_path}": f"model {encoder_path}: is not a reranker; train one from it",
        "--reranker /nowhere": "model /nowhere: cannot be loaded: no such directory",
        "--rerank_depth 9": "--rerank_depth 9: has no effect without a reranker; add --reranker",
    }.items():
        line = ["--document_path", files["full_dataset_file_path"], *flags.split(), "--embedding_model", encoder_path]
        line += ["--index_path", tmp_path / "index", "--output_dir", tmp_path / "out"]
        refused(message, "evaluate_retriever", *line, "--eval_data_path", files["test_file"])
        line = [*line[:-1], "--output_path", tmp_path / "mined", "--train_file", files["train_file"]]
        refused(message, "mine_negatives", *(part for part in line if part != "--output_dir"), "--retriever", "both")
    assert not (tmp_path / "index").exists()
