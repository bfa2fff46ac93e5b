"""Docstrings are cut where a reader would cut them; every expectation is written by hand."""

from pydocs.docstrings import PROSE, Block, parse, plain, sentences

NUMPY = """
    order(values, key=None)

    Put values in order.

    Equal values keep their places, see [1]_.

    Parameters
    ----------
    values : list of float, optional
        What is put in order.
        ``None`` is *empty*.

        .. versionadded:: 2.0
            In the second release.
    a, b : int
        Two ends.

    Returns
    -------
    ordered : list
        The same values, the :func:`~rqa.smallest` first.

    Raises
    ------
    TypeError
        If two values
        cannot be compared.

    See Also
    --------
    middle : The value in the
        middle.
    first, last

    Examples
    --------
    >>> order([2, 1])
    [1, 2]
    """

GOOGLE = """Put values in order.

    .. note::
        Equal values keep their places.

    Args:
        values (`list[float]`, *optional*, defaults to `f(1)`):
            What is put in order.
        key: says what is compared:
            first this, then that.
        *rest (int): ends

    Returns:
        `list`: the same values.

    Example::

        >>> order([2, 1])

    Slow for many values.

    ```python
    order([2, 1])
    ```
    """


def test_numpy_sections_become_entries() -> None:
    assert parse(NUMPY, {"order"}) == [
        Block(PROSE, "", "", "Put values in order."),
        Block(PROSE, "", "", "Equal values keep their places, see ."),
        Block("parameters", "values", "list of float, optional", "What is put in order. `None` is empty."),
        Block("parameters", "a, b", "int", "Two ends."),
        Block("returns", "ordered", "list", "The same values, the `rqa.smallest` first."),
        Block("raises", "TypeError", "", "If two values cannot be compared."),
        Block("see also", "middle", "", "The value in the middle."),
        Block("see also", "first, last", "", ""),
    ]


def test_google_sections_become_entries_and_end_where_the_indentation_does() -> None:
    assert parse(GOOGLE) == [
        Block(PROSE, "", "", "Put values in order."),
        Block(PROSE, "", "", "Equal values keep their places."),
        Block("parameters", "values", "`list[float]`, optional, defaults to `f(1)`", "What is put in order."),
        Block("parameters", "key", "", "says what is compared: first this, then that."),
        Block("parameters", "*rest", "int", "ends"),
        Block("returns", "", "`list`", "the same values."),
        Block(PROSE, "", "", "Slow for many values."),
    ]


def test_an_entry_reads_as_name_type_and_description_and_a_type_alone_is_no_name() -> None:
    (block,) = parse("Returns\n-------\nlist of int\n    The places.")
    assert (block, block.text) == (Block("returns", "", "list of int", "The places."), "list of int: The places.")
    texts = [Block("parameters", "key", *rest).text for rest in (("str", "What it is."), ("", "What."), ("str", ""))]
    assert texts == ["key (str): What it is.", "key: What.", "key (str)"]


def test_only_the_signature_of_the_object_itself_is_left_out() -> None:
    assert [block.text for block in parse("f(x) -> int\n\nCounts.", {"f"})] == ["Counts."]
    assert [block.text for block in parse("g(x) -> int\n\nCounts.", {"f"})] == ["g(x) -> int", "Counts."]


def test_markup_is_reduced_to_what_it_shows_and_sentences_do_not_end_in_abbreviations() -> None:
    marked = "A :class:`~torch.nn.Linear` of ``x``, *never* **y**, [`Trainer`], `docs <a.html>`_, a * b * c"
    assert plain(marked) == "A `torch.nn.Linear` of `x`, never y, `Trainer`, docs, a * b * c"
    text = "Of a kind, e.g. Gaussian. The default is 1.5. `None` is none! Done"
    assert sentences(text) == ["Of a kind, e.g. Gaussian.", "The default is 1.5.", "`None` is none!", "Done"]
