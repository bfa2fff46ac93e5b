"""Which passages of a ranking are hard negatives, against a naive choice."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rqa.data import Document, Example
from rqa.objectives.ctl import NegativeArguments, NegativeChooser


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(st.sampled_from("abcdefg"), max_size=12),
    gold=st.sets(st.sampled_from("ABcx"), min_size=1),
    first=st.integers(1, 4),
    width=st.integers(0, 8),
    share=st.none() | st.floats(0.1, 1),
    data=st.data(),
)
def test_the_ranks_are_those_of_a_naive_choice(
    texts: list[str], gold: set[str], first: int, width: int, share: float | None, data: st.DataObject
) -> None:
    size = len(texts)
    scores = sorted(data.draw(st.lists(st.floats(-9, 9), min_size=size, max_size=size)), reverse=True)
    golden = [score for text, score in zip(texts, scores, strict=True) if text.upper() in {g.upper() for g in gold}]
    others = [i for i in range(size) if texts[i].upper() not in {g.upper() for g in gold}]
    distinct = [i for i in others if texts.index(texts[i]) == i]
    expected = []
    for rank, i in enumerate(distinct, start=1):
        low_enough = share is None or (bool(golden) and scores[i] <= golden[0] - (1 - share) * abs(golden[0]))
        if first <= rank <= first + width and low_enough:
            expected.append(i)
    documents = [Document(text, {"source": str(number)}) for number, text in enumerate(texts)]
    example = Example("?", tuple(Document(text, {"source": "gold"}) for text in gold))
    flags = NegativeArguments(negatives_from_rank=first, negatives_to_rank=first + width, negatives_max_share=share)
    chooser = NegativeChooser([example], documents, flags)
    assert chooser(0, [*range(size), -1], [*scores, -np.inf]) == expected
    assert chooser.counts["passages left out as gold"] == len(golden)
    assert chooser.depth == first + width + len({text.upper() for text in gold})
