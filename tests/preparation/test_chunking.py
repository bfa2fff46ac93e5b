"""Chunking, against langchain's splitter with the same tokenizer, and by the properties of passages."""

import time
from itertools import pairwise
from typing import Any

import pytest
import regex
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from langchain_text_splitters import RecursiveCharacterTextSplitter
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase

from rqa.data import Document
from rqa.preparation import chunking
from rqa.preparation.chunking import ChunkArguments, Chunker
from rqa.preparation.sources import Source
from rqa.runtime.errors import UserError

WORDS = ["copper", "a", "harbour's", "1,100", "ships", "Arlen", "sold-on", "spring"]
LINES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)
PARAGRAPHS = st.lists(LINES, min_size=1, max_size=4).map("\n".join)
TEXTS = st.lists(PARAGRAPHS, min_size=1, max_size=5).map("\n\n".join)


def word_tokenizer() -> Tokenizer:
    """A token a word, and one in front and one behind where special tokens are asked for."""
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("[CLS]", 1), ("[SEP]", 2)]
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    return core


def documents_of(text: str, tokenizer: Tokenizer | None = None, **flags: object) -> list[Document]:
    chunker = Chunker(tokenizer or word_tokenizer(), ChunkArguments(**flags))
    ((_, documents),) = chunker.passages([Source("s", "t", text, "file:1")])
    return documents


def cut(*text: Any, **flags: object) -> list[str]:
    return [document.page_content for document in documents_of(*text, **flags)]


@pytest.mark.parametrize("special", [False, True])
@settings(max_examples=150)
@given(text=TEXTS, size=st.integers(10, 60), overlap=st.integers(0, 9))
def test_the_passages_are_langchains_where_the_places_are(special: bool, text: str, size: int, overlap: int) -> None:
    tokenizer = word_tokenizer()
    if special:  # langchain charges the blank line between paragraphs as a piece of its own
        text = text.replace("\n\n", "\n")
    # langchain splits again what fits exactly, and joining it again then charges it more.
    assume(size not in {len(piece.split()) + 2 * special for end in ("\n", "\n\n") for piece in text.split(end)})
    theirs = RecursiveCharacterTextSplitter(
        chunk_size=size, chunk_overlap=overlap, separators=["\n\n", "\n", " "],
        length_function=lambda piece: len(tokenizer.encode(piece, add_special_tokens=special).ids),
    )  # fmt: skip
    flags = {"split_at": ["paragraph", "line", "word"], "count_special_tokens": special}
    assert cut(text, chunk_size=size, chunk_overlap=overlap, **flags) == theirs.split_text(text)


@settings(max_examples=150)
@given(text=st.text(alphabet=st.sampled_from("ab. \n#!?`é世。😀\t"), max_size=200), size=st.integers(1, 12))
def test_nothing_is_lost_nothing_added_and_no_passage_is_too_long(text: str, size: int) -> None:
    passages = cut(text, chunk_size=size, chunk_overlap=0)
    assert "".join("".join(passages).split()) == "".join(text.split())
    assert all(len(passage.split()) <= size for passage in passages)


def test_no_passage_of_word_pieces_is_too_long_and_the_callers_tokenizer_is_left_as_it_was(
    wordpiece: PreTrainedTokenizerBase,
) -> None:
    text = "The harbour of Arlen is known. It sells copper each spring! " * 40 + "x" * 500
    counts, core = wordpiece.backend_tokenizer, Tokenizer.from_str(wordpiece.backend_tokenizer.to_str())
    core.enable_truncation(4)
    for size in (1, 7, 50):
        passages = cut(text, core, chunk_size=size, chunk_overlap=0)
        assert max(len(counts.encode(passage, add_special_tokens=False).ids) for passage in passages) <= size
        assert "".join("".join(passages).split()) == "".join(text.split())
    assert core.truncation["max_length"] == 4


@pytest.mark.parametrize(
    ("text", "overlap"),
    [("ท่าเรือแห่งนี้มีชื่อเสียง" * 50, 0), ("👩‍👩‍👧‍👦🏳️‍🌈é" * 50, 3), ("iVBORw0KGgo" * 50, 0), ("a" + "\u200b" * 500 + "b", 0)],
)
def test_what_the_tokenizer_does_not_spell_counts_by_the_character_and_no_character_is_cut(
    text: str, overlap: int, wordpiece: PreTrainedTokenizerBase
) -> None:
    for tokenizer in (word_tokenizer(), wordpiece.backend_tokenizer):
        passages = cut(text, tokenizer, chunk_size=30, chunk_overlap=overlap)
        assert max(map(len, passages)) <= 30
        whole = set(regex.findall(r"\X", text))
        assert all(set(regex.findall(r"\X", passage)) <= whole for passage in passages if "\u200b" not in text)


def test_hostile_lines_take_no_quadratic_time() -> None:
    spaces, signs = "# a" + (" " * 100_000 + "#" * 100_000) * 5 + "x", "# " + "#" * 100_000 + "x"
    for text in (spaces, signs, "# a" + " #" * 50_000 + " x", "🇩" * 100_000, "a" + "\u0301" * 100_000):
        start = time.monotonic()
        documents = documents_of(text, chunk_size=60, chunk_overlap=0)
        assert time.monotonic() - start < 20
        assert max(len(str(document.metadata)) for document in documents) < 400  # a heading stands in each passage


@settings(max_examples=100)
@given(ends=st.lists(st.sampled_from([" ", ". ", "\n", "\n\n"]), max_size=60), size=st.integers(2, 12), data=st.data())
def test_neighbours_share_no_more_than_the_overlap(ends: list[str], size: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, size - 1))
    text = "".join(f"{number}{end}" for number, end in enumerate(ends))
    words = [passage.replace(".", "").split() for passage in cut(text, chunk_size=size, chunk_overlap=overlap)]
    assert list(dict.fromkeys(word for passage in words for word in passage)) == [str(n) for n in range(len(ends))]
    assert all(len(set(one) & set(other)) <= overlap for one, other in pairwise(words))
    assert all(len(passage) <= size for passage in words)


def test_a_text_is_cut_where_it_keeps_most_together_and_whole_sentences_overlap() -> None:
    sentences = "One two. Three four five. Six seven."
    for text, size, overlap, expected in [
        ("# A\none two\n\n# B\nthree four", 4, 0, ["# A\none two", "# B\nthree four"]),
        ("one two\n\nthree\nfour", 3, 0, ["one two", "three\nfour"]),
        ("one two\nthree four", 3, 0, ["one two", "three four"]),
        ("One two. Three four! Five six?", 4, 0, ["One two. Three four!", "Five six?"]),
        ('He said "one." Then two.', 3, 0, ['He said "one."', "Then two."]),
        ("one two three", 2, 0, ["one two", "three"]),
        ("one two three", 3, 0, ["one two three"]),
        (" \n\n ", 3, 0, []),
        (sentences, 5, 2, ["One two. Three four five.", "Six seven."]),
        (sentences, 5, 3, ["One two. Three four five.", "Three four five. Six seven."]),
    ]:
        assert cut(text, chunk_size=size, chunk_overlap=overlap) == expected


def test_a_passage_knows_its_source_its_title_and_the_heading_above_it() -> None:
    text = "intro words\n# C# #\none two three\n```\n# a comment\n```\n## Second\nfour five"
    documents = documents_of(text, chunk_size=6, chunk_overlap=0)
    assert [document.metadata.get("subtitle") for document in documents] == [None, "C#", "C#", "Second"]
    assert {(d.metadata["source"], d.metadata["title"]) for d in documents} == {("s", "t")}


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch, documents: list[Document]) -> None:
    sources = [Source(str(n), "", d.page_content, "") for n, d in enumerate(documents)]
    chunker = Chunker(word_tokenizer(), ChunkArguments(chunk_size=5, chunk_overlap=1))
    expected = list(chunker.passages(sources))
    monkeypatch.setattr(chunking, "BATCH_CHARACTERS", 100)
    assert list(chunker.passages(iter(sources))) == expected


def test_special_tokens_that_fill_a_passage_alone_are_refused() -> None:
    with pytest.raises(UserError, match="--chunk_size 2: the tokenizer's special tokens fill it"):
        cut("text", chunk_size=2, chunk_overlap=0, count_special_tokens=True)
