"""The index against brute force; saved, loaded, damaged, refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from rqa.retrieval.index import Index, IndexArguments, refuse_foreign_directory
from rqa.runtime.errors import UserError


def vectors(count: int, seed: int, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def brute_force(queries: np.ndarray, embeddings: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Every inner product in float64, the k largest."""
    products = queries.astype(np.float64) @ embeddings.astype(np.float64).T
    ids = np.argsort(-products, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(products, ids, axis=1), ids


def built(embeddings: np.ndarray, factory: str = "Flat", parameters: str = "", stamp: str = "stamp") -> Index:
    index = Index(IndexArguments(factory, parameters))
    index.replace(embeddings, stamp)
    return index


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# ---------------------------------------------------------------- searching


@pytest.mark.parametrize("k", [1, 3, 50])
def test_searching_equals_brute_force_with_inner_products(k: int) -> None:
    embeddings, queries = vectors(50, 0) * np.linspace(0.1, 5, 50, dtype=np.float32)[:, None], vectors(9, 1)
    scores, ids = built(embeddings).search(queries, k)
    expected_scores, expected_ids = brute_force(queries, embeddings, k)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("factory", "parameters"), [("IVF4,Flat", "nprobe=4"), ("HNSW16", "efSearch=64")])
def test_other_factories_rank_by_inner_product_too(factory: str, parameters: str) -> None:
    embeddings, queries = vectors(200, 2) * np.linspace(0.1, 5, 200, dtype=np.float32)[:, None], vectors(9, 3)
    scores, ids = built(embeddings, factory, parameters).search(queries, 5)
    expected_scores, expected_ids = brute_force(queries, embeddings, 5)
    assert np.mean([len({*a} & {*b}) / 5 for a, b in zip(ids.tolist(), expected_ids.tolist(), strict=True)]) > 0.9
    np.testing.assert_allclose(scores[:, 0], expected_scores[:, 0], rtol=1e-4)


def test_search_parameters_decide_how_much_is_searched() -> None:
    embeddings, queries = vectors(400, 4), vectors(30, 5)
    _, expected = brute_force(queries, embeddings, 1)
    found = {n: built(embeddings, "IVF16,Flat", f"nprobe={n}").search(queries, 1)[1] for n in (1, 16)}
    assert (found[16] == expected).all()
    assert (found[1] != expected).any()


def test_more_documents_than_there_are_cannot_be_found() -> None:
    scores, ids = built(vectors(3, 6)).search(vectors(2, 7), 10)
    assert scores.shape == ids.shape == (2, 3)
    assert [sorted(row) for row in ids.tolist()] == [[0, 1, 2]] * 2


def test_no_queries_find_nothing() -> None:
    scores, ids = built(vectors(3, 6)).search(vectors(0, 7), 2)
    assert scores.shape == ids.shape == (0, 2)


def test_replacing_leaves_nothing_of_the_index_before() -> None:
    index = built(vectors(50, 0), stamp="old")
    fresh, queries = vectors(20, 8, width=5), vectors(4, 9, width=5)
    index.replace(fresh, "new")
    assert len(index) == 20
    assert index.stamp == "new"
    np.testing.assert_array_equal(index.search(queries, 20)[1], brute_force(queries, fresh, 20)[1])


def test_a_failed_replacement_leaves_the_index_before() -> None:
    embeddings, queries = vectors(100, 0), vectors(4, 1)
    index = built(embeddings, "IVF8,Flat", "nprobe=8", stamp="old")
    with pytest.raises(UserError):
        index.replace(vectors(3, 2), "new")
    assert (len(index), index.stamp) == (100, "old")
    np.testing.assert_array_equal(index.search(queries, 2)[1], brute_force(queries, embeddings, 2)[1])


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize("factory", ["Nonsense", "IVF,Flat", "HNSW32,,", "Flat,Flat,Flat"])
def test_an_unknown_factory_names_its_flag(factory: str) -> None:
    with pytest.raises(UserError) as caught:
        built(vectors(50, 0), factory)
    assert str(caught.value).startswith(f"--index_factory {factory}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("factory", ["IVF64,Flat", "PQ4x8"])
def test_too_few_documents_name_the_flag_and_their_number(factory: str) -> None:
    with pytest.raises(UserError, match=rf"^--index_factory {factory}: .*12 documents"):
        built(vectors(12, 0), factory)


@pytest.mark.parametrize(
    ("factory", "parameters"),
    [("Flat", "nprobe=4"), ("IVF4,Flat", "efSearch=3"), ("IVF4,Flat", "nprobe"), ("HNSW16", "nonsense=1")],
)
def test_a_bad_search_parameter_names_its_flag(factory: str, parameters: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        built(vectors(200, 0), factory, parameters)
    assert str(caught.value).startswith(f"--index_search_parameters {parameters}: ")
    assert "\n" not in str(caught.value)
    built(vectors(200, 0), factory).save(tmp_path / "index")
    with pytest.raises(UserError, match="--index_search_parameters"):
        Index(IndexArguments(factory, parameters)).load(tmp_path / "index")


# ---------------------------------------------------------------- on disk


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW16"])
def test_what_is_saved_is_loaded(factory: str, tmp_path: Path) -> None:
    embeddings, queries = vectors(200, 0), vectors(5, 1)
    index = built(embeddings, factory, stamp="the stamp")
    index.save(tmp_path / "deep" / "index")
    loaded = Index(IndexArguments(factory))
    assert loaded.load(tmp_path / "deep" / "index")
    assert (len(loaded), loaded.stamp) == (200, "the stamp")
    for ours, theirs in zip(loaded.search(queries, 7), index.search(queries, 7), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["index"]


def test_search_parameters_apply_to_a_loaded_index(tmp_path: Path) -> None:
    embeddings, queries = vectors(400, 4), vectors(30, 5)
    built(embeddings, "IVF16,Flat", "nprobe=1").save(tmp_path / "index")
    loaded = Index(IndexArguments("IVF16,Flat", "nprobe=16"))
    assert loaded.load(tmp_path / "index")
    np.testing.assert_array_equal(loaded.search(queries, 1)[1], brute_force(queries, embeddings, 1)[1])


def test_saving_replaces_an_index_and_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    for count, stamp in ((50, "old"), (20, "new")):
        built(vectors(count, count), stamp=stamp).save(tmp_path / "index")
    loaded = Index(IndexArguments())
    assert loaded.load(tmp_path / "index")
    assert (len(loaded), loaded.stamp) == (20, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["index"]


def damage(directory: Path, kind: str) -> None:
    state, index = directory / "index.json", directory / "index.faiss"
    if kind == "no mark":
        (directory / "COMPLETE").unlink()
    elif kind == "truncated":
        index.write_bytes(index.read_bytes()[: index.stat().st_size // 2])
    elif kind == "empty":
        index.write_bytes(b"")
    elif kind == "garbage":
        index.write_bytes(bytes(range(256)) * 8)
    elif kind == "no index":
        index.unlink()
    elif kind == "no state":
        state.unlink()
    elif kind == "broken state":
        state.write_text('{"stamp": ')
    elif kind == "state is no object":
        state.write_text("[]")
    elif kind == "state is not text":
        state.write_bytes(b"\xff\xfe")
    elif kind == "other number":
        state.write_text(json.dumps(json.loads(state.read_text()) | {"documents": 51}))
    elif kind == "absent":
        for entry in directory.iterdir():
            entry.unlink()
        directory.rmdir()


@pytest.mark.parametrize(
    "kind",
    [
        "absent",
        "no mark",
        "truncated",
        "empty",
        "garbage",
        "no index",
        "no state",
        "broken state",
        "state is no object",
        "state is not text",
        "other number",
    ],
)
def test_a_half_written_or_damaged_index_is_not_used(kind: str, tmp_path: Path) -> None:
    built(vectors(50, 0)).save(tmp_path / "index")
    damage(tmp_path / "index", kind)
    embeddings, queries = vectors(30, 1), vectors(3, 2)
    index = built(embeddings, stamp="before")
    assert index.load(tmp_path / "index") is False
    assert (len(index), index.stamp) == (30, "before")
    np.testing.assert_array_equal(index.search(queries, 3)[1], brute_force(queries, embeddings, 3)[1])


@pytest.mark.parametrize(
    "names",
    [
        ["notes.txt"],
        ["model.safetensors", "config.json"],
        ["index.faiss", "index.pkl"],
        ["index.json", "thesis.tex"],
        ["index.json", "index.html", "pictures/cat.jpg"],
        [".hidden"],
    ],
)
def test_a_directory_with_other_files_is_refused_and_untouched(names: list[str], tmp_path: Path) -> None:
    target = tmp_path / "precious"
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(f"{name} is mine")
    before = tree(tmp_path)
    with pytest.raises(UserError, match=f"{target}: holds something that is not an rqa index"):
        refuse_foreign_directory(target)
    with pytest.raises(UserError, match=str(target)):
        built(vectors(5, 0)).save(target)
    assert tree(tmp_path) == before


def test_a_file_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=str(tmp_path / "file")):
        built(vectors(5, 0)).save(tmp_path / "file")
    assert tree(tmp_path) == {"file": b"mine"}
