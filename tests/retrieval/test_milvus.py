"""The Milvus index beside brute force: by `milvus-lite`, in this process and as a server that dies; what it refuses."""

import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import pymilvus
import pytest
from milvus_lite.server_manager import server_manager_instance

from rqa.data import Document
from rqa.documents import passages_of
from rqa.models.encoder import Encoder
from rqa.retrieval import milvus
from rqa.retrieval.hybrid import HybridRetriever, LexicalRetriever
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.milvus import MilvusIndex
from rqa.retrieval.retriever import Retriever
from rqa.runtime import distributed
from rqa.runtime.errors import UserError

RNG = np.random.default_rng(0)
VECTORS, QUERIES = RNG.normal(size=(60, 8)).astype(np.float32), RNG.normal(size=(9, 8)).astype(np.float32)
FIELDS = [{"source": f"s{n % 3}", "year": 2000 + n} | ({"lang": "en"} if n % 2 else {}) for n in range(60)]
PASSAGES = [Document(f"text {n}", fields) for n, fields in enumerate(FIELDS)]


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    yield f"milvus::{tmp_path}/a.db/wiki"
    server_manager_instance.release_server(f"{tmp_path}/a.db")


def opened(path: str, documents: list[Document] = PASSAGES, **flags: object) -> MilvusIndex:
    index = MilvusIndex(documents, IndexArguments(index_path=path, **flags), path)
    index.load()
    return index


def build(
    path: str, documents: list[Document], stamp: str, update: bool = False, sign: int = 1, **flags: object
) -> MilvusIndex:
    """As `Retriever` does."""
    index, own = opened(path, documents, **{"rebuild": not update} | flags), passages_of(documents)
    held = index.build(f"encoder{sign}", 8, update)
    index.remove(held[~np.isin(held, own)])
    missing = np.flatnonzero(~np.isin(own, held))
    index.add(missing, sign * VECTORS[[PASSAGES.index(documents[number]) for number in missing]])
    index.swap(stamp, "float32")
    return index


def check(index: MilvusIndex, wanted: Callable[[Document], bool] = bool, sign: int = 1, k: int = 7) -> None:
    """The k best of those documents, by brute force."""
    scores = sign * QUERIES @ VECTORS[[PASSAGES.index(document) for document in index.documents]].T
    scores[:, [not wanted(document) for document in index.documents]] = -np.inf
    scores = np.pad(scores, [(0, 0), (0, k)], constant_values=-np.inf)
    found, numbers = index.search(QUERIES, k)
    expected, best = np.argsort(-scores, axis=1)[:, :k], -np.sort(-scores, axis=1)[:, :k]
    np.testing.assert_array_equal(numbers, np.where(np.isinf(best), -1, expected))
    np.testing.assert_allclose(found, best, rtol=1e-5)


@pytest.mark.parametrize(
    ("factory", "parameters"), [("auto", ""), ("HNSW16", "efSearch=200"), ("IVF4,Flat", "nprobe=60")]
)
def test_what_this_database_holds_is_ranked_by_inner_product_and_filtered(
    factory: str, parameters: str, path: str
) -> None:
    build(path, PASSAGES, "stamp", index_factory=factory, filter_fields=["lang", "year"])
    for documents in (PASSAGES, PASSAGES[::-1], PASSAGES[20:25]):  # of the last, 5 are found among 60
        index = opened(path, documents, index_search_parameters=parameters)
        assert (index.encoder, index.stamp, index.dtype) == ("encoder1", "stamp", "float32")
        check(index)
        assert index.search(QUERIES[:0], 3)[1].shape == (0, 3)
    wanted = opened(path, filter='lang == "en" and year > 2030 and source == "s1"', index_search_parameters=parameters)
    check(wanted, lambda d: "lang" in d.metadata and d.metadata["year"] > 2030 and d.metadata["source"] == "s1")


def test_an_interrupted_build_goes_on_and_nobody_sees_it_before_the_swap(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milvus, "ROWS", 7)
    monkeypatch.setattr(milvus, "MOST", 16)
    for sign, before in ((1, False), (-1, True)):
        half = opened(path, rebuild=True)
        assert not len(half.build(f"encoder{sign}", 8, False))
        half.add(np.arange(20), sign * VECTORS[:20])
        again = opened(path, rebuild=True)
        assert (again.stamp == "stamp1") == before
        assert set(again.build(f"encoder{sign}", 8, False).tolist()) == set(passages_of(PASSAGES)[:20].tolist())
        if before:
            check(reader := opened(path))
        check(build(path, PASSAGES, f"stamp{sign}", sign=sign), sign=sign)
    with pytest.raises(UserError, match="its collection was replaced or dropped while in use; start again"):
        reader.search(QUERIES, 3)
    assert len(opened(path)._client.list_collections()) == 1


@pytest.mark.parametrize("step", ["flush", "alter_collection_properties", "alter_alias", "drop_collection", "delete"])
@pytest.mark.parametrize("update", [True, False])
def test_wherever_a_swap_is_interrupted_the_index_is_one_or_the_other_and_can_be_finished(
    step: str, update: bool, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(path, PASSAGES[:50], "old")
    sign = 1 if update else -1
    with monkeypatch.context() as patch, suppress(ZeroDivisionError):
        patch.setattr(pymilvus.MilvusClient, step, lambda *_, **__: 1 // 0)
        build(path, PASSAGES[10:], "new", update, sign)
    if opened(path).stamp == "old":
        check(opened(path, PASSAGES[:50]))
    else:
        check(opened(path, PASSAGES[10:]), sign=sign)
    index = build(path, PASSAGES[10:], "new", update, sign)
    check(index, sign=sign)
    assert (len(index._held()), index.stamp) == (50, "new")


def test_a_retriever_over_milvus_finds_what_faiss_does_and_replaces_what_is_stale_only_when_asked(
    path: str, encoder: Encoder, documents: list[Document]
) -> None:
    questions = ["What does Arlen trade in?", "When was Brask founded?"]
    dense = Retriever(encoder, documents, IndexArguments(index_path=path)).open(path)
    flat = Retriever(encoder, documents).open()
    np.testing.assert_array_equal(dense.retrieve(questions, 5).ids, flat.retrieve(questions, 5).ids)
    both = [HybridRetriever(each, LexicalRetriever(documents)).retrieve(questions, 5).ids for each in (dense, flat)]
    np.testing.assert_array_equal(*both)
    for flags in ({"rebuild": True}, {"update": True}):
        documents = [*documents[1:], Document(f"Nothing to {flags}.", {"source": "new"})]
        with pytest.raises(UserError, match="add --update true if the encoder is the same, or --rebuild true"):
            Retriever(encoder, documents, IndexArguments(index_path=path)).open(path)
        found = (
            Retriever(encoder, documents, IndexArguments(index_path=path, **flags)).open(path).retrieve(questions, 5)
        )
        np.testing.assert_array_equal(found.ids, Retriever(encoder, documents).open().retrieve(questions, 5).ids)


def served(directory: Path, port: int) -> subprocess.Popen:
    line = [sys.executable, "-m", "milvus_lite", "server", "--data-dir", str(directory), "--host", "127.0.0.1"]
    process = subprocess.Popen([*line, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while socket.socket().connect_ex(("127.0.0.1", port)):
        time.sleep(0.1)
    return process


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_a_build_outlives_its_server(tmp_path: Path) -> None:
    path, server = f"milvus::http://127.0.0.1:{(port := free_port())}/wiki", served(tmp_path, port)
    try:
        index = opened(path)
        index.build("encoder1", 8, False)
        index.add(np.arange(30), VECTORS)
        server.kill()
        server.wait()
        server = served(tmp_path, port)
        index.add(np.arange(30, 60), VECTORS[30:])
        index.swap("stamp", "float32")
        check(opened(path))
    finally:
        server.kill()
        server.wait()


def test_each_failure_of_a_server_is_one_line_without_credentials(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Unauthenticated(grpc.GenericRpcHandler):
        def service(self, _: object) -> grpc.RpcMethodHandler:
            refuse = lambda _, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "auth check failure")  # noqa: E731
            return grpc.unary_unary_rpc_method_handler(refuse)

    monkeypatch.setattr(milvus, "CONNECT", 1)
    server, silent = grpc.server(ThreadPoolExecutor(1), [Unauthenticated()]), socket.create_server(("127.0.0.1", 0))
    ports = free_port(), silent.getsockname()[1], server.add_insecure_port("127.0.0.1:0")
    server.start()
    places = [f"milvus::http://me:secret@127.0.0.1:{port}/wiki" for port in ports]
    (tmp_path / "text.db").write_text("a file")
    index, start = build(path, PASSAGES, "stamp", filter_fields=["year"]), time.time()
    others = path.replace("wiki", "o")
    index._client.create_collection("o", 8)
    index.build("encoder1", 8, True)
    for failing, told in [
        *(
            (partial(opened, f"milvus::{place}"), "write milvus::")
            for place in ("o", "http://me:secret@h:1", "a.db/a-b")
        ),
        (partial(opened, places[0]), "no Milvus server answers there"),
        (partial(opened, places[1]), "does not answer in time"),
        (partial(opened, places[2]), "wrong credentials"),
        (partial(opened, f"milvus::{tmp_path}/text.db/wiki"), "cannot be opened"),
        (partial(opened, others), "rqa did not make"),
        (partial(opened, path, filter="year >"), "Milvus refuses it .*expression"),
        (partial(opened, path, filter='lang == "en"'), "matches no passage; filter by source or year"),
        (lambda: index.add(np.arange(2), QUERIES[:2, :5]), "Milvus refuses it .*dim 8, got 5"),
        (
            partial(build, others + "2", PASSAGES, "", index_factory="PQ8"),
            "Milvus has only auto, Flat, HNSW32, IVF4096,Flat",
        ),
    ]:
        with pytest.raises(UserError, match=rf"^--(index_path|filter|index_factory) .*{told}.*\Z") as error:
            failing()
        assert "secret" not in str(error.value)
    assert time.time() - start < 30
    assert not opened(path, filter_fields=["lang"]).stamp  # stale: that field was not stored
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(UserError, match="milvus-lite serves one process"):
        opened(path)
    server.stop(0)
    silent.close()
    assert not re.search("Traceback|MilvusException", "".join(capfd.readouterr()))
