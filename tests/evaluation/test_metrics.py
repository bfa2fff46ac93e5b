"""Metrics against values worked out by hand, plain loops and the libraries themselves."""

import itertools
import random

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import ndcg_score

from rqa.data import Document, Example
from rqa.evaluation.metrics import (
    average_precision,
    corpus_bleu,
    exact_match,
    faithfulness,
    ndcg,
    normalize_answer,
    recall_at,
    reciprocal_rank,
    score_answer,
    token_f1,
)
from rqa.evaluation.retrieval import mean_scores, score_questions

PAIRS = [
    ("Arlen trades in copper.", "Arlen trades in copper."),
    ("It trades in copper and wool, each spring.", "Arlen trades in copper."),
    ("Honey", "Arlen trades in copper."),
    ("", "Arlen trades in copper."),
    ("In the year 1100.", "in the year 1107"),
    ("copper copper copper copper", "copper"),
    ("Cities trading coppers", "City trade copper"),
]


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The  Harbour, of a Town!", ["harbour", "of", "town"]),
        ("An apple; the theme", ["apple", "theme"]),
        ("U.S. don't", ["us", "dont"]),
        ("a the an", []),
        ("Ärmel\tÜ", ["ärmel", "ü"]),
    ],
)
def test_answers_are_normalised_as_squad_does(text: str, words: list[str]) -> None:
    assert normalize_answer(text) == words


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("copper", "copper", 1.0),
        ("The Copper!", "copper", 1.0),
        ("wool", "copper", 0.0),
        ("copper and wool", "copper", 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("copper copper", "copper", 2 * 0.5 * 1 / 1.5),
        ("copper copper wool", "copper copper salt", 2 / 3),
        ("in year 1100", "in the year of 1100", 2 * 1 * (3 / 4) / (7 / 4)),
        ("", "copper", 0.0),
        ("copper", "", 0.0),
        ("", "", 1.0),
        ("the", "a", 1.0),
    ],
)
def test_token_f1_is_the_value_worked_out_by_hand(answer: str, reference: str, f1: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(f1, abs=1e-12)
    assert token_f1(reference, answer) == pytest.approx(f1, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The copper.", "copper", 1.0),
        ("copper wool", "wool copper", 0.0),
        ("copper", "copper copper", 0.0),
        ("", "the", 1.0),
    ],
)
def test_an_exact_match_is_one_of_normalised_words(answer: str, reference: str, expected: float) -> None:
    assert exact_match(answer, reference) == expected


@pytest.mark.parametrize(("answer", "reference"), PAIRS)
def test_rouge_is_that_of_rouge_score(answer: str, reference: str) -> None:
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(target=reference, prediction=answer)
    ours = score_answer(answer, reference)
    assert {kind: ours[kind] for kind in theirs} == {kind: score.fmeasure for kind, score in theirs.items()}
    assert ours["f1"] == token_f1(answer, reference)
    assert ours["exact_match"] == exact_match(answer, reference)
    assert set(ours) == {"rouge1", "rouge2", "rougeL", "f1", "exact_match"}


def test_rouge_worked_out_by_hand() -> None:
    scores = score_answer("one two four", "one two three four five")
    assert scores["rouge1"] == pytest.approx(2 * 1 * 0.6 / 1.6)
    assert scores["rouge2"] == pytest.approx(2 * (1 / 2) * (1 / 4) / (3 / 4))
    assert scores["rougeL"] == pytest.approx(2 * 1 * 0.6 / 1.6)


@pytest.mark.parametrize(
    ("answer", "passages", "words", "pairs"),
    [
        ("Copper and wool.", ["They sell copper.", "and some wool"], 1.0, 0.0),
        ("copper and wool", ["The copper and wool!"], 1.0, 1.0),
        ("copper copper copper wool", ["copper, copper"], 0.5, 1 / 3),
        ("the copper", ["a copper"], 1.0, 0.0),
        ("amber", ["copper"], 0.0, 0.0),
        ("", ["copper"], 0.0, 0.0),
        ("copper", [], 0.0, 0.0),
    ],
)
def test_faithfulness_is_the_share_of_the_answer_that_the_passages_hold(
    answer: str, passages: list[str], words: float, pairs: float
) -> None:
    assert faithfulness(answer, passages) == pytest.approx(words)
    assert faithfulness(answer, passages, 2) == pytest.approx(pairs)


@pytest.mark.parametrize("seed", range(10))
def test_faithfulness_is_a_rate_that_counting_one_by_one_gives(seed: int) -> None:
    chance = random.Random(seed)
    answer = chance.choices("bcdef", k=chance.randint(1, 9))
    passages = [chance.choices("bcdef", k=chance.randint(0, 9)) for _ in range(3)]
    for size in (1, 2):
        runs = [answer[i : i + size] for i in range(len(answer) - size + 1)]
        left = [passage[i : i + size] for passage in passages for i in range(len(passage) - size + 1)]
        held = 0
        for run in runs:
            if run in left:
                left.remove(run)
                held += 1
        ours = faithfulness(" ".join(answer), [" ".join(passage) for passage in passages], size)
        assert ours == pytest.approx(held / len(runs) if runs else 0.0)
        assert 0 <= ours <= 1


@pytest.mark.parametrize("size", range(1, len(PAIRS) + 1))
def test_bleu_is_that_of_sacrebleu_over_the_whole_corpus(size: int) -> None:
    answers, references = zip(*PAIRS[:size], strict=True)
    theirs = sacrebleu.BLEU().corpus_score(list(answers), [list(references)]).score
    assert corpus_bleu(answers, references) == pytest.approx(theirs / 100, abs=1e-12)


def test_every_score_of_an_answer_is_between_0_and_1() -> None:
    perfect = [(f"{'word ' * n}", f"{'word ' * n}") for n in range(1, 12)] + [
        (document, document) for document in ("the cat sat on the mat", "one two three four five six seven")
    ]
    for answer, reference in [*PAIRS, *perfect, *itertools.product(["", "a", "b c"], repeat=2)]:
        assert all(0 <= score <= 1 for score in score_answer(answer, reference).values())
        assert 0 <= corpus_bleu([answer], [reference]) <= 1


# ---------------------------------------------------------------- rankings


@pytest.mark.parametrize(
    ("ranking", "gold", "k", "recall"),
    [
        ("abcd", "a", 1, 1.0),
        ("abcd", "b", 1, 0.0),
        ("abcd", "ab", 1, 0.0),
        ("abcd", "ab", 2, 1.0),
        ("abcd", "ad", 3, 0.0),
        ("abcd", "ad", 4, 1.0),
        ("ab", "b", 10, 1.0),
        ("", "a", 5, 0.0),
    ],
)
def test_a_question_is_recalled_when_all_its_gold_is_found(ranking: str, gold: str, k: int, recall: float) -> None:
    assert recall_at(ranking, set(gold), k) == recall


@pytest.mark.parametrize(
    ("ranking", "gold", "k", "expected"),
    [("abcd", "a", 10, 1.0), ("abcd", "cd", 10, 1 / 3), ("abcd", "d", 3, 0.0), ("abcd", "x", 10, 0.0)],
)
def test_the_reciprocal_rank_is_the_first_gold_ones(ranking: str, gold: str, k: int, expected: float) -> None:
    assert reciprocal_rank(ranking, set(gold), k) == expected


@pytest.mark.parametrize(
    ("ranking", "gold", "k", "expected"),
    [
        ("abcd", "a", 10, 1.0),
        ("abcd", "b", 10, 0.6309297535714575),  # 1 / log2(3)
        ("abcd", "c", 10, 0.5),  # 1 / log2(4)
        ("abcd", "ac", 10, 1.5 / 1.6309297535714575),
        ("abcd", "ab", 10, 1.0),
        ("abcd", "abx", 10, 1.6309297535714575 / 2.1309297535714575),
        ("abcd", "abc", 1, 1.0),
        ("abcd", "d", 3, 0.0),
    ],
)
def test_ndcg_is_the_value_worked_out_by_hand(ranking: str, gold: str, k: int, expected: float) -> None:
    assert ndcg(ranking, set(gold), k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("ranking", "gold", "k", "expected"),
    [
        ("abcd", "a", 10, 1.0),
        ("abcd", "bd", 10, (1 / 2 + 2 / 4) / 2),
        ("abcd", "bx", 10, (1 / 2) / 2),
        ("abcd", "bd", 3, (1 / 2) / 2),
        ("abab", "b", 10, 1 / 2),
        ("", "b", 10, 0.0),
    ],
)
def test_average_precision_is_the_value_worked_out_by_hand(ranking: str, gold: str, k: int, expected: float) -> None:
    assert average_precision(ranking, set(gold), k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_ndcg_is_that_of_scikit_learn(seed: int) -> None:
    chance = random.Random(seed)
    ranking = chance.sample(range(30), 30)
    gold = set(chance.sample(range(30), chance.randint(1, 15)))
    relevance = np.array([[float(document in gold) for document in ranking]])
    theirs = ndcg_score(relevance, np.arange(30, 0, -1.0)[None], k=10)
    assert ndcg(ranking, gold, 10) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_a_document_found_twice_counts_once(seed: int) -> None:
    chance = random.Random(seed)
    ranking = [chance.randrange(4) for _ in range(12)]
    gold = set(chance.sample(range(4), chance.randint(1, 3)))
    for k in (1, 3, 10):
        assert 0 <= recall_at(ranking, gold, k) <= 1
        assert 0 <= reciprocal_rank(ranking, gold, k) <= 1
        assert 0 <= ndcg(ranking, gold, k) <= 1
    assert ndcg([0, 0, 0], {0}, 10) == ndcg([0, 1, 2], {0}, 10) == 1


def random_questions(seed: int) -> tuple[list[list[Document]], list[Example]]:
    chance = random.Random(seed)
    pool = [Document(f"Passage {i}.", {"source": str(i)}) for i in range(25)]
    found = [chance.sample(pool, 20) for _ in range(40)]
    examples = [Example(f"Question {i}?", tuple(chance.sample(pool, chance.randint(0, 3)))) for i in range(40)]
    return found, examples


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_means_over_the_questions_with_gold_as_plain_loops_give(seed: int) -> None:
    found, examples = random_questions(seed)
    ours = mean_scores(score_questions(found, examples, [1, 4, 10]))
    recall, mrr, gains = {1: [], 4: [], 10: []}, [], []
    for documents, example in zip(found, examples, strict=True):
        if not example.gold_docs:
            continue
        names = [document.page_content for document in documents]
        gold = [document.page_content for document in example.gold_docs]
        for k, values in recall.items():
            values.append(1.0 if all(name in names[:k] for name in gold) else 0.0)
        ranks = sorted(names.index(name) + 1 for name in gold if name in names[:10])
        mrr.append(np.float64(1) / ranks[0] if ranks else 0.0)
        ideal = sum(np.float64(1) / np.log2(rank + 1) for rank in range(1, len(gold) + 1))
        gains.append(sum(np.float64(1) / np.log2(rank + 1) for rank in ranks) / ideal)
    assert 0 < len(mrr) < len(examples)
    for k, values in recall.items():
        assert ours[f"retr/recall@{k}"] == pytest.approx(np.mean(values), abs=1e-12)
        assert ours[f"retr/document_recall/recall{k}"] == ours[f"retr/recall@{k}"]
    assert ours["retr/mrr@10"] == pytest.approx(np.mean(mrr), abs=1e-12)
    assert ours["retr/ndcg@10"] == pytest.approx(np.mean(gains), abs=1e-12)
    assert all(0 <= value <= 1 for value in ours.values())
    assert len(ours) == 9


def test_documents_are_gold_by_source_and_content() -> None:
    found = [[Document("Text.", {"source": "b"}), Document("Text.", {"source": "a", "title": "more"}, "formatted")]]
    scores = mean_scores(score_questions(found, [Example("Why?", (Document("Text.", {"source": "a"}),))], [1, 2]))
    assert (scores["retr/recall@1"], scores["retr/recall@2"], scores["retr/mrr@10"]) == (0, 1, 0.5)


def test_gold_named_twice_is_one_document() -> None:
    gold = Document("Text.", {"source": "a"})
    scores = mean_scores(score_questions([[gold]], [Example("Why?", (gold, gold))], [1]))
    assert set(scores.values()) == {1.0}


def test_questions_without_gold_have_no_scores() -> None:
    assert mean_scores(score_questions([[], []], [Example("Why?"), Example("How?")], [1])) == {}
    assert mean_scores([]) == {}
