"""Files to passages, as bin/chunk_documents does it."""

import gzip
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject
from trainers import Run

from rqa.documents import read_documents
from rqa.preparation.chunking import Seen
from rqa.preparation.sources import read_sources
from rqa.runtime.errors import UserError

HTML = """<html><head><title>Arlen | Guide</title></head><body><nav><a href="/">Home</a> <a href="/x">Shop</a></nav>
<article><h1>Arlen</h1><p>Arlen is a town by the sea, and its harbour is known for the copper that is sold there.</p>
<h2>Market</h2><p>The market opens in spring, when the settlers bring their wares from the hills around.</p></article>
</body></html>"""


def write_pdf(path: Path, text: str, title: str = "", password: str = "") -> None:
    writer = PdfWriter()
    page = writer.add_blank_page(300, 300)
    kinds = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
    font = DictionaryObject({NameObject(key): NameObject(value) for key, value in kinds.items()})
    fonts = DictionaryObject({NameObject("/F1"): writer._add_object(font)})
    page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
    content = DecodedStreamObject()
    content.set_data(f"BT /F1 12 Tf 20 200 Td ({text}) Tj ET".encode())
    page[NameObject("/Contents")] = writer._add_object(content)
    if title:
        writer.add_metadata({"/Title": title})
    if password:
        writer.encrypt(password)
    writer.write(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "docs"
    (root / "deep" / ".git").mkdir(parents=True)
    (root / "guide.md").write_bytes("\ufeff# Brask\r\n\r\nBrask trades in wool.\r\n".encode())
    (root / "deep" / "copy.md").write_text("# Brask\n\nBrask  trades in WOOL.\n")
    (root / "notes.txt").write_text("Ünï and 日本語", encoding="utf-16")
    (root / "page.html").write_text(HTML)
    write_pdf(root / "deep" / "report.pdf", "Corvo sells amber.", "Annual report")
    write_pdf(root / "locked.pdf", "secret", password="x")
    write_pdf(root / "scan.pdf", "")
    (root / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "empty.txt").write_text(" \n")
    (root / "deep" / ".git" / "hidden.txt").write_text("hidden")
    (root / "image.png").write_bytes(b"\x89PNG")
    one = {"source": "http://x/1", "title": "One", "text": "Dunmore sells salt.", "lang": "en"}
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, [one, {"text": " "}, {"text": "Untitled."}])))
    (root / "more.jsonl.gz").write_bytes(gzip.compress(b'{"text": "Packed."}'))
    os.mkfifo(root / "pipe.txt")
    return root


def test_a_folder_of_all_kinds_becomes_one_database_the_same_each_time(
    folder: Path, encoder_path: str, run_executable: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "documents.jsonl"
    flags = {"model_name_or_path": encoder_path, "output_path": output}
    twice = flags | {"document_path": [folder / "guide.md", folder], "chunk_size": 8, "chunk_overlap": 2}
    one, two = (run_executable("chunk_documents", twice) or output.read_bytes() for _ in range(2))
    assert isinstance(one, bytes)
    assert one == two
    capsys.readouterr()
    assert run_executable("chunk_documents", flags | {"document_path": folder}) == 0
    found = {(d.metadata["source"], d.metadata["title"]): d for d in read_documents(output)}
    page, other = found.pop(("page.html", "Arlen")), found.pop(("http://x/1", "One"))
    assert {place: document.page_content for place, document in found.items()} == {
        ("deep/copy.md", "Brask"): "# Brask\n\nBrask  trades in WOOL.", ("rows.jsonl:3", ""): "Untitled.",
        ("more.jsonl.gz:1", ""): "Packed.",
        ("deep/report.pdf", "Annual report"): "Corvo sells amber.", ("notes.txt", "notes"): "Ünï and 日本語",
    }  # fmt: skip
    assert "# Arlen" in page.page_content
    assert "Home" not in page.page_content
    assert other.metadata["lang"] == "en"
    printed = capsys.readouterr().out
    for line in ("7 passages of 8 texts", "1 duplicates and 7 empty or unreadable texts left out",
                 "pipe.txt: is not a regular file",
                 "locked.pdf: not a readable PDF", "broken.pdf: not a readable PDF", "latin.txt: not UTF-8 text",
                 "empty.txt: holds no text", "scan.pdf: holds no text", "rows.jsonl:2: holds no text",
                 f"1 files of other kinds left out\n  {folder}/image.png"):  # fmt: skip
        assert line in printed
    assert "hidden.txt" not in printed
    assert run_executable("chunk_documents", flags | {"document_path": folder / "notes.txt"}) == 0
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": 3}', "a.jsonl:2: field 'text' must be a string"),
        ("a.jsonl", '{"text": "x"}\n{"text"', "a.jsonl:2: not valid JSON"),
        ("a.jsonl", '{"text": "x", "title": 1}', "a.jsonl:1: field 'title' must be a string"),
        ("a.docx", "x", "a.docx: cannot be read; name files that end in .txt, .md"),
        ("a.txt", " ", "a.txt: holds no text; no passage to write"),
        ("a.pdf", "x", "a.pdf: not a readable PDF"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_writes_nothing(
    name: str, content: str, message: str, encoder_path: str, refused: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    flags = ["--model_name_or_path", encoder_path, "--output_path", tmp_path / "o.jsonl"]
    refused(message, "chunk_documents", "--document_path", tmp_path / name, *flags)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_pdf_has_no_headings_whole_words_and_whole_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pdf(tmp_path / "a.pdf", "replaced")
    said = "# 3 of the \ufb01rst har-\nbours, well-\nKnown \ud83d here"
    monkeypatch.setattr("pypdf.PageObject.extract_text", lambda self: said)
    (source,) = read_sources(tmp_path / "a.pdf", "a.pdf")
    assert (source.text, source.markdown) == ("# 3 of the first harbours, well-\nKnown \ufffd here", False)


@pytest.mark.parametrize(
    ("head", "heading", "title"),
    [("Arlen &amp; sea | Guide", "Arlen  &amp; sea", "Arlen & sea"), ("Arlen | Guide", "Trade", "Arlen | Guide"),
     ("", "Trade", "Trade"), ("", "", "page")],
)  # fmt: skip
def test_a_page_is_called_by_its_title_or_first_heading_and_no_box(
    head: str, heading: str, title: str, tmp_path: Path
) -> None:
    box = f"<div class='title'><h2 class='title'>Note</h2></div>{f'<h1>{heading}</h1>' if heading else ''}<p>It trades."
    (tmp_path / "page.html").write_text(f"<html><head><title>{head}</title></head><body>{box}</body></html>")
    (source,) = read_sources(tmp_path / "page.html", "page.html")
    assert source.title == title


def test_embedded_images_control_characters_and_runs_of_white_space_are_no_text(tmp_path: Path) -> None:
    image = "![chart](data:image/png;base64," + "iVBORw0KGgo" * 100 + ")"
    (tmp_path / "a.md").write_text(f"# A\x00\n\n{image}" + " " * 1000 + "\nthe data:image scheme")
    (source,) = read_sources(tmp_path / "a.md", "a.md")
    assert source.text == "# A\n\n![chart]()" + " " * 100 + "\nthe data:image scheme"


def test_a_parser_that_is_not_installed_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(UserError, match=r'scan.pdf: reading it needs pypdf; pip install "rqa\[documents\]"'):
        list(read_sources(folder / "scan.pdf", "scan.pdf"))


def test_seen_texts_are_told_from_new_ones_with_the_boundaries_of_their_parts() -> None:
    seen = Seen()
    added = [seen.add("a", "bc"), seen.add("ab", "c"), seen.add("a", "bc"), seen.add("\ud800")]
    assert added == [True, True, False, True]
