"""Documents and examples: every field read and checked, what is refused and how, what is written."""

import copy
import itertools
import json
import logging
import os
import pickle
import re
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from subprocess import Popen
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from rqa.data import Document, Example, Turn, read_examples, write_examples
from rqa.documents import Places, keys_of, normalized_of, passages_of, read_documents, with_known_gold, write_documents
from rqa.runtime.errors import UserError
from rqa.runtime.files import atomic_file

PASSAGE = {"page_content": "Arlen trades in copper.", "metadata": {"source": "guide/0"}}
ARLEN = Document("Arlen trades in copper.", {"source": "guide/0"})
OTHER = {"page_content": "Brask trades in wool.", "metadata": {"source": "guide/2"}}
BRASK = Document("Brask trades in wool.", {"source": "guide/2"})
FIELDS = {"page_content": "text", "metadata": {"source": "s"}}


def lines(*rows: Any) -> bytes:
    return b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)


def refusal(read: Callable[..., Any], path: Path, content: bytes) -> str:
    """Why a file of this content cannot be read: one line, which names the file; this is what follows the name."""
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:")
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}:")


def foreign_class(monkeypatch: pytest.MonkeyPatch, module: str, name: str = "Document") -> type:
    """A class that pickles as `module.name`, as if that library were installed."""
    made = type(name, (), {"__module__": module, "__qualname__": name})
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    setattr(sys.modules[module], name, made)
    return made


def instance(made: type, **state: Any) -> Any:
    """An object with this state, made without running a constructor."""
    value = made.__new__(made)
    vars(value).update(state)
    return value


class Call(tuple):
    """Unpickles by calling its first element with its second."""

    def __reduce__(self) -> tuple[Any, ...]:
        return self[0], (self[1],)


@pytest.mark.parametrize(
    ("module", "pydantic"),
    [("local_rqa.schema.document", ""), ("langchain.schema", "__fields_set__"),
     ("langchain_core.documents.base", "__pydantic_fields_set__")],
)  # fmt: skip
def test_localrqa_pickles_are_read(module: str, pydantic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, path = foreign_class(monkeypatch, module), tmp_path / ("documents.pickle" if pydantic else "documents.pkl")
    if pydantic:  # which keeps the fields one level down
        made.__getstate__ = lambda self: {"__dict__": dict(vars(self)), pydantic: {""}, "__pydantic_private__": None}
    common = {"source": "b", "pages": [1, 2.5, None, True]}
    mended = common | {"tags": ["a", "b"], "image": None, "half": "\ufffd"}
    expected = [Document("one", {"source": "a"}, "as it was"), Document("zwei ü 三", mended), Document(**FIELDS)]
    for protocol in range(2, 6):
        image = b"\xff" if protocol > 2 else None  # protocol 2 has no bytes
        odd = common | {"tags": {"b", "a"}, "image": image, "half": "\ud83d"}
        first = instance(made, page_content="one", metadata={"source": "a"}, fmt_content="as it was")
        values = [first, instance(made, page_content="zwei ü 三", metadata=odd), FIELDS]
        path.write_bytes(pickle.dumps(values, protocol=protocol))
        assert list(read_documents(path)) == expected


def test_a_pickle_that_refers_to_anything_else_is_refused_by_name_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = foreign_class(monkeypatch, "local_rqa.schema.document")
    foreign = [("local_rqa.other", "Other"), ("local_rqa_evil.document", "Document"), ("elsewhere", "Document")]
    values = {f"{module}.{name}": foreign_class(monkeypatch, module, name) for module, name in foreign}
    payload = Call((eval, f"open({str(tmp_path / 'ran')!r}, 'w').close()"))
    values |= {"collections.OrderedDict": OrderedDict, "(subprocess|commands).Popen": Popen,
               "rqa.data.Document": Document, r"(builtins|__builtin__)\.eval": payload}  # fmt: skip
    places: list[Callable[[Any], Any]] = [
        lambda value: value,
        lambda value: [FIELDS, [[value]]],
        lambda value: [FIELDS] * 50 + [value],
        lambda value: [instance(made, page_content="text", metadata={"source": value})],
    ]
    for (protocol, place), (name, value) in itertools.product(zip((0, 2, 4, 5), places, strict=True), values.items()):
        reason = refusal(read_documents, tmp_path / "documents.pkl", pickle.dumps(place(value), protocol))
        assert re.search(rf"^ refers to {name};", reason)
        assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(payload))  # elsewhere it does run
    assert (tmp_path / "ran").exists()


def test_a_pickle_that_is_no_list_of_documents_is_refused_by_item_and_field(tmp_path: Path) -> None:
    path = tmp_path / "documents.pkl"
    whole = pickle.dumps([FIELDS])
    for length in range(len(whole)):
        assert "not a readable pickle" in refusal(read_documents, path, whole[:length])
    for value in ({"page_content": "text"}, "text", 3, None):
        expected = f"expected a JSON array, found {type(value).__name__}"
        assert expected in refusal(read_documents, path, pickle.dumps(value))
    for bad, reason in (
        ({"metadata": {}}, "'page_content'"), ({"page_content": b"bytes"}, "'page_content'"), ("text", "found str"),
        (FIELDS | {"metadata": ["s"]}, "'metadata'"), (FIELDS | {"fmt_content": 3}, "'fmt_content'"),
    ):  # fmt: skip
        assert re.search(rf"^ item 2: .*{reason}", refusal(read_documents, path, pickle.dumps([FIELDS, bad])))


def test_a_malformed_row_is_named_by_file_line_and_field(tmp_path: Path) -> None:
    of_documents: dict[str, list[Any]] = {
        "JSON": [b"{", b"page_content: text", lines(FIELDS) + lines(FIELDS), b"[" * 100_000],
        "not UTF-8": [b'{"page_content": "' + bad + b'"}' for bad in (b"\xff", b"\xe4\xf6", b"\xc3", b"\xed\xa0\x80")],
        "object, found (list|str|NoneType)": [["text"], "text", None],
        "'page_content'": [{"page_content": content} for content in (None, 3, " \t ")] + [{}],
        "'metadata'": [{"page_content": "a", "metadata": wrong} for wrong in (None, "guide")],
        "'fmt_content'": [{"page_content": "a", "fmt_content": ["a"]}],
    }
    wrong_fields: dict[str, list[Any]] = {
        "'gold_answer'": [{"gold_answer": answer} for answer in (3, ["A."])],
        "'other_answers'": [{"other_answers": answers} for answers in ("A.", [3])],
        "'gold_docs'": [{"gold_docs": documents} for documents in ("guide", PASSAGE)],
        "'gold_docs'.*found str": [{"gold_docs": ["guide"]}],
        "'gold_docs'.*'page_content'": [{"gold_docs": [PASSAGE, {}]}],
        "'gold_docs'.*'metadata'": [{"gold_docs": [{"page_content": "x", "metadata": 3}]}],
        "'hard_neg_docs'.*'page_content'": [{"hard_neg_docs": [{"page_content": ""}]}],
        "'hard_neg_docs'": [{"hard_neg_docs": 1}],
        "'ctxs'.*'page_content'": [{"ctxs": [{"text": "x", "score": 1}]}],
        "'ctxs'": [{"ctxs": {"0": PASSAGE}}],
        "'chat_history'": [{"chat_history": "Hello."}],
        "'chat_history'.*'speaker'": [{"chat_history": ["Hello."]}],
        "'chat_history'.*'message'": [{"chat_history": [{"speaker": "User"} | no]} for no in ({}, {"message": None})],
    }
    of_examples = {reason: [{"question": "Why?"} | row for row in rows] for reason, rows in wrong_fields.items()} | {
        "JSON": [b"{"],
        "found list": [[]],
        "'question'": [{}, {"question": None}, {"question": ["Why?"]}],
        "'questions'": [{"questions": questions} for questions in ("Why?", [], ["Why?", 3])],
    }
    kinds = ((read_documents, FIELDS, of_documents), (read_examples, {"question": "Good?"}, of_examples))
    for read, good, bad in kinds:
        for reason, row in ((reason, row) for reason, rows in bad.items() for row in rows):
            content = lines(good, b"", row, good)
            for newline in (b"\n", b"\r\n"):
                said = refusal(read, tmp_path / "rows.jsonl", content.replace(b"\n", newline))
                assert re.search(f"^3: .*{reason}", said), row


def test_byte_order_marks_blank_lines_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    path, expected = tmp_path / "documents.jsonl", [Document(text) for text in ("one", "zwei ü", "三", "four")]
    rows = [json.dumps({"page_content": document.page_content}, ensure_ascii=False) for document in expected]
    for start, newline, end in itertools.product(["", "\ufeff"], ["\n", "\r\n", "\n\n \t\n"], ["", "\n"]):
        path.write_bytes((start + newline.join(rows) + end).encode())
        read = read_documents(path)
        assert (list(read), read[-1], read[1:3]) == (expected, expected[-1], expected[1:3])


def test_a_file_that_is_missing_or_holds_nothing_is_an_error(tmp_path: Path) -> None:
    for read, blank, what in (
        (read_documents, "\ufeff", "documents"),
        (read_examples, '{"question": " "}', "examples"),
    ):  # fmt: skip
        for content in ("", "\n\n", blank):
            assert refusal(read, tmp_path / "rows.jsonl", content.encode()) == f" holds no {what}"
    for read, name in ((read_documents, "no.jsonl"), (read_examples, "no.jsonl"), (read_documents, "no.pkl")):
        with pytest.raises(UserError, match=f"{name}: no such file"):
            read(tmp_path / name)


def test_the_text_that_models_read_is_derived_where_it_is_absent(tmp_path: Path) -> None:
    path, sourced, derived = tmp_path / "documents.jsonl", {"metadata": {"source": "s"}}, "Source: s\nContent:\nText."
    for row, expected in (
        ({"metadata": {"source": "guide/1", "title": "Arlen"}}, "Source: guide/1\nTitle: Arlen\nContent:\nText."),
        ({"metadata": {"title": "Arlen", "page": 3}}, "Title: Arlen\nContent:\nText."),
        ({"metadata": {"source": "", "title": None}}, "Text."), ({}, "Text."),
        (sourced, derived), (sourced | {"fmt_content": ""}, derived), (sourced | {"fmt_content": None}, derived),
        (sourced | {"fmt_content": "given"}, "given"),
    ):  # fmt: skip
        path.write_bytes(lines({"page_content": "Text."} | row))
        assert [document.fmt_content for document in read_documents(path)] == [expected]


def test_repeated_documents_are_kept_once_where_they_first_stand(tmp_path: Path) -> None:
    rows = [("a", "1"), ("b", "1"), ("a", "1"), ("a", "2"), ("c", "1"), ("b", "1"), ("a", "1")]
    content = [{"page_content": text, "metadata": {"source": source, "n": n}} for n, (source, text) in enumerate(rows)]
    (tmp_path / "documents.jsonl").write_bytes(lines(*content))
    assert [document.metadata["n"] for document in read_documents(tmp_path / "documents.jsonl")] == [0, 1, 3, 4]


@pytest.mark.parametrize("name", ["documents.jsonl", "documents.jsonl.gz", "documents.pkl"])
def test_an_open_database_stays_what_it_was_and_a_changed_file_is_read_anew(
    name: str, documents: list[Document], tmp_path: Path
) -> None:
    path = tmp_path / name

    def put(written: list[Document]) -> None:
        with atomic_file(path) as temporary:
            write_documents(tmp_path / f"written{path.suffix}", written)
            rows = [document.to_json() for document in written]
            made = pickle.dumps(rows) if name.endswith("pkl") else (tmp_path / f"written{path.suffix}").read_bytes()
            temporary.write_bytes(made)

    put(documents)
    opened = read_documents(path)
    state = path.stat()
    put([*documents[1:], documents[0]])  # as many bytes
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert list(opened) == documents
    for copied in (read_documents(path), pickle.loads(pickle.dumps(opened)), copy.deepcopy(opened)):
        assert list(copied) == [*documents[1:], documents[0]]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(opened.__getitem__, [*range(24)] * 9)) == documents * 9
    put(documents[:3])
    assert len(read_documents(path)) == 3


def test_a_table_that_lies_is_found_out_and_made_anew_and_a_file_of_that_name_is_left_alone(
    documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, table, cache = tmp_path / "documents.jsonl", tmp_path / "documents.jsonl.table", tmp_path / "cache"
    write_documents(path, documents)
    read_documents(path)
    whole = table.read_bytes()
    table.write_bytes(whole[:-100])
    assert (list(read_documents(path)), table.read_bytes()) == (documents, whole)
    for bad in (b"\0" * 8, b"\xff" * 8):  # a document's first byte, and its size
        for place in (256 + 64, 256 + 72):
            table.write_bytes(whole[:place] + bad + whole[place + 8 :])
            with pytest.raises(UserError, match=r"documents\.jsonl: has changed .* start again"):
                list(read_documents(path))
            assert list(read_documents(path)) == documents
    path.write_bytes(path.read_bytes().replace(b"harbour", b"market "))  # while it is open, in place
    assert "market " in read_documents(path)[0].page_content
    with open(path) as file:
        assert len(read_documents(f"/dev/fd/{file.fileno()}")) == 24  # the very table
    assert not cache.exists()
    table.write_bytes(b"somebody's")
    for _ in range(2):
        assert len(read_documents(path)) == 24
    assert table.read_bytes() == b"somebody's"
    shutil.rmtree(cache)
    table.unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert len(read_documents(path)) == 24
    assert [entry.suffix for entry in (cache / "documents").iterdir()] == [".table"]
    assert not table.exists()


def test_fingerprints_are_those_of_the_documents_and_places_are_the_first(
    documents: list[Document], tmp_path: Path
) -> None:
    others = [replace(ARLEN, formatted="Mine."), replace(ARLEN, metadata={"source": "b"}), replace(BRASK, formatted="")]
    found = [ARLEN, *others, Document("arlen  trades in COPPER.", {"source": "guide/0"})]
    equal = {kind: np.unique(kind(found), return_inverse=True)[1] for kind in (keys_of, passages_of, normalized_of)}
    same = {kind: [[*row].index(number) for number in row] for kind, row in equal.items()}
    assert same == {keys_of: [0, 0, 2, 3, 4], passages_of: [0, 1, 2, 3, 4], normalized_of: [0, 0, 0, 3, 0]}
    write_documents(tmp_path / "documents.jsonl", documents)
    read = read_documents(tmp_path / "documents.jsonl")
    for kind in equal:
        assert (kind(read) == kind(documents)).all()
    assert Places(np.array([b"b", b"a", b"b"]))(np.array([b"a", b"b", b"c"])).tolist() == [1, 0, -1]
    assert Places(keys_of([]))(keys_of([ARLEN])).tolist() == [-1]


def test_a_row_holds_question_answers_history_and_passages_and_all_but_the_question_may_be_absent(
    tmp_path: Path,
) -> None:
    path = tmp_path / "examples.jsonl"
    said = [{"speaker": "User", "message": "Hello."}, {"speaker": "Assistant", "message": ""}]
    row = {"chat_history": said, "question": "Which trade?", "gold_docs": [PASSAGE], "gold_answer": "Copper.",
           "other_answers": ["Cu"], "hard_neg_docs": [OTHER],
           "ctxs": [OTHER | {"score": 2}, PASSAGE | {"score": -0.5}]}  # fmt: skip
    path.write_bytes(lines(row))
    history = (Turn("User", "Hello."), Turn("Assistant", ""))
    expected = Example("Which trade?", (ARLEN,), "Copper.", history, (BRASK,), (BRASK, ARLEN), (2.0, -0.5), ("Cu",))
    assert read_examples(path, answers=True) == [expected]
    bare = {"question": "Why?"}
    unscored = [bare | {"ctxs": [first, OTHER]} for first in (PASSAGE, PASSAGE | {"score": 1.0})]  # all scores, or none
    path.write_bytes(lines(bare, bare | {"gold_docs": None}, *unscored))
    read = read_examples(path)
    assert read == [Example("Why?")] * 2 + [Example("Why?", ctxs=(ARLEN, BRASK))] * 2
    assert [example.where for example in read] == [f"{path}:{number}" for number in (1, 2, 3, 4)]


def test_each_of_several_questions_becomes_one_example_and_blank_ones_and_answers_are_reported_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "examples.jsonl"
    several = {"questions": ["What?", " ", "When?"], "gold_docs": [PASSAGE], "hard_neg_docs": [OTHER]}
    blank = [("", "A."), (" \t\n", "A."), ("Why?", ""), ("Why?", "\u3000\n")]
    bad = [{"question": question, "gold_answer": answer} for question, answer in blank]
    path.write_bytes(lines(several, b"", *bad, {"question": "Who?", "gold_answer": "A."}))
    with caplog.at_level(logging.INFO, logger="rqa"):
        read = read_examples(path)
    good = [Example(text, (ARLEN,), hard_neg_docs=(BRASK,)) for text in ("What?", "When?")]
    assert read == [*good, Example("Who?", gold_answer="A.")]
    assert [example.where for example in read] == [f"{path}:1", f"{path}:1", f"{path}:7"]
    fields = {1: "question", 3: "question", 4: "question", 5: "gold_answer", 6: "gold_answer"}
    for record, (line, field) in zip(caplog.records, fields.items(), strict=True):
        assert (record.name, record.levelno) == ("rqa.data", logging.WARNING)
        assert record.getMessage().startswith(f"{path}:{line}: field '{field}' is blank")


def test_answers_may_be_absent_only_where_none_are_needed_and_serve_one_question(tmp_path: Path) -> None:
    def read(path: Path) -> list[Example]:
        return read_examples(path, answers=True)

    good, path = {"question": "Good?", "gold_answer": "Yes."}, tmp_path / "examples.jsonl"
    for row in ({"question": "Why?"}, {"question": "Why?", "gold_answer": None}):
        assert refusal(read, path, lines(good, row)).startswith("2: field 'gold_answer'")
        assert len(read_examples(path)) == 2
    several = {"questions": ["What?", "Where?"], "gold_answer": "There."}
    assert re.search("^1: .*'questions'", refusal(read, path, lines(several)))


def test_gold_passages_are_matched_by_text_and_those_not_in_the_database_are_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    spelled = [
        Document("Arlen trades  in\ncopper’s ore, E\u0301lan.", {"source": "x", "gold_gain": 2}),
        Document("Lost.", {"source": "guide"}),
    ]
    known = Document("arlen trades in copper's ore, Élan.", {"source": "guide/1"})
    examples = [Example("Which?", (BRASK, *spelled), where="train.jsonl:7"), Example("None?")]
    with caplog.at_level(logging.WARNING, logger="rqa"):
        assert with_known_gold(examples[1:], []) == examples[1:]
        assert with_known_gold([Example("Which?", (BRASK,))], [BRASK]) == [Example("Which?", (BRASK,))]
        assert not caplog.records
        found = with_known_gold(examples, [ARLEN, BRASK, known])
    graded = replace(known, metadata=known.metadata | {"gold_gain": 2})  # the question's, not the database's
    assert found == [Example("Which?", (BRASK, graded, spelled[1])), Example("None?")]
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("train.jsonl: 2 gold passages are not in the database")
    assert re.search(r"such as 'guide': 'Lost\.'; 1 are there .* 1 are not, and can never be found", said)


def test_documents_and_examples_are_read_back_as_they_were_written(
    tmp_path: Path, documents: list[Document], examples: list[Example]
) -> None:
    difficult = [
        Document('line one\nline two\r\n\ttab \\ " \u2028 \u0085 \x00', {"source": "ctrl", "title": "a\nb"}),
        Document("日本語 العربية 😀 é", {"source": "ünï/😀", "deep": {"list": [1, 2.5, None, True, "ß"]}}),
        Document("plain", {}, "a formatted text of its own"),
        *documents,
    ]
    asked = [
        *examples,
        Example("¿Qué? 😀\n二", (ARLEN, BRASK), "Ü\u2028", (Turn("User", "hi\r\n"), Turn("AI", ""))),
        Example("Retriever's", (ARLEN,), hard_neg_docs=(BRASK, ARLEN)),
        Example("Scored?", ctxs=(BRASK, ARLEN), ctx_scores=(0.1 + 0.2, -1e-9)),
        Example("Unscored?", ctxs=(ARLEN,), other_answers=("a", "ä")),
        Example("Alone?"),
    ]
    before = copy.deepcopy((difficult, asked))
    first, again = tmp_path / "deeper" / "first.jsonl", tmp_path / "again.jsonl"
    for write, read, written in ((write_documents, read_documents, difficult), (write_examples, read_examples, asked)):
        write(first, written)
        assert list(read(first)) == written
        assert first.read_bytes().count(b"\n") == len(written)
        assert first.read_bytes().count(b"fmt_content") == (1 if write is write_documents else 0)  # else it is derived
        write(again, read(first))
        assert again.read_bytes() == first.read_bytes()
    assert (difficult, asked) == before


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, documents: list[Document]) -> None:
    path = tmp_path / "documents.jsonl"
    write_documents(path, documents[:2])
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_documents(path, [*documents, Document("text", {"source": object()})])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["documents.jsonl"]
