"""BM25 against its formula in a plain float64 loop; fusion of ranks and scores against loops; opening."""

import math
import random
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rqa.data import Document, Example, write_examples
from rqa.models.encoder import load_encoder
from rqa.retrieval import hybrid
from rqa.retrieval.hybrid import HybridRetriever, LexicalRetriever, RetrieverArguments
from rqa.retrieval.retriever import Hits, PassageRetriever, Retriever
from rqa.runtime.errors import UserError

Open = Callable[..., Any]
QUESTIONS = ["What does Arlen trade in?", "when was BRASK founded", "amber amber honey", "zzz", "", "?!"]


def expected_scores(question: str, texts: list[str], k1: float = 1.2, b: float = 0.75) -> list[float]:
    """Lucene's BM25 as Kamphuis et al. (2020) print it, of words without a plural's s."""

    def counted(text: str) -> list[str]:
        return [re.sub(r"(?<=\w\w[^s])s$", "", word) for word in re.findall(r"\w+", text.lower())]

    question = re.sub(r"(?i)\b(what|does|in|when|was)\b", "", question)
    documents = [counted(text) for text in texts]
    mean, scores = sum(map(len, documents)) / len(documents), [0.0] * len(texts)
    for word in counted(question):
        holding = sum(word in words for words in documents)
        idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
        for i, words in enumerate(documents):
            scores[i] += idf * words.count(word) / (words.count(word) + k1 * (1 - b + b * len(words) / mean))
    return scores


@pytest.mark.parametrize(("at_once", "parameters"), [(10**6, {}), (1, {}), (50, {"k1": 0.9, "b": 0.4})])
def test_documents_are_ranked_by_bm25_and_those_without_a_common_word_are_not_found(
    at_once: int, parameters: dict[str, float], documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hybrid, "AT_ONCE", at_once)
    hits = LexicalRetriever(documents, **parameters).retrieve(QUESTIONS, 99)
    assert hits.ids.shape == hits.scores.shape == (len(QUESTIONS), 24)
    for row, question in enumerate(QUESTIONS):
        scores = expected_scores(question, [document.fmt_content for document in documents], **parameters)
        ranking = sorted((i for i in range(24) if scores[i] > 0), key=lambda i: (-round(scores[i], 5), i))
        assert hits.ids[row].tolist() == ranking + [-1] * (24 - len(ranking))
        wanted = [scores[i] for i in ranking] + [-np.inf] * (24 - len(ranking))
        np.testing.assert_allclose(hits.scores[row], wanted, rtol=1e-5)
    assert LexicalRetriever(documents).retrieve([], 5).ids.shape == (0, 5)


@pytest.mark.parametrize(
    ("texts", "questions", "expected"),
    [
        (["same words"] * 50, ["words"], [list(range(7))]),  # in the database's order
        (["!?", "..."], ["", "!?", "word"], [[-1, -1]] * 3),
        (["!?", "word"], ["word", ""], [[1, -1], [-1, -1]]),
        (["东京是日本的首都。", "京都在东边", "喝茶"], ["东京", "茶"], [[0, 1, -1], [2, -1, -1]]),  # pairs decide
        (["e\u0301cole", "ｶﾀｶﾅ", "กรุงเทพ"], ["École", "カタ", "เทพ"], [[0, -1, -1], [1, -1, -1], [2, -1, -1]]),
        (
            ["how to", "cats of glass", "a cat's s"],
            ["how to", "what is a cat?", "GLASS"],
            [[0, -1, -1], [1, 2, -1], [1, -1, -1]],
        ),
        (["Die STRASSE nach Köln", "x y z"], ["straße", "KÖLN", "Y"], [[0, -1], [0, -1], [1, -1]]),
    ],
)
def test_words_are_those_of_unicode_and_documents_without_any_are_never_found(
    texts: list[str], questions: list[str], expected: list[list[int]]
) -> None:
    retriever = LexicalRetriever([Document(text, {"n": n}) for n, text in enumerate(texts)])
    assert retriever.retrieve(questions, 7).ids.tolist() == expected


def test_the_index_is_built_once_and_again_when_it_is_damaged(
    documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, build = [], hybrid._build
    monkeypatch.setattr(hybrid, "_build", lambda path, *rest: (built.append(path), build(path, *rest)))
    found = [LexicalRetriever(documents).retrieve(QUESTIONS, 5) for _ in range(2)]
    assert len(built) == 1
    for number, name in enumerate(hybrid.FILES, start=2):
        (path,) = tmp_path.glob(f"cache/bm25/*/{name}")
        path.write_bytes(path.read_bytes()[:-1])
        found.append(LexicalRetriever(documents).retrieve(QUESTIONS, 5))
        assert len(built) == number
    assert len({each.ids.tobytes() + each.scores.tobytes() for each in found}) == 1


def hits(*rows: list[tuple[int, float]]) -> Hits:
    return Hits(np.array([[i for i, _ in row] for row in rows]), np.array([[s for _, s in row] for row in rows]))


@pytest.mark.parametrize(("weight", "normalization"), [(0.3, "min_max"), (0.6, "z"), (1.0, "min_max"), (0.0, "z")])
def test_fusion_is_that_of_plain_loops(weight: float, normalization: str) -> None:
    """Ranks start at 1; the last score of a list counts zero, and one where all are equal."""
    chance = random.Random(0)
    for _ in range(20):
        ranks: dict[int, float] = {}
        sums: dict[int, float] = {}
        lists = []
        for share in (weight, 1 - weight):
            found = chance.sample(range(15), chance.randint(0, 8))
            row = sorted(((i, chance.choice([0.1, 0.4, 0.7, 2.0])) for i in found), key=lambda pair: -pair[1])
            lists.append(hits(row + [(-1, -np.inf)] * (8 - len(row))))
            scores = [score for _, score in row]
            for rank, (document, score) in enumerate(row, start=1):
                unit = statistics.pstdev(scores) if normalization == "z" else scores[0] - scores[-1]
                ranks[document] = ranks.get(document, 0) + 1 / (60 + rank)
                above = (score - scores[-1]) / unit if scores[0] > scores[-1] else 1
                sums[document] = sums.get(document, 0) + share * above
        summed = hybrid.weighted_sum(*lists, weight, 15, normalization)
        for fused, wanted in ((hybrid.reciprocal_rank_fusion(lists, 15), ranks), (summed, sums)):
            pairs = zip(fused.ids[0].tolist(), fused.scores[0].tolist(), strict=True)
            found_scores = {i: score for i, score in pairs if i >= 0}
            assert found_scores == pytest.approx(wanted, abs=1e-6)
            assert list(found_scores.values()) == sorted(found_scores.values(), reverse=True)
    equal = hybrid.reciprocal_rank_fusion([hits([(9, 2.0), (4, 1.0)]), hits([(4, 8.0), (9, 7.0)])], 2)
    assert equal.ids.tolist() == [[4, 9]]  # by position


def test_the_chosen_weight_is_the_usual_one_among_those_that_are_as_good_as_the_best() -> None:
    right, wrong = hits([(1, 3.0), (2, 2.0), (0, 1.0)]), hits([(2, 3.0), (0, 2.0), (1, 1.0)])
    assert hybrid.choose_weight(right, wrong, [{1}]) == hybrid.USUAL
    assert hybrid.choose_weight(wrong, right, [{1}]) < 0.5
    assert hybrid.choose_weight(right, right, [{1}]) == hybrid.choose_weight(right, wrong, [{99}]) == hybrid.USUAL
    # Of two questions one gains by another share: a difference within its standard error.
    both = [Hits(*(np.concatenate([getattr(h, n) for h in pair]) for n in ("ids", "scores"))) for pair in
            ((right, wrong), (right, right))]  # fmt: skip
    assert hybrid.choose_weight(*both, [{1}, {1}]) == hybrid.USUAL


def test_hybrid_finds_what_both_find_fused(encoder_path: str, documents: list[Document]) -> None:
    dense, lexical = Retriever(load_encoder(encoder_path), documents).open(), LexicalRetriever(documents)
    questions = ["What does Arlen trade in?", "silk", "qqq"]
    fused = HybridRetriever(dense, lexical, "rrf").retrieve(questions, 4)
    wanted = hybrid.reciprocal_rank_fusion([dense.retrieve(questions, 100), lexical.retrieve(questions, 100)], 4)
    np.testing.assert_array_equal(fused.ids, wanted.ids)
    # No word in common: the dense list alone decides.
    np.testing.assert_array_equal(fused.ids[2], dense.retrieve(["qqq"], 4).ids[0])
    assert HybridRetriever(dense, lexical).retrieve(questions, 99).ids.shape == (3, 24)


def test_whatever_decides_what_is_found_makes_another_identity(documents: list[Document]) -> None:
    def made() -> list[PassageRetriever]:
        words = [LexicalRetriever(documents), LexicalRetriever(documents[1:]), LexicalRetriever(documents, k1=0.9),
                 LexicalRetriever(documents, b=0.4)]  # fmt: skip
        pair = words[0], words[2]
        return [*words, HybridRetriever(*pair), HybridRetriever(*pair[::-1]), HybridRetriever(*pair, "rrf"),
                HybridRetriever(*pair, weight=0.4), HybridRetriever(*pair, normalization="z")]  # fmt: skip

    first, again = ([retriever.identity() for retriever in made()] for _ in range(2))
    assert first == again
    assert len(set(first)) == 9


@pytest.fixture
def opened(encoder_path: str, documents: list[Document], tmp_path: Path) -> Open:
    def open_with(model: str | None = encoder_path, examples: tuple[Example, ...] = (), **flags: Any) -> Any:
        arguments = RetrieverArguments(index_path=str(tmp_path / "index"), **flags)
        return hybrid.open_retriever(arguments, model, documents, examples)

    return open_with


def test_each_flag_opens_its_retriever(opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert isinstance(opened("bm25", truncate_dim=8), LexicalRetriever)
    assert "--truncate_dim has no effect here" in caplog.text
    assert all(isinstance(opened(needless, retriever="bm25"), LexicalRetriever) for needless in ("no/such/path", None))
    assert not (tmp_path / "index").exists()
    assert isinstance(opened(), Retriever)
    assert opened(retriever="hybrid").weight == hybrid.USUAL
    assert "--fusion_weight 0.75: is the default" in caplog.text
    both = opened(retriever="hybrid", fusion_weight=0.25, fusion_normalization="z")
    assert isinstance(both, HybridRetriever)
    assert (both.fusion, both.weight, both.normalization) == ("weighted", 0.25, "z")
    assert (tmp_path / "index").exists()


def test_the_weight_is_chosen_on_file_or_given_examples(opened: Open, examples: list[Example], tmp_path: Path) -> None:
    write_examples(tmp_path / "eval.jsonl", examples)
    by_file = opened(retriever="hybrid", fusion_eval_path=str(tmp_path / "eval.jsonl"))
    by_argument = opened(retriever="hybrid", examples=tuple(examples))
    assert by_file.weight == by_argument.weight < 0.5  # the encoder is random, the words are not


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": "bm25", "retriever": "hybrid"}, "--retriever hybrid: needs an encoder besides BM25"),
        ({"model": None}, "--retriever dense: needs an encoder; give"),
    ],
)
def test_what_cannot_be_opened_says_why(flags: dict[str, Any], message: str, opened: Open, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        opened(**flags)
    assert not (tmp_path / "index").exists()
