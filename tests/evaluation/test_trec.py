"""Rankings' metrics against trec_eval itself, on random runs with ties, and files that it reads."""

import random
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval

from rqa.data import Document, Example
from rqa.evaluation.metrics import score_ranking
from rqa.evaluation.retrieval import (
    document_name,
    mean_scores,
    read_qrels,
    read_run,
    score_questions,
    write_qrels,
    write_run,
)
from rqa.retrieval.retriever import Hits
from rqa.runtime.errors import UserError

MEASURES = {"recip_rank", "ndcg_cut.10", "map_cut.10", "recall.1,4,10"}


def random_run(seed: int) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, int]]]:
    """Scores with many ties, and gold documents of which some are never found."""
    chance = random.Random(seed)
    names = [f"d{i}" for i in range(30)]
    run, qrels = {}, {}
    for number in range(30):
        found = chance.sample(names, chance.randint(1, 20))
        run[f"q{number}"] = {name: chance.choice([0.25, 0.5, 1.0, 2.0]) for name in found}
        qrels[f"q{number}"] = dict.fromkeys(chance.sample(names, chance.randint(1, 4)), 1)
    return run, qrels


@pytest.mark.parametrize("seed", range(20))
def test_metrics_of_rankings_are_those_of_trec_eval(seed: int, tmp_path: Path) -> None:
    run, qrels = random_run(seed)
    lines = [f"{q} Q0 {d} {n} {s} x" for q, row in run.items() for n, (d, s) in enumerate(row.items(), start=1)]
    (tmp_path / "run").write_text("\n".join(lines))
    (tmp_path / "qrels").write_text("\n".join(f"{q} 0 {d} 1" for q, row in qrels.items() for d in row))
    rankings, gold = read_run(tmp_path / "run"), read_qrels(tmp_path / "qrels")
    theirs = pytrec_eval.RelevanceEvaluator(qrels, MEASURES).evaluate(run)
    for question, ranking in rankings.items():
        ours = score_ranking(ranking, gold[question], [1, 4, 10])
        expected = theirs[question]
        assert ours["ndcg@10"] == pytest.approx(expected["ndcg_cut_10"], abs=1e-6)
        assert ours["map@10"] == pytest.approx(expected["map_cut_10"], abs=1e-6)
        for k in (1, 4, 10):  # a question counts when all its gold is found
            assert ours[f"recall@{k}"] == float(expected[f"recall_{k}"] == 1)
        first_ten = expected["recip_rank"] if expected["recip_rank"] >= 0.1 else 0.0  # trec_eval's knows no cut
        assert ours["mrr@10"] == pytest.approx(first_ten, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_trec_eval_finds_our_scores_in_the_files_we_write(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    documents = [Document(f"Passage {i}.", {"source": f"a b/{i}"}) for i in range(25)]
    examples = [Example(f"Q{i}?", tuple(chance.sample(documents, chance.randint(1, 3)))) for i in range(20)]
    ids = np.array([chance.sample(range(25), 12) for _ in examples])
    ids[0, 5:] = -1
    scores = -np.sort(-np.array([[chance.choice([0.5, 0.5000001, 3.0]) for _ in range(12)] for _ in examples]))
    write_run(tmp_path / "run", Hits(ids, scores), documents)
    write_qrels(tmp_path / "qrels", examples)
    with (tmp_path / "run").open() as run, (tmp_path / "qrels").open() as qrels:
        judge = pytrec_eval.RelevanceEvaluator(pytrec_eval.parse_qrel(qrels), MEASURES)
        theirs = judge.evaluate(pytrec_eval.parse_run(run))
    found = [[documents[i] for i in row if i >= 0] for row in ids.tolist()]
    ours = mean_scores(score_questions(found, examples, [1, 4, 10]))
    for name, measure in (("retr/ndcg@10", "ndcg_cut_10"), ("retr/map@10", "map_cut_10")):
        assert ours[name] == pytest.approx(np.mean([row[measure] for row in theirs.values()]), abs=1e-6)
    assert ours["retr/recall@4"] == np.mean([row["recall_4"] == 1 for row in theirs.values()])
    assert read_run(tmp_path / "run") == {
        str(n): [document_name(document) for document in row] for n, row in enumerate(found, start=1)
    }
    assert read_qrels(tmp_path / "qrels")["3"] == {document_name(document) for document in examples[2].gold_docs}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 Q0 d 1 0.5\n", "run:1: expected 6 fields, found 5"),
        ("1 Q0 d 1 0.5 x\n\n1 Q0 e 2 high x\n", "run:3: the score high is not a number"),
    ],
)
def test_what_is_not_a_run_says_where(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run").write_text(text)
    with pytest.raises(UserError, match=message):
        read_run(tmp_path / "run")


def test_what_is_not_a_qrels_file_says_where(tmp_path: Path) -> None:
    (tmp_path / "qrels").write_text("1 0 d 1\n1 0 e 0\n2 0 f -1\n")
    assert read_qrels(tmp_path / "qrels") == {"1": {"d"}, "2": set()}
    (tmp_path / "qrels").write_text("1 0 d yes\n")
    with pytest.raises(UserError, match="qrels:1: the relevance yes is not a whole number"):
        read_qrels(tmp_path / "qrels")
    with pytest.raises(UserError, match="cannot be read"):
        read_qrels(tmp_path / "nowhere")
