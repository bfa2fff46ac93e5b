"""Hard negatives for a whole file of questions: the choice, and bin/mine_negatives as a user runs it."""

from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
from trainers import Run

from rqa.data import Document, Example, read_examples, write_examples
from rqa.documents import read_documents
from rqa.models.encoder import load_encoder
from rqa.models.reranker import load_reranker
from rqa.objectives.ctl import NegativeArguments, NegativeChooser
from rqa.preparation.mine import mine
from rqa.retrieval.hybrid import LexicalRetriever
from rqa.retrieval.reranking import RerankingRetriever
from rqa.retrieval.retriever import Hits, PassageRetriever, Retriever
from rqa.runtime.cli import as_words


def test_two_rankings_are_taken_in_turn_and_no_text_twice(documents: list[Document]) -> None:
    one = Hits(np.array([[0, 1, 2, 3]]), np.array([[4.0, 3, 2, 1]]))
    two = Hits(np.array([[4, 1, 0, -1]]), np.array([[9.0, 8, 7, -np.inf]]))
    chooser = NegativeChooser([Example("?", (documents[9],))], documents, NegativeArguments())
    assert mine(chooser, [one, two], 4) == [[0, 4, 1, 2]]


@pytest.fixture
def flags(data: Path, tmp_path: Path) -> dict[str, object]:
    """The examples' gold passages have no sources, and so are known by their texts."""
    (tmp_path / "bare.jsonl").write_text('{"question": "Who?"}')
    examples = read_examples(data / "train_w_qa.jsonl")
    unsourced = (tuple(Document(gold.page_content) for gold in example.gold_docs) for example in examples)
    written = (replace(example, gold_docs=gold) for example, gold in zip(examples, unsourced, strict=True))
    write_examples(tmp_path / "train.jsonl", written)
    return {"train_file": tmp_path / "train.jsonl", "document_path": data / "documents.jsonl",
            "output_path": tmp_path / "mined.jsonl"}  # fmt: skip


@pytest.mark.parametrize(("retriever", "reranks"), [("bm25", False), ("dense", False), ("bm25", True), ("both", True)])
def test_mined_examples_are_what_the_retriever_ranks_without_the_gold(
    retriever: str, reranks: bool, flags: dict[str, object], encoder_path: str, reranker_path: str,
    run_executable: Run, data: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    flags |= {"retriever": retriever, "num_negatives": 3}
    flags |= {"reranker": reranker_path, "dtype": "float32", "negatives_to_rank": 20} if reranks else {}
    index = Path(str(flags["output_path"])).with_name("index")
    flags |= {} if retriever == "bm25" else {"embedding_model_name_or_path": encoder_path, "index_path": index}
    assert run_executable("mine_negatives", flags) == 0
    before, after = read_examples(data / "train_w_qa.jsonl"), read_examples(str(flags["output_path"]), answers=True)
    assert [replace(example, hard_neg_docs=()) for example in after] == before
    documents = read_documents(data / "documents.jsonl")
    rankers: list[PassageRetriever] = [LexicalRetriever(documents)] * (retriever != "dense")
    rankers += [Retriever(load_encoder(encoder_path), documents).open()] * (retriever != "bm25")
    rankers = [RerankingRetriever(each, load_reranker(reranker_path), 50) for each in rankers] if reranks else rankers
    for example in after:
        lists = [[documents[i] for i in ranker.retrieve([example.question], 24).ids[0] if i >= 0] for ranker in rankers]
        ranked = dict.fromkeys(document for rank in zip_longest(*lists) for document in rank if document)
        expected = [document for document in ranked if document not in example.gold_docs]
        assert retriever != "bm25" or list(example.hard_neg_docs) == expected[:3]
        assert len(example.hard_neg_docs) == 3
        assert set(example.hard_neg_docs) <= set(expected[:8])
    assert index.exists() == (retriever != "bm25")
    assert "48 negatives of 16 questions over 24 passages; 0 questions have fewer than 3" in capsys.readouterr().out


def test_a_question_without_gold_passages_is_one_line(
    flags: dict[str, object], refused: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = as_words(flags | {"train_file": "bare.jsonl"})
    refused("bare.jsonl:1: field 'gold_docs' is empty", "mine_negatives", *line)
    assert not (tmp_path / "mined.jsonl").exists()
