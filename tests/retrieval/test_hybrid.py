"""Fusion against values worked out by hand and plain loops over dictionaries."""

import logging
import random
from collections.abc import Callable
from pathlib import Path

import torch
import numpy as np
import pytest

from rqa.data import Document, Example, write_examples
from rqa.models.encoder import EncoderArguments, load_encoder
from rqa.retrieval.hybrid import (
    HybridRetriever,
    LexicalRetriever,
    RetrieverArguments,
    choose_weight,
    open_retriever,
    reciprocal_rank_fusion,
    weighted_sum,
)
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.retriever import Hits, Retriever
from rqa.runtime.errors import UserError

CPU = torch.device("cpu")


def hits(*rows: list[tuple[int, float]]) -> Hits:
    return Hits(np.array([[i for i, _ in row] for row in rows]), np.array([[s for _, s in row] for row in rows]))


DENSE = hits([(7, 0.9), (3, 0.5), (5, 0.1)])
LEXICAL = hits([(3, 12.0), (8, 4.0), (-1, -np.inf)])


def test_reciprocal_rank_fusion_is_the_value_worked_out_by_hand() -> None:
    fused = reciprocal_rank_fusion([DENSE, LEXICAL], 5)
    assert fused.ids.tolist() == [[3, 7, 8, 5, -1]]
    np.testing.assert_allclose(fused.scores[0, :4], [1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 63], rtol=1e-6)


def test_equal_sums_are_ranked_by_position() -> None:
    fused = reciprocal_rank_fusion([hits([(9, 2.0), (4, 1.0)]), hits([(4, 8.0), (9, 7.0)])], 2)
    assert fused.ids.tolist() == [[4, 9]]


@pytest.mark.parametrize(
    ("weight", "normalization", "expected"),
    [  # dense, min-max: 1, 0.5, 0; lexical: 1, 0
        (1.0, "min_max", {7: 1.0, 3: 0.5, 5: 0.0, 8: 0.0}),
        (0.0, "min_max", {3: 1.0, 5: 0.0, 7: 0.0, 8: 0.0}),
        (0.6, "min_max", {3: 0.7, 7: 0.6, 5: 0.0, 8: 0.0}),
        # in standard deviations above the last: sqrt(8 / 75) of dense, 4 of lexical
        (0.5, "z", {3: 0.5 * 0.4 / (8 / 75) ** 0.5 + 1.0, 7: 0.5 * 0.8 / (8 / 75) ** 0.5, 5: 0.0, 8: 0.0}),
    ],
)
def test_a_weighted_sum_is_the_value_worked_out_by_hand(
    weight: float, normalization: str, expected: dict[int, float]
) -> None:
    fused = weighted_sum(DENSE, LEXICAL, weight, 4, normalization)
    found = dict(zip(fused.ids[0].tolist(), fused.scores[0].tolist(), strict=True))
    assert found == pytest.approx(expected, abs=1e-6)
    assert list(found) == sorted(expected, key=lambda i: (-expected[i], i))


@pytest.mark.parametrize("normalization", ["min_max", "z"])
def test_one_single_hit_is_better_than_none(normalization: str) -> None:
    nothing, one = hits([(-1, -np.inf), (-1, -np.inf)]), hits([(6, 3.0), (-1, -np.inf)])
    assert weighted_sum(nothing, one, 0.5, 2, normalization).ids.tolist() == [[6, -1]]
    assert weighted_sum(hits([(2, 1.0), (4, 0.5)]), one, 0.3, 3, normalization).ids[0, 0] == 6
    assert weighted_sum(nothing, nothing, 0.5, 2, normalization).ids.tolist() == [[-1, -1]]


@pytest.mark.parametrize("seed", range(10))
def test_fusion_is_that_of_plain_loops(seed: int) -> None:
    chance = random.Random(seed)

    def ranked() -> list[tuple[int, float]]:
        found = chance.sample(range(15), 8)
        return sorted(((i, chance.choice([0.1, 0.4, 0.7, 2.0])) for i in found), key=lambda pair: -pair[1])

    first, second = ranked(), ranked()
    ranks: dict[int, float] = {}
    sums: dict[int, float] = {}
    for weight, row in ((0.3, first), (0.7, second)):
        low, high = row[-1][1], row[0][1]
        for rank, (document, score) in enumerate(row, start=1):
            ranks[document] = ranks.get(document, 0) + 1 / (60 + rank)
            sums[document] = sums.get(document, 0) + weight * ((score - low) / (high - low) if high > low else 1)
    for fused, wanted in (
        (reciprocal_rank_fusion([hits(first), hits(second)], 15), ranks),
        (weighted_sum(hits(first), hits(second), 0.3, 15), sums),
    ):
        found = [(i, s) for i, s in zip(fused.ids[0].tolist(), fused.scores[0].tolist(), strict=True) if i >= 0]
        assert dict(found) == pytest.approx(wanted, abs=1e-6)
        assert [s for _, s in found] == sorted((s for _, s in found), reverse=True)


def test_the_chosen_weight_is_the_best_of_all() -> None:
    right, wrong = hits([(1, 3.0), (2, 2.0), (0, 1.0)]), hits([(2, 3.0), (0, 2.0), (1, 1.0)])
    assert choose_weight(right, wrong, [{1}]) > 0.5
    assert choose_weight(wrong, right, [{1}]) < 0.5
    assert choose_weight(right, right, [{1}]) == 0.5
    assert choose_weight(right, wrong, [{99}]) == 0.5


def test_hybrid_finds_what_both_find_fused(encoder_path: str, documents: list[Document]) -> None:
    dense = Retriever(load_encoder(encoder_path), documents, IndexArguments())
    dense.open(None)
    lexical = LexicalRetriever(documents)
    questions = ["What does Arlen trade in?", "silk", "qqq"]
    fused = HybridRetriever(dense, lexical).retrieve(questions, 4)
    wanted = reciprocal_rank_fusion([dense.retrieve(questions, 100), lexical.retrieve(questions, 100)], 4)
    np.testing.assert_array_equal(fused.ids, wanted.ids)
    # No word in common: the dense list alone decides.
    np.testing.assert_array_equal(fused.ids[2], dense.retrieve(["qqq"], 4).ids[0])
    assert HybridRetriever(dense, lexical).retrieve(questions, 99).ids.shape == (3, 24)
    kinds = [HybridRetriever(dense, lexical), HybridRetriever(dense, lexical, "weighted"), dense, lexical]
    assert len({retriever.identity() for retriever in kinds}) == 4


# ---------------------------------------------------------------- opening


@pytest.fixture
def opened(encoder_path: str, documents: list[Document], tmp_path: Path) -> Callable[..., object]:
    def open_with(model: str = encoder_path, examples: tuple[Example, ...] = (), **flags: object) -> object:
        arguments = RetrieverArguments(**flags)
        return open_retriever(
            arguments, model, documents, EncoderArguments(), IndexArguments(), tmp_path / "index", CPU, examples
        )

    return open_with


def test_each_flag_opens_its_retriever(opened: Callable[..., object], tmp_path: Path) -> None:
    assert isinstance(opened("bm25"), LexicalRetriever)
    assert isinstance(opened("a/path/that/does/not/exist", retriever="bm25"), LexicalRetriever)
    assert not (tmp_path / "index").exists()
    assert isinstance(opened(), Retriever)
    hybrid = opened(retriever="hybrid", fusion="weighted", fusion_weight=0.25, fusion_normalization="z")
    assert isinstance(hybrid, HybridRetriever)
    assert (hybrid.fusion, hybrid.weight, hybrid.normalization) == ("weighted", 0.25, "z")
    assert (tmp_path / "index").exists()


def test_the_weight_is_chosen_on_the_file_or_the_given_examples(
    opened: Callable[..., HybridRetriever], examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("rqa"), "propagate", True)
    write_examples(tmp_path / "eval.jsonl", examples)
    by_file = opened(retriever="hybrid", fusion="weighted", fusion_eval_path=str(tmp_path / "eval.jsonl"))
    by_argument = opened(retriever="hybrid", fusion="weighted", examples=tuple(examples))
    assert by_file.weight == by_argument.weight < 0.5  # the encoder is random, the words are not


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": "bm25", "retriever": "hybrid"}, "--retriever hybrid"),
        ({"retriever": "hybrid", "fusion": "weighted"}, "--fusion weighted: give --fusion_weight"),
        ({"retriever": "hybrid", "fusion": "weighted", "examples": (Example("Why?"),)}, "--fusion weighted"),
        ({"fusion_weight": 1.5}, "--fusion_weight 1.5"),
    ],
)
def test_what_cannot_be_opened_says_why(
    flags: dict[str, object], message: str, opened: Callable[..., object], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        opened(**flags)
    assert not (tmp_path / "index").exists()
