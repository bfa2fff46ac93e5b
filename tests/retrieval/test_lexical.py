"""BM25 against its formula in a plain float64 loop."""

import math
import random
import re

import numpy as np
import pytest

from rqa.data import Document
from rqa.retrieval.hybrid import LexicalRetriever
from rqa.retrieval.retriever import best

QUESTIONS = ["What does Arlen trade in?", "when was BRASK founded", "amber amber honey", "zzz", "", "?!"]


def expected_scores(question: str, texts: list[str], k1: float = 1.2, b: float = 0.75) -> list[float]:
    """Lucene's BM25 as Kamphuis et al. (2020) print it."""
    documents = [re.findall(r"\w+", text.lower()) for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for words in documents:
        score = 0.0
        for word in re.findall(r"\w+", question.lower()):
            holding = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            count = words.count(word)
            score += idf * count / (count + k1 * (1 - b + b * len(words) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize("question", QUESTIONS)
def test_documents_are_ranked_by_bm25(question: str, documents: list[Document]) -> None:
    hits = LexicalRetriever(documents).retrieve([question], 24)
    scores = expected_scores(question, [document.fmt_content for document in documents])
    ranking = sorted((i for i in range(24) if scores[i] > 0), key=lambda i: (-round(scores[i], 5), i))
    found = [i for i in hits.ids[0].tolist() if i >= 0]
    assert found == ranking
    np.testing.assert_allclose(hits.scores[0, : len(found)], [scores[i] for i in ranking], rtol=1e-5)
    assert (hits.ids[0, len(found) :] == -1).all()
    assert (hits.scores[0, len(found) :] == -np.inf).all()


def test_all_questions_at_once_find_what_each_finds_alone(documents: list[Document]) -> None:
    retriever = LexicalRetriever(documents)
    together = retriever.retrieve(QUESTIONS, 5)
    assert together.ids.shape == together.scores.shape == (len(QUESTIONS), 5)
    for row, question in zip(together.ids, QUESTIONS, strict=True):
        np.testing.assert_array_equal(row, retriever.retrieve([question], 5).ids[0])
    assert retriever.retrieve([], 5).ids.shape == (0, 5)


def test_equal_documents_are_found_in_the_databases_order() -> None:
    retriever = LexicalRetriever([Document("same words", {"n": i}) for i in range(50)])
    assert retriever.retrieve(["words"], 7).ids.tolist() == [list(range(7))]


def test_documents_without_words_are_never_found() -> None:
    retriever = LexicalRetriever([Document("!?"), Document("...")])
    assert retriever.retrieve(["", "!?", "word"], 2).ids.tolist() == [[-1, -1]] * 3
    mixed = LexicalRetriever([Document("!?"), Document("word")])
    assert mixed.retrieve(["word", ""], 5).ids.tolist() == [[1, -1], [-1, -1]]


def test_case_and_accents_are_those_of_unicode() -> None:
    retriever = LexicalRetriever([Document("Die STRASSE nach Köln"), Document("x y z")])
    assert retriever.retrieve(["straße", "KÖLN", "Y"], 1).ids.tolist() == [[0], [0], [1]]


def test_the_identity_follows_documents_and_parameters(documents: list[Document]) -> None:
    identities = {
        LexicalRetriever(documents).identity(),
        LexicalRetriever(documents[1:]).identity(),
        LexicalRetriever(documents, k1=0.9).identity(),
        LexicalRetriever(documents, b=0.4).identity(),
    }
    assert len(identities) == 4
    assert LexicalRetriever(documents).identity() in identities


@pytest.mark.parametrize("seed", range(20))
def test_the_best_are_those_of_a_stable_sort(seed: int) -> None:
    chance = random.Random(seed)
    scores = [chance.choice([0.5, 1.0, 2.0, 3.0]) for _ in range(chance.randint(0, 12))]
    ids = chance.sample(range(100), len(scores))
    k = chance.randint(1, 14)
    expected = sorted(zip(scores, ids, strict=True), key=lambda pair: (-pair[0], pair[1]))[:k]
    expected += [(-np.inf, -1)] * (k - len(expected))
    found_ids, found_scores = best(np.array(scores), np.array(ids, dtype=np.int64), k)
    assert list(zip(found_scores.tolist(), found_ids.tolist(), strict=True)) == expected
