"""Docstrings are cut where a reader would cut them; every expectation is written by hand."""

import pytest
from pydocs.docstrings import PROSE, Block, parse, plain, sentences

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
