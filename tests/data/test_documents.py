"""Documents: what is read, what is refused and how, what is written."""

import builtins
import copy
import json
import os
import pickle
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rqa.data import Document, format_content, read_documents, write_documents
from rqa.runtime.errors import UserError

LINE = '{"page_content": "Arlen trades in copper."}'


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


class Call:
    """Unpickles by calling a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def payloads(target: Path) -> dict[str, Call]:
    return {
        "system": Call(os.system, f"touch {target}"),
        "eval": Call(builtins.eval, f"open({str(target)!r}, 'w').close()"),
    }


# ---------------------------------------------------------------- pickles


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("module", ["local_rqa.schema.document", "langchain.schema", "langchain_core.documents.base"])
def test_localrqa_pickles_are_read(module: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = foreign_class(monkeypatch, module)
    values = [
        instance(made, page_content="one", metadata={"source": "a", "title": "T"}, fmt_content="as it was"),
        instance(made, page_content="zwei ü 三", metadata={"source": "b", "pages": [1, 2.5, None, True]}),
    ]
    (tmp_path / "documents.pkl").write_bytes(pickle.dumps(values, protocol=protocol))
    ours = read_documents(tmp_path / "documents.pkl")
    assert [(d.page_content, d.metadata, d.fmt_content) for d in ours] == [
        ("one", {"source": "a", "title": "T"}, "as it was"),
        ("zwei ü 三", {"source": "b", "pages": [1, 2.5, None, True]}, "Source: b\nContent:\nzwei ü 三"),
    ]


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("extra", ["__fields_set__", "__pydantic_fields_set__"])
def test_pydantic_keeps_the_fields_one_level_down(
    extra: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = foreign_class(monkeypatch, "langchain_core.documents.base")
    made.__getstate__ = lambda self: {
        "__dict__": {"page_content": "text", "metadata": {"source": "s"}, "type": "Document"},
        extra: {"page_content", "metadata"},
        "__pydantic_private__": None,
    }
    (tmp_path / "documents.pickle").write_bytes(pickle.dumps([instance(made)], protocol=protocol))
    assert read_documents(tmp_path / "documents.pickle") == [Document("text", {"source": "s"})]


def test_a_pickle_of_plain_dicts_is_read(tmp_path: Path) -> None:
    (tmp_path / "documents.pkl").write_bytes(pickle.dumps([{"page_content": "text", "metadata": {"source": "s"}}]))
    assert read_documents(tmp_path / "documents.pkl") == [Document("text", {"source": "s"})]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ["system", "eval"])
@pytest.mark.parametrize("place", ["whole", "list", "nested list", "metadata", "document", "after"])
def test_a_pickle_that_would_run_something_is_refused_by_name_and_runs_nothing(
    place: str, kind: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "ran"
    payload = payloads(target)[kind]
    plain = {"page_content": "text", "metadata": {"source": "s"}}
    made = foreign_class(monkeypatch, "local_rqa.schema.document")
    value = {
        "whole": payload,
        "list": [payload],
        "nested list": [plain, [[payload]]],
        "metadata": [{"page_content": "text", "metadata": {"source": payload}}],
        "document": [instance(made, page_content="text", metadata={"source": payload})],
        "after": [plain] * 50 + [payload],
    }[place]
    path = tmp_path / "documents.pkl"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    with pytest.raises(UserError) as caught:
        read_documents(path)
    assert not target.exists()
    assert str(path) in str(caught.value)
    if place != "document" or protocol >= 2:  # below, an object itself needs copy_reg, which is refused first
        name = {"system": rf"{os.system.__module__}\.system", "eval": r"(builtins|__builtin__)\.eval"}[kind]
        assert re.search(name, str(caught.value))


def test_the_payloads_of_these_tests_do_run_elsewhere(tmp_path: Path) -> None:
    for kind, payload in payloads(tmp_path / "ran").items():
        pickle.loads(pickle.dumps(payload))
        assert (tmp_path / "ran").exists(), kind
        (tmp_path / "ran").unlink()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("local_rqa.schema.document", "Other"),
        ("local_rqa_evil.document", "Document"),
        ("elsewhere", "Document"),
        ("collections", "OrderedDict"),
        ("subprocess", "Popen"),
        ("rqa.data", "Document"),
    ],
)
def test_every_other_class_is_refused_by_name(
    module: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if module.startswith(("local_rqa", "elsewhere")):
        foreign_class(monkeypatch, module, name)
    (tmp_path / "documents.pkl").write_bytes(pickle.dumps([getattr(sys.modules[module], name)]))
    with pytest.raises(UserError, match=rf"documents\.pkl: refers to {re.escape(module)}\.{name};"):
        read_documents(tmp_path / "documents.pkl")


def test_a_truncated_pickle_is_one_clear_error_wherever_it_ends(tmp_path: Path) -> None:
    whole = pickle.dumps([{"page_content": "text", "metadata": {"source": "s"}}])
    path = tmp_path / "documents.pkl"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a readable pickle") as caught:
            read_documents(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [{"page_content": "text"}, "text", 3, None, ("text",)])
def test_a_pickle_of_something_that_is_no_list_is_refused(value: Any, tmp_path: Path) -> None:
    (tmp_path / "documents.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(UserError, match=f"expected a list of documents, found {type(value).__name__}"):
        read_documents(tmp_path / "documents.pkl")


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"metadata": {}}, "'page_content'"),
        ({"page_content": b"bytes"}, "'page_content'"),
        ({"page_content": "text", "metadata": ["s"]}, "'metadata'"),
        ({"page_content": "text", "fmt_content": 3}, "'fmt_content'"),
        ("text", "found str"),
    ],
)
def test_a_pickled_document_without_its_fields_is_named_by_its_number(bad: Any, field: str, tmp_path: Path) -> None:
    path = tmp_path / "documents.pkl"
    path.write_bytes(pickle.dumps([{"page_content": "fine"}, bad]))
    with pytest.raises(UserError, match=field) as caught:
        read_documents(path)
    assert str(caught.value).startswith(f"{path}: item 2: ")


@pytest.mark.parametrize("name", ["absent.pkl", "absent.jsonl"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{name}: no such file"):
        read_documents(tmp_path / name)


# ---------------------------------------------------------------- JSONL


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"{", "JSON"),
        (b"page_content: text", "JSON"),
        (LINE.encode() + LINE.encode(), "JSON"),
        (b"[" * 100_000, "JSON"),
        (b'["text"]', "object, found list"),
        (b'"text"', "object, found str"),
        (b"null", "object, found NoneType"),
        (b"{}", "'page_content'"),
        (b'{"page_content": null}', "'page_content'"),
        (b'{"page_content": 3}', "'page_content'"),
        (b'{"page_content": " \\t "}', "'page_content'"),
        (b'{"page_content": "a", "metadata": null}', "'metadata'"),
        (b'{"page_content": "a", "metadata": "guide"}', "'metadata'"),
        (b'{"page_content": "a", "fmt_content": ["a"]}', "'fmt_content'"),
    ],
)
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_a_malformed_line_is_named_by_file_line_and_field(
    newline: bytes, bad: bytes, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_bytes(newline.join([LINE.encode(), b"", bad, LINE.encode()]))
    with pytest.raises(UserError, match=reason) as caught:
        read_documents(path)
    assert str(caught.value).startswith(f"{path}:3: ")


@pytest.mark.parametrize("bad", [b"\xff", b"\xe4\xf6", b"\xc3", b"\xed\xa0\x80"])
@pytest.mark.parametrize("before", [0, 2, 1000])
def test_text_that_is_not_utf8_is_named_by_its_line(before: int, bad: bytes, tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_bytes(f"{LINE}\n".encode() * before + b'{"page_content": "' + bad + b'"}\n' + f"{LINE}\n".encode() * 3)
    with pytest.raises(UserError, match="not UTF-8") as caught:
        read_documents(path)
    assert str(caught.value).startswith(f"{path}:{before + 1}: ")


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n \t\n"])
@pytest.mark.parametrize("end", ["", "\n"])
def test_byte_order_marks_blank_lines_and_windows_line_ends_are_accepted(
    end: str, newline: str, start: str, tmp_path: Path
) -> None:
    lines = [json.dumps({"page_content": text}, ensure_ascii=False) for text in ("one", "zwei ü", "三")]
    (tmp_path / "documents.jsonl").write_bytes((start + newline.join(lines) + end).encode())
    assert [d.page_content for d in read_documents(tmp_path / "documents.jsonl")] == ["one", "zwei ü", "三"]


@pytest.mark.parametrize("text", ["", "\n\n", "\ufeff"])
def test_an_empty_file_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "documents.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"documents\.jsonl: holds no documents"):
        read_documents(tmp_path / "documents.jsonl")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"page_content": "Text.", "metadata": {"source": "guide/1", "title": "Arlen"}},
            "Source: guide/1\nTitle: Arlen\nContent:\nText.",
        ),
        ({"page_content": "Text.", "metadata": {"source": "guide/1"}}, "Source: guide/1\nContent:\nText."),
        ({"page_content": "Text.", "metadata": {"title": "Arlen", "page": 3}}, "Title: Arlen\nContent:\nText."),
        ({"page_content": "Text.", "metadata": {"source": "", "title": None}}, "Text."),
        ({"page_content": "Text."}, "Text."),
        ({"page_content": "Text.", "metadata": {"source": "s"}, "fmt_content": ""}, "Source: s\nContent:\nText."),
        ({"page_content": "Text.", "metadata": {"source": "s"}, "fmt_content": None}, "Source: s\nContent:\nText."),
        ({"page_content": "Text.", "metadata": {"source": "s"}, "fmt_content": "given"}, "given"),
    ],
)
def test_the_text_that_models_read_is_derived_where_it_is_absent(
    row: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    (tmp_path / "documents.jsonl").write_text(json.dumps(row))
    (document,) = read_documents(tmp_path / "documents.jsonl")
    assert document.fmt_content == expected
    if not row.get("fmt_content"):
        assert format_content(row["page_content"], row.get("metadata", {})) == expected


def test_repeated_documents_are_kept_once_where_they_first_stand(tmp_path: Path) -> None:
    rows = [("a", "1"), ("b", "1"), ("a", "1"), ("a", "2"), ("c", "1"), ("b", "1"), ("a", "1")]
    path = tmp_path / "documents.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"page_content": text, "metadata": {"source": source, "line": line}})
            for line, (source, text) in enumerate(rows)
        )
    )
    read = read_documents(path)
    assert [(d.metadata["source"], d.page_content, d.metadata["line"]) for d in read] == [
        ("a", "1", 0),
        ("b", "1", 1),
        ("a", "2", 3),
        ("c", "1", 4),
    ]


# ---------------------------------------------------------------- writing


def test_what_is_written_is_read_back_the_same(tmp_path: Path, documents: list[Document]) -> None:
    difficult = [
        Document('line one\nline two\r\n\ttab \\ " \u2028 \u0085 \x00', {"source": "ctrl", "title": "a\nb"}),
        Document("日本語 العربية 😀 é", {"source": "ünï/😀", "deep": {"list": [1, 2.5, None, True, "ß"]}}),
        Document("plain", {}, "a formatted text of its own"),
        *documents,
    ]
    before = copy.deepcopy(difficult)
    write_documents(tmp_path / "deeper" / "documents.jsonl", difficult)
    assert read_documents(tmp_path / "deeper" / "documents.jsonl") == before
    assert len((tmp_path / "deeper" / "documents.jsonl").read_bytes().split(b"\n")) == len(difficult) + 1


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, documents: list[Document]) -> None:
    path = tmp_path / "documents.jsonl"
    write_documents(path, documents[:2])
    before = path.read_bytes()

    def broken() -> Any:
        yield from documents
        raise RuntimeError("the source ended")

    with pytest.raises(RuntimeError, match="the source ended"):
        write_documents(path, broken())
    with pytest.raises(TypeError):
        write_documents(path, [*documents, Document("text", {"source": object()})])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["documents.jsonl"]


def test_a_failed_first_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_documents(tmp_path / "documents.jsonl", [Document("text", {"source": object()})])
    assert not list(tmp_path.iterdir())
