"""Docstrings are cut as written by hand here; the corpus of a module written here, and of real ones."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydocs.corpus import SPLITS, Corpus, build_corpus, count_tokens, write_corpus
from pydocs.docstrings import PROSE, Block, parse, plain, sentences
from pydocs.questions import LONGEST_ANSWER

from rqa.data import Example, read_examples
from rqa.documents import read_documents
from rqa.runtime.errors import UserError

SUMMARY = "Compute the median of the given observations, whatever their order is."
REAL = ("json", "textwrap", "statistics", "numpy.linalg", "numpy.fft")

ASCEND = '''
def ascend(values, key, again):
    """Put the numbers of a list in order without changing the list itself.

    Args:
        values (list of float): The numbers that are to be ordered. None of them may be missing.
        key (callable): See `middle`.
        again (int): A number.

    Raises:
        TypeError: If two of the numbers cannot be compared.

    See Also
    --------
    middle : Find what has as many above it as below.
    Scale.widen : Equivalent method.
    """
'''
REST = '''
sort_upwards = ascend

def middle(data):
    """Compute the median of the given observations, whatever their order is.

    Args:
        data (list): the observations, at least one of them

    Returns:
        float: the value that divides the observations into halves

    Example::

        >>> middle([3, 1, 2])
        2
    """

def _hidden():
    """This docstring is long enough for a passage, but nobody outside should ever see it here."""

class _Instrument:
    def tare(self):
        """Reset whatever it is that an instrument of this kind measures, and forget what was measured before."""

class Scale(_Instrument):
    """A scale on which weights are compared, with a beam, two pans and a pointer between them."""

    def widen(self, step):
        """Make the marks of the dial stand further apart. Raises ValueError if no marks are left on it."""

    def tare(self):
        """Call the present weight nothing, so that all that is put on later counts alone from now on."""

class Balance(Scale):
    """An older name under which a scale was sold in shops that dealt in weights of brass only."""
'''


TINY = ASCEND + ASCEND.replace("ascend", "ascending").replace("itself.", "itself!") + REST


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    (tmp_path / "tinydocs.py").write_text(TINY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tinydocs", raising=False)
    return build_corpus(["tinydocs"])


@pytest.fixture(scope="module")
def real() -> Corpus:
    return build_corpus(REAL)


def examples_of(corpus: Corpus) -> list[Example]:
    return [example for split in SPLITS for example in getattr(corpus, split)]


def test_public_objects_become_one_document_each_under_their_shortest_names(tiny: Corpus) -> None:
    titles = [document.metadata["title"].removeprefix("tinydocs.") for document in tiny.documents]
    expected = ["Balance", "Scale", "Scale.tare", "Scale.widen", "ascend", "middle"]
    assert sorted(titles) == expected  # no alias, no near-duplicate, nothing inherited, nothing hidden


def test_questions_of_a_module_are_those_made_by_hand(tiny: Corpus) -> None:
    answers = {(example.gold_docs[0].metadata["title"], example.gold_answer) for example in examples_of(tiny)}
    assert answers == {
        ("tinydocs.ascend", "The numbers that are to be ordered. None of them may be missing."),
        ("tinydocs.ascend", "If two of the numbers cannot be compared."),
        ("tinydocs.middle", "the observations, at least one of them"),
        ("tinydocs.middle", "the value that divides the observations into halves"),
        ("tinydocs.middle", f"`tinydocs.middle`: {SUMMARY}"),
        ("tinydocs.Scale.widen", "Raises ValueError if no marks are left on it."),
    }


def test_what_others_say_of_a_function_is_a_question_and_in_no_passage(tiny: Corpus) -> None:
    said = "find what has as many above it as below"
    asked = [example for example in examples_of(tiny) if example.question == f"What should I use for this: {said}?"]
    assert [example.gold_docs[0].metadata["title"] for example in asked] == ["tinydocs.middle"]
    assert not any(said in document.fmt_content.lower() for document in tiny.documents)


def test_each_form_of_a_question_is_used(tiny: Corpus) -> None:
    builds = [build_corpus(["tinydocs"], seed=seed) for seed in range(12)]
    questions = {example.question for corpus in builds for example in examples_of(corpus)}
    task = "put the numbers of a list in order without changing the list itself"
    assert {question for question in questions if "`values`" in question} == {
        "What does the parameter `values` of `tinydocs.ascend` do?",
        "What is the parameter `values` of `ascend`?",
        f"What is the parameter `values` when I want this: {task}?",
    }


def test_a_passage_holds_the_parts_of_a_docstring_under_their_headings(tiny: Corpus) -> None:
    (passage,) = (document for document in tiny.documents if document.metadata["title"] == "tinydocs.middle")
    assert passage.fmt_content == (
        "Title: tinydocs.middle\nContent:\n"
        f"{SUMMARY}\n"
        "Parameters\ndata (list): the observations, at least one of them\n"
        "Returns\nfloat: the value that divides the observations into halves"
    )


def test_no_docstring_is_asked_about_in_two_splits_and_nothing_twice(real: Corpus) -> None:
    titles = [{example.gold_docs[0].metadata["title"] for example in getattr(real, split)} for split in SPLITS]
    assert all(titles)
    assert sum(map(len, titles)) == len(set.union(*titles))
    assert len({document.key for document in real.documents}) == len(real.documents)
    examples = examples_of(real)
    assert len({example.question for example in examples}) == len(examples)
    entries = [each.gold_answer for each in examples if not each.question.startswith("What should I use")]
    assert len(set(entries)) == len(entries)


def test_gold_passages_hold_short_whole_answers_and_are_in_the_corpus_however_long_passages_are(real: Corpus) -> None:
    headings, sizes = 20, []
    for chunk_tokens in (16, 64, 128):
        corpus = real if chunk_tokens == 128 else build_corpus(REAL, chunk_tokens)
        sizes.append(len(corpus.documents))
        assert max(count_tokens(document.page_content) for document in corpus.documents) <= chunk_tokens + headings
        examples = examples_of(corpus)
        assert len(examples) > 30
        assert {passage for example in examples for passage in example.gold_docs} <= set(corpus.documents)
        for example in examples:
            quoted = example.gold_answer.partition("`: ")[2] or example.gold_answer  # behind the described one's name
            assert 3 <= len(quoted.split()) <= LONGEST_ANSWER
            for passage in example.gold_docs:
                assert re.search(re.escape(quoted) + r"(?=\s|$)", passage.page_content)
    assert sizes[0] > 1.5 * sizes[1] > 1.5 * 1.5 * sizes[2]


def test_builds_are_equal_whatever_this_process_and_its_hashes_did_and_what_is_written_is_read_back(
    real: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "import sys; from pydocs.corpus import *; write_corpus(build_corpus(sys.argv[2:]), sys.argv[1])"
    write_corpus(real, tmp_path / "here")
    assert list(read_documents(tmp_path / "here/documents.jsonl")) == list(real.documents)
    for split in SPLITS:
        assert read_examples(tmp_path / f"here/{split}_w_qa.jsonl", answers=True) == getattr(real, split)
    monkeypatch.setattr("statistics.mean.__doc__", "Return what scipy might have written, in twelve words or more.")
    write_corpus(build_corpus(REAL), tmp_path / "changed")
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "other"), *REAL], env=environment, check=True)
    for build in ("changed", "other"):
        for file in (tmp_path / "here").glob("*.jsonl"):
            assert (tmp_path / build / file.name).read_bytes() == file.read_bytes()
    assert build_corpus(REAL, seed=1).train != real.train


def test_a_module_that_is_not_installed_or_documents_nothing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "emptydocs.py").write_text('"""Not twelve words."""')
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("no_such_module", "emptydocs"):
        with pytest.raises(UserError, match=module):
            build_corpus([module])


def test_tokens_are_counted_like_word_pieces() -> None:
    assert count_tokens("sort the_axis, 1234!") == 8  # sort the _ axis , 123 4 !


FORMS = {
    "order(values) -> list\n\nPut in order.\n\nEqual values keep their places, see [1]_.": [
        Block(PROSE, "", "", "Put in order."), Block(PROSE, "", "", "Equal values keep their places, see .")],
    "f(x) -> int\n\nCounts.": [Block(PROSE, "", "", "f(x) -> int"), Block(PROSE, "", "", "Counts.")],
    ".. note::\n    They keep their places.\n\n```python\norder([2, 1])\n```": [
        Block(PROSE, "", "", "They keep their places.")],
    # numpy's sections
    "Parameters\n----------\nvalues : list of float, optional\n    What is put in order.\n    ``None`` is *empty*.\n\n"
    "    .. versionadded:: 2.0\n        In the second release.\na, b : int\n    Two ends.": [
        Block("parameters", "values", "list of float, optional", "What is put in order. `None` is empty."),
        Block("parameters", "a, b", "int", "Two ends.")],
    "Returns\n-------\nordered : list\n    The same, the :func:`~rqa.smallest` first.": [
        Block("returns", "ordered", "list", "The same, the `rqa.smallest` first.")],
    "Returns\n-------\nlist of int\n    The places.": [Block("returns", "", "list of int", "The places.")],
    "Raises\n------\nTypeError\n    If two values\n    cannot be compared.": [
        Block("raises", "TypeError", "", "If two values cannot be compared.")],
    "See Also\n--------\nmiddle : The value in the\n    middle.\nfirst, last\n\nExamples\n--------\n>>> order([2])": [
        Block("see also", "middle", "", "The value in the middle."), Block("see also", "first, last", "", "")],
    # Google's sections, which end where the indentation does
    "Args:\n    values (`list[float]`, *optional*, defaults to `f(1)`):\n        What is put in order.\n"
    "    key: says what is compared:\n        first this, then that.\n    *rest (int): ends": [
        Block("parameters", "values", "`list[float]`, optional, defaults to `f(1)`", "What is put in order."),
        Block("parameters", "key", "", "says what is compared: first this, then that."),
        Block("parameters", "*rest", "int", "ends")],
    "Returns:\n    `list`: the same.\n\nExample::\n\n    >>> order([2, 1])\n\nSlow for many values.": [
        Block("returns", "", "`list`", "the same."), Block(PROSE, "", "", "Slow for many values.")],
}  # fmt: skip


@pytest.mark.parametrize("docstring", FORMS)
def test_a_docstring_is_cut_into_paragraphs_and_entries(docstring: str) -> None:
    assert parse(f"\n{docstring}", {"order"}) == FORMS[docstring]


def test_sections_end_where_the_next_one_begins() -> None:
    sections = [docstring for docstring in FORMS if "(values) ->" not in docstring]
    assert parse("\n" + "\n\n".join(sections)) == [block for docstring in sections for block in FORMS[docstring]]


def test_an_entry_reads_as_name_type_and_description() -> None:
    texts = [Block("returns", *parts).text for parts in (("key", "str", "It."), ("key", "", "It."), ("key", "str", ""))]
    assert texts == ["key (str): It.", "key: It.", "key (str)"]
    assert Block("returns", "", "list of int", "The places.").text == "list of int: The places."


def test_markup_is_reduced_to_what_it_shows_and_sentences_do_not_end_in_abbreviations() -> None:
    marked = "A :class:`~torch.nn.Linear` of ``x``, *never* **y**, [`Trainer`], `docs <a.html>`_, a * b * c"
    assert plain(marked) == "A `torch.nn.Linear` of `x`, never y, `Trainer`, docs, a * b * c"
    text = "Of a kind, e.g. Gaussian. The default is 1.5. `None` is none! Done"
    assert sentences(text) == ["Of a kind, e.g. Gaussian.", "The default is 1.5.", "`None` is none!", "Done"]
