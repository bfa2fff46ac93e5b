"""SwR's mix of gold and retrieved passages."""

from collections.abc import Sequence

import pytest

from rqa.data import Document, Example
from rqa.objectives.swr import SwRArguments, gold_and_retrieved, mix
from rqa.retrieval.hybrid import LexicalRetriever


def document(number: int, **metadata: object) -> Document:
    return Document(f"Passage {number}.", {"source": f"guide/{number}"} | metadata)


GOLD = (document(0), document(1))
EXAMPLE = Example("Why?", GOLD)
RETRIEVED = [document(5), document(1, rank=2), document(6), document(5, rank=4), document(7)]


def flags(position: str = "first", drop: float = 0.0) -> SwRArguments:
    return SwRArguments(embedding_model="bm25", gold_position=position, drop_gold_prob=drop)


def numbers(passages: Sequence[Document]) -> list[int]:
    return [int(passage.metadata["source"].partition("/")[2]) for passage in passages]


@pytest.mark.parametrize(
    ("gold", "limit", "expected"),
    [(GOLD, 0, []), (GOLD, 1, [0]), (GOLD, 2, [0, 1]), (GOLD, 3, [0, 1, 5]), (GOLD, 5, [0, 1, 5, 6, 7]),
     (GOLD, 9, [0, 1, 5, 6, 7]), ((*GOLD, GOLD[0]), 3, [0, 1, 5]), ((), 2, [5, 1])],
)  # fmt: skip
def test_gold_comes_first_then_the_best_retrieved_none_twice(
    gold: tuple[Document, ...], limit: int, expected: list[int]
) -> None:
    assert numbers(mix(Example("Why?", gold), RETRIEVED, limit, flags(), "1")) == expected


def test_passages_are_the_same_by_source_and_content_alone() -> None:
    same = Document("Passage 0.", {"source": "guide/0", "title": "other"}, "other text")
    namesake = Document("Passage 0.", {"source": "elsewhere/9"})
    passages = mix(Example("Why?", GOLD[:1]), [same, namesake], 9, flags(), "1")
    assert [passage.key for passage in passages] == [GOLD[0].key, namesake.key]
    assert passages[0] is GOLD[0]


@pytest.mark.parametrize("limit", [2, 4, 9])
def test_a_random_position_permutes_the_same_passages(limit: int) -> None:
    first = mix(EXAMPLE, RETRIEVED, limit, flags("first"), "1")
    orders = {tuple(numbers(mix(EXAMPLE, RETRIEVED, limit, flags("random"), str(seed)))) for seed in range(60)}
    assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(numbers(first)))}
    assert {order.index(0) for order in orders} == set(range(len(first)))


def test_a_ranked_position_is_that_of_the_retriever_and_anywhere_if_it_finds_none() -> None:
    """As in evaluation: what the retriever finds keeps its order, with the gold passages it misses in between."""
    orders = {tuple(numbers(mix(EXAMPLE, RETRIEVED, 9, flags("ranked"), str(seed)))) for seed in range(60)}
    assert {tuple(number for number in order if number) for order in orders} == {(5, 1, 6, 7)}  # 0 is not found
    assert {order.index(0) for order in orders} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("position", ["first", "random", "ranked"])
@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_gold_is_dropped_as_often_as_asked_and_then_wholly(probability: float, position: str) -> None:
    retrieved = list(RETRIEVED)
    shown = [set(numbers(mix(EXAMPLE, retrieved, 4, flags(position, probability), f"7-{n}"))) for n in range(2000)]
    assert all(passages in ({0, 1, 5, 6}, {5, 6, 7}) for passages in shown)
    dropped, deviation = shown.count({5, 6, 7}), (2000 * probability * (1 - probability)) ** 0.5
    assert abs(dropped - 2000 * probability) <= 5 * deviation
    assert retrieved == RETRIEVED
    assert numbers(mix(Example("Why?"), RETRIEVED, 2, flags(position, 1.0), "1")) == [5, 1]  # there is no gold


@pytest.mark.parametrize("position", ["first", "random", "ranked"])
def test_seed_and_number_decide_an_examples_mix(
    position: str, examples: list[Example], documents: list[Document]
) -> None:
    """Each prompt holds at most k + 1 passages: an example's gold, and what the retriever ranks best."""
    retriever = LexicalRetriever(documents)
    first, again, other, fewer = (
        gold_and_retrieved(asked, retriever, 4, flags(position, 0.5), seed)
        for asked, seed in ((examples, 1), (examples, 1), (examples, 2), (examples[:9], 1))
    )
    assert first == again != other
    assert first[:9] == fewer
    none = gold_and_retrieved(examples, retriever, 0, flags(position, 0.5), 1)
    assert [p for row in none for p in row] == [e.gold_docs[0] for e, row in zip(examples, none, strict=True) if row]
    kept = [example.gold_docs[0] in passages for example, passages in zip(examples, first, strict=True)]
    assert 0 < sum(kept) < len(kept)  # one seed decides otherwise for each
    for example, passages in zip(examples, first, strict=True):
        (best,) = retriever.documents_of(retriever.retrieve([example.question], 4))
        expected = set(numbers([*example.gold_docs, *best]))
        assert set(numbers(passages)) in (expected, expected - set(numbers(example.gold_docs)))
        assert len(passages) <= 5
