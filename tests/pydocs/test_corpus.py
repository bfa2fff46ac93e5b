"""The corpus of docstrings: of a module written here, whose questions are known, and of real ones."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydocs.corpus import SPLITS, Corpus, build_corpus, count_tokens, write_corpus
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
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", script, str(tmp_path / seed), *REAL], env=environment, check=True)
    for build in ("changed", "1", "2"):
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
