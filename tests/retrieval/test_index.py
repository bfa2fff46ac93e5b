"""The index against brute force; saved, loaded, damaged, refused."""

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import numpy as np
import pytest
from fakes import full_disk

from rqa.data import Document
from rqa.retrieval import faiss_factory
from rqa.retrieval.faiss_index import FaissIndex, refuse_foreign_directory
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.ranking import inner_products, nearest, ranked
from rqa.runtime.errors import UserError
from rqa.runtime.files import write_json


def vectors(count: int, seed: int, width: int = 8) -> np.ndarray:
    """Of many lengths: an inner product is no cosine."""
    lengths = np.linspace(0.1, 5, count, dtype=np.float32)[:, None]
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32) * lengths


def brute_force(queries: np.ndarray, embeddings: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Every inner product in float64, the k largest."""
    products = queries.astype(np.float64) @ embeddings.astype(np.float64).T
    ids = np.argsort(-products, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(products, ids, axis=1), ids


def empty(factory: str = "Flat", parameters: str = "", count: int = 500) -> FaissIndex:
    documents = [Document(f"passage {number}") for number in range(count)]
    return FaissIndex(documents, IndexArguments(index_factory=factory, index_search_parameters=parameters))


def built(embeddings: np.ndarray, factory: str = "Flat", parameters: str = "", stamp: str = "stamp") -> FaissIndex:
    index = empty(factory, parameters, len(embeddings))
    index.replace(embeddings)
    index.stamp = stamp
    return index


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("factory", "parameters", "k"),
    [("Flat", "", 1), ("Flat", "", 3), ("Flat", "", 200), ("IVF4,Flat", "nprobe=4", 5), ("HNSW64", "efSearch=200", 5),
     ("SQ8,RFlat", "", 5), ("SQ8,RFlat", "", 200), ("SQ4,RFlat", "k_factor_rf=16", 5)],
)  # fmt: skip
def test_searching_equals_brute_force_with_inner_products(factory: str, parameters: str, k: int) -> None:
    embeddings, queries = vectors(200, 0), vectors(9, 1)
    scores, ids = built(embeddings, factory, parameters).search(queries, k)
    expected_scores, expected_ids = brute_force(queries, embeddings, k)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-4, atol=1e-5)


def test_search_parameters_decide_how_much_is_searched_in_a_loaded_index_too(tmp_path: Path) -> None:
    embeddings, queries = vectors(400, 4), vectors(30, 5)
    _, expected = brute_force(queries, embeddings, 1)
    narrow, wide = built(embeddings, "IVF16,Flat", "nprobe=1"), empty("IVF16,Flat", "nprobe=16")
    narrow.save(tmp_path / "index")
    assert wide.load(tmp_path / "index")
    assert (narrow.search(queries, 1)[1] != expected).any()
    np.testing.assert_array_equal(wide.search(queries, 1)[1], expected)


def test_more_documents_than_there_are_cannot_be_found_and_no_queries_find_nothing() -> None:
    for queries in (2, 0):
        scores, ids = built(vectors(3, 6)).search(vectors(queries, 7), 10)
        assert scores.shape == ids.shape == (queries, 3)
        assert [sorted(row) for row in ids.tolist()] == [[0, 1, 2]] * queries


def test_replacing_leaves_nothing_of_the_index_before_and_a_failed_replacement_leaves_all_of_it() -> None:
    embeddings = vectors(100, 0)
    index = built(embeddings, "IVF8,Flat", "nprobe=8")
    with pytest.raises(UserError, match="--index_factory"):
        index.replace(vectors(3, 2), "bfloat16")
    fresh = vectors(20, 8, width=5)
    for size, dtype, held in ((100, "float32", embeddings), (20, "bfloat16", fresh)):
        queries = vectors(4, 1, held.shape[1])
        assert (len(index), index.dtype) == (size, dtype)
        np.testing.assert_array_equal(index.search(queries, 2)[1], brute_force(queries, held, 2)[1])
        index.replace(fresh, "bfloat16")


@pytest.mark.parametrize(
    ("factory", "count"),
    [("Nonsense", 50), ("IVF,Flat", 50), ("HNSW32,,", 50), ("Flat,Flat,Flat", 50), ("IVF64,Flat", 12), ("PQ4x8", 12)],
)
def test_a_factory_that_faiss_refuses_names_its_flag_and_the_number_of_documents(factory: str, count: int) -> None:
    with pytest.raises(UserError, match=rf"^--index_factory {factory}: FAISS refuses it for {count} documents.*\Z"):
        built(vectors(count, 0), factory)


@pytest.mark.parametrize(
    ("factory", "parameters"),
    [("Flat", "nprobe=4"), ("IVF4,Flat", "efSearch=3"), ("IVF4,Flat", "nprobe"), ("HNSW16", "nonsense=1"),
     ("SQ8", "k_factor_rf=4"), ("SQ8,RFlat", "k_factor_rf=0.5"), ("IVF4,Flat", "nprobe=0")],
)  # fmt: skip
def test_a_bad_search_parameter_names_its_flag(factory: str, parameters: str, tmp_path: Path) -> None:
    built(vectors(200, 0), factory).save(tmp_path / "index")
    for use in (lambda index: index.replace(vectors(200, 0)), lambda index: index.load(tmp_path / "index")):
        with pytest.raises(UserError, match=rf"^--index_search_parameters {parameters}: .*\Z"):
            use(empty(factory, parameters))


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW16", "SQ8,RFlat"])
def test_what_is_saved_last_is_loaded(factory: str, tmp_path: Path) -> None:
    path, queries = tmp_path / "deep" / "index", vectors(5, 1)
    path.mkdir(parents=True)
    built(vectors(50, 2), factory, stamp="old").save(path)  # in place of an empty directory
    index, loaded = built(vectors(200, 0), factory, stamp="the stamp"), empty(factory)
    index.save(path)
    assert loaded.load(path)
    assert (len(loaded), loaded.stamp) == (200, "the stamp")
    for ours, theirs in zip(loaded.search(queries, 7), index.search(queries, 7), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [entry.name for entry in path.parent.iterdir()] == ["index"]
    assert not empty("Flat" if factory != "Flat" else "HNSW16").load(path)


def lying(name: str, content: bytes) -> Callable[[Path], object]:
    """A file whose checksum is right, and whose content is not."""
    sums = {name: hashlib.sha256(content).hexdigest()}
    return lambda path: (path / name).write_bytes(content) and write_json(path / "COMPLETE", sums)


@pytest.mark.parametrize(
    "harm",
    [shutil.rmtree, lambda path: (path / "COMPLETE").unlink(), lambda path: (path / "index.json").unlink(),
     lambda path: (path / "index.faiss").write_bytes((path / "index.faiss").read_bytes()[:800]),
     lying("index.json", b'{"stamp": '), lying("index.json", b"[]"), lying("index.json", b"\xff\xfe"),
     lying("index.json", b'{"stamp": 1}'), lying("passages.npy", bytes(900)), lying("passages.npy", b""),
     lying("index.faiss", b"FAISS"), lying("index.faiss", bytes(range(256)) * 8)],
)  # fmt: skip
def test_a_half_written_damaged_or_lying_index_is_not_used(harm: Callable[[Path], object], tmp_path: Path) -> None:
    built(vectors(50, 0)).save(tmp_path / "index")
    harm(tmp_path / "index")
    embeddings, queries = vectors(30, 1), vectors(3, 2)
    index = built(embeddings, stamp="before")
    assert index.load(tmp_path / "index") is False
    assert (len(index), index.stamp) == (30, "before")
    np.testing.assert_array_equal(index.search(queries, 3)[1], brute_force(queries, embeddings, 3)[1])


@pytest.mark.parametrize(
    "names",
    [[""], ["notes.txt"], ["model.safetensors", "config.json"], ["index.faiss", "index.pkl"], [".hidden"],
     ["index.json", "thesis.tex"], ["index.json", "index.html", "pictures/cat.jpg"]],
    ids=str,
)  # fmt: skip
def test_a_directory_with_other_files_or_a_file_is_refused_and_untouched(names: list[str], tmp_path: Path) -> None:
    target = tmp_path / "precious"
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(f"{name} is mine")
    before = tree(tmp_path)
    for use in (refuse_foreign_directory, built(vectors(5, 0)).save):
        with pytest.raises(UserError, match=f"{target}: holds something that is not an rqa index"):
            use(target)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("short", [10, 3000])
def test_a_disk_that_is_full_leaves_no_index(short: int, tmp_path: Path) -> None:
    """Also where it is the last few bytes that it lacks, which are written when the file is closed."""
    index = built(vectors(1000, 0))
    index.save(tmp_path / "whole")
    room = (tmp_path / "whole/index.faiss").stat().st_size - short
    with full_disk(room), pytest.raises(OSError, match="File too large"):
        index.save(tmp_path / "index")
    assert [entry.name for entry in tmp_path.iterdir()] == ["whole"]


def test_products_some_rows_at_a_time_find_what_brute_force_finds_and_equals_by_their_place() -> None:
    """What a GPU does for a flat index; and the scores of what was found do not depend on who asks beside."""
    embeddings, queries = vectors(100, 2), vectors(7, 3)
    embeddings[[40, 90]] = embeddings[10]
    expected_scores, expected = brute_force(queries, embeddings, 12)
    rows = nearest(queries, torch.from_numpy(embeddings).split(16), 20)
    scores = inner_products(queries, torch.from_numpy(embeddings), rows)
    scores, rows = ranked(scores, rows, 12)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(scores, expected_scores.astype(np.float32))
    index = built(embeddings)
    together, apart = index.search(queries, 12), [index.search(query[None], 12) for query in queries]
    for ours, one_by_one in zip(together, zip(*apart, strict=True), strict=True):
        np.testing.assert_array_equal(ours, np.concatenate(one_by_one))
    np.testing.assert_array_equal(together[1], expected)


def test_however_many_are_equal_those_that_come_first_are_found_in_whatever_order_they_lie(tmp_path: Path) -> None:
    embeddings, queries = vectors(5, 2)[np.random.default_rng(0).integers(5, size=600)], vectors(70, 3)
    index, moved = built(embeddings), empty(count=600)
    index.save(tmp_path / "index")
    moved.documents = moved.documents[::-1]
    assert moved.load(tmp_path / "index")
    for each, held in ((index, embeddings), (moved, embeddings[::-1])):
        for asked in (queries[:1], queries):
            np.testing.assert_array_equal(each.search(asked, 10)[1], brute_force(asked, held, 10)[1])


def test_auto_is_flat_while_that_is_fast_and_then_searches_as_few_cells_as_find_nearly_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert built(vectors(300, 0), "auto").factory == "Flat"
    monkeypatch.setattr(faiss_factory, "FLAT_TO", 299)
    index, queries = built(vectors(300, 0), "auto"), vectors(200, 1)
    assert index.factory == "IVF69,Flat"
    told = re.fullmatch(
        r"IVF69,Flat over 300 documents, 0 MiB, nprobe=(\d+), recall@10 (\d\.\d+) on 200 of them", index.about
    )
    assert told
    assert float(told[2]) >= 0.95
    found, expected = index.search(queries, 10)[1], brute_force(queries, vectors(300, 0), 10)[1]
    recall = np.mean([np.isin(row, best).mean() for row, best in zip(found, expected, strict=True)])
    assert recall > 0.85
    for memory, kind in ((2**40, "Flat"), (2**21, "SQ8"), (2**19, "PQ96")):
        monkeypatch.setattr(
            faiss_factory.os, "sysconf", lambda name, size=memory: size if name == "SC_PHYS_PAGES" else 1
        )
        assert faiss_factory._kind("auto", 1000, 768) == f"IVF126,{kind}"
