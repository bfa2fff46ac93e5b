"""SwR's mix of gold and retrieved passages."""

import pytest

from rqa.data import Document, Example
from rqa.objectives.swr import PassageArguments, gold_and_retrieved


def document(number: int, **metadata: object) -> Document:
    return Document(f"Passage {number}.", {"source": f"guide/{number}"} | metadata)


GOLD = (document(0), document(1))
EXAMPLE = Example("Why?", GOLD)
RETRIEVED = [document(5), document(1, rank=2), document(6), document(5, rank=4), document(7)]


def numbers(passages: list[Document]) -> list[int]:
    return [int(passage.metadata["source"].partition("/")[2]) for passage in passages]


@pytest.mark.parametrize(
    ("limit", "expected"), [(0, []), (1, [0]), (2, [0, 1]), (3, [0, 1, 5]), (5, [0, 1, 5, 6, 7]), (9, [0, 1, 5, 6, 7])]
)
def test_gold_comes_first_then_the_best_retrieved_none_twice(limit: int, expected: list[int]) -> None:
    assert numbers(gold_and_retrieved(EXAMPLE, RETRIEVED, limit, PassageArguments(), "1")) == expected


def test_passages_are_the_same_by_source_and_content_alone() -> None:
    same = Document("Passage 0.", {"source": "guide/0", "title": "other"}, "other text")
    namesake = Document("Passage 0.", {"source": "elsewhere/9"})
    passages = gold_and_retrieved(Example("Why?", GOLD[:1]), [same, namesake], 9, PassageArguments(), "1")
    assert [passage.key for passage in passages] == [GOLD[0].key, namesake.key]
    assert passages[0] is GOLD[0]


def test_repeated_gold_stands_once() -> None:
    passages = gold_and_retrieved(Example("Why?", (*GOLD, GOLD[0])), RETRIEVED, 3, PassageArguments(), "1")
    assert numbers(passages) == [0, 1, 5]


@pytest.mark.parametrize("limit", [2, 4, 9])
def test_a_random_position_permutes_the_same_passages(limit: int) -> None:
    first = gold_and_retrieved(EXAMPLE, RETRIEVED, limit, PassageArguments("first"), "1")
    orders = set()
    for seed in range(60):
        mixed = gold_and_retrieved(EXAMPLE, RETRIEVED, limit, PassageArguments("random"), str(seed))
        assert sorted(numbers(mixed)) == sorted(numbers(first))
        orders.add(tuple(numbers(mixed)))
    assert len(orders) > 1
    assert {order.index(0) for order in orders} == set(range(len(first)))


@pytest.mark.parametrize("arguments", [PassageArguments("random", 0.5), PassageArguments("first", 0.5)])
def test_the_seed_decides(arguments: PassageArguments) -> None:
    runs = [
        [numbers(gold_and_retrieved(EXAMPLE, RETRIEVED, 5, arguments, f"42-{i}")) for i in range(30)] for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert len({tuple(run) for run in runs[0]}) > 1


@pytest.mark.parametrize("position", ["first", "random"])
@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_gold_is_dropped_as_often_as_asked_and_then_wholly(probability: float, position: str) -> None:
    arguments = PassageArguments(position, probability)
    dropped = 0
    for seed in range(2000):
        shown = set(numbers(gold_and_retrieved(EXAMPLE, RETRIEVED, 4, arguments, f"7-{seed}")))
        assert shown in ({0, 1, 5, 6}, {5, 6, 7})
        dropped += not shown & {0, 1}
    deviations = (2000 * probability * (1 - probability)) ** 0.5
    assert abs(dropped - 2000 * probability) <= 5 * deviations


def test_without_gold_the_retrieved_serve_alone() -> None:
    for probability in (0.0, 1.0):
        passages = gold_and_retrieved(Example("Why?"), RETRIEVED, 2, PassageArguments("first", probability), "1")
        assert numbers(passages) == [5, 1]


def test_what_is_given_is_left_as_it_is() -> None:
    retrieved = list(RETRIEVED)
    gold_and_retrieved(EXAMPLE, retrieved, 3, PassageArguments("random", 0.5), "1")
    assert retrieved == RETRIEVED
    assert EXAMPLE.gold_docs == GOLD
