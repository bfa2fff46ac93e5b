"""A document database that stays on disk."""

import json
from pathlib import Path

import pytest

from rqa.data import Document
from rqa.preparation.mine import DocumentFile
from rqa.runtime.errors import UserError


def test_documents_are_read_when_they_are_asked_for(tmp_path: Path, documents: list[Document]) -> None:
    path = tmp_path / "d.jsonl"
    rows = [json.dumps(d.to_json(), ensure_ascii=False) for d in documents]
    path.write_bytes(("\ufeff" + rows[0] + "\r\n\r\n" + "\n".join(rows[1:])).encode())
    lazily = DocumentFile(path)
    assert (list(lazily), lazily[-1], lazily[3:5]) == (documents, documents[-1], documents[3:5])
    for text, message in (
        ('{"page_content": "a"}\n{"page_content": 3}', r"d\.jsonl:2: field 'page_content'"),
        ("\n", "no documents"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            DocumentFile(path)
