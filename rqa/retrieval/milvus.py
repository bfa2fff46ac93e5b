"""The index in Milvus: on a server or cluster, or in a file that `milvus-lite` opens for one process."""

import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pymilvus
from grpc import RpcError

from rqa.data import Document
from rqa.documents import PRINT, Places, Prints, passages_of
from rqa.retrieval.index import ENGINE, Index, IndexArguments
from rqa.retrieval.ranking import ranked
from rqa.runtime import distributed
from rqa.runtime.errors import UserError, one_line, without_credentials
from rqa.runtime.files import fingerprint

CONNECT, ANSWER, WORK = 10, 60, 3600  # timeouts in seconds: connection, reply (pymilvus retries), long work
SELDOM = {"grpc.keepalive_time_ms": 600_000}  # milvus-lite closes connections with pings every few seconds
ROWS = 2000  # rows per request: 32 MB with 4,096 dimensions; servers accept 64 MB
MOST = 2**14  # Milvus's limit on the hits of a question and the rows of a page
KINDS = {"auto": "AUTOINDEX", "Flat": "FLAT", "HNSW": "HNSW", "IVF": "IVF_FLAT"}
ADVICE = {
    "unauthenticated|auth check": "wrong credentials; set $MILVUS_TOKEN to user:password or to an API key",
    "fail connecting|unavailable": "no Milvus server answers there; start it, or give another address",
    "deadline_exceeded": "it does not answer in time; start again, and a build continues where it was",
    "open local milvus failed": "cannot be opened; its folder must exist, and only one process at a time can open it",
    "collection.*not (found|exist)": "its collection was replaced or dropped while in use; start again",
}


class MilvusIndex(Index):
    """A collection of passages by fingerprint, behind an alias; passages that the database lacks are not returned."""

    def __init__(self, documents: Sequence[Document], flags: IndexArguments, path: str) -> None:
        super().__init__(documents, flags, without_credentials(path))
        place, _, self.name = path.removeprefix(ENGINE).rpartition("/")
        if place.endswith(".db") and distributed.world_size() > 1:
            raise UserError(f"--index_path {path}: milvus-lite serves one process; give a server's URL")
        for name in ("pymilvus", "pymilvus.milvus_client", "milvus_lite", "grpc"):  # they log tracebacks
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        token = "" if "@" in place else os.environ.get("MILVUS_TOKEN", "")
        self._client = self._ask(pymilvus.MilvusClient, place, token=token, timeout=CONNECT, grpc_options=SELDOM)
        self._collection = self._building = ""  # the current one, and the one that `swap` will make current
        self._prints = passages_of(documents)
        self._places = Places(self._prints)
        self._fields = [name for name in flags.filter_fields if name != "source"]

    def load(self, directory: Any = None) -> bool:
        if not self._ask(self._client.has_collection, self.name):
            return False
        state = self._ask(self._client.describe_collection, self.name)["properties"]
        if state.get("rqa.alias") != self.name:
            raise UserError(f"--index_path {self.path}: holds a collection that rqa did not make; choose another name")
        self._collection, stored, wanted = state["rqa.name"], state["rqa.fields"].split(), self.flags.filter
        self._ask(self._client.load_collection, self._collection, timeout=WORK)
        if wanted and not self._ask(self._client.query, self._collection, wanted, limit=1, output_fields=["rqa_id"]):
            raise UserError(f"--filter {wanted}: matches no passage; filter by {' or '.join(['source', *stored])}")
        if set(self._fields) <= set(stored):  # without all fields it is stale
            self.encoder, self.stamp, self.dtype = (state[f"rqa.{name}"] for name in ("encoder", "stamp", "dtype"))
            self._fields, self.version, self.about = stored, self._collection + self.stamp, self._collection
        return True

    def _held(self) -> Prints:
        name, prints = self._building or self._collection, [np.empty(0, PRINT)]
        self._ask(self._client.load_collection, name, timeout=WORK)
        pages = self._ask(self._client.query_iterator, name, batch_size=MOST, output_fields=["rqa_id"])
        while page := self._ask(lambda timeout: pages.next()):
            prints.append(np.array([bytes.fromhex(row["rqa_id"]) for row in page], PRINT))
        return np.concatenate(prints)

    def build(self, encoder: str, dimension: int, update: bool) -> Prints:
        if self._collection and not update and not self.flags.rebuild:
            cures = "add --update true if the encoder is the same, or --rebuild true if nobody else uses it"
            raise UserError(f"--index_path {self.path}: was made from other documents, weights or fields; {cures}")
        factory, fields, self._gone = self.flags.index_factory, " ".join(self._fields), np.empty(0, PRINT)
        beside = fingerprint(self._collection, encoder, str(dimension), factory, fields)[:8]
        self._building = self._collection if update else f"{self.name}_{beside}"
        if distributed.is_main() and not self._ask(self._client.has_collection, self._building):
            if not (kind := re.fullmatch(r"(auto|Flat|HNSW(?=\d)|IVF(?=\d))(\d*)(,Flat)?", factory)):
                raise UserError(f"--index_factory {factory}: Milvus has only auto, Flat, HNSW32, IVF4096,Flat; use one")
            parameters = {"HNSW": {"M": kind[2], "efConstruction": 200}, "IVF": {"nlist": kind[2]}}.get(kind[1], {})
            schema, index = self._client.create_schema(enable_dynamic_field=True), self._client.prepare_index_params()
            schema.add_field("rqa_id", pymilvus.DataType.VARCHAR, is_primary=True, max_length=32)
            schema.add_field("rqa_vector", pymilvus.DataType.FLOAT_VECTOR, dim=dimension)
            schema.add_field("source", pymilvus.DataType.VARCHAR, max_length=65535)  # others are dynamic
            index.add_index("rqa_vector", index_type=KINDS[kind[1]], metric_type="IP", params=parameters)
            state = {"rqa.alias": self.name, "rqa.name": self._building, "rqa.encoder": encoder, "rqa.fields": fields}
            named = {"schema": schema, "index_params": index, "properties": state, "consistency_level": "Strong"}
            self._ask(self._client.create_collection, self._building, **named)
        distributed.barrier()
        return self._held()

    def add(self, numbers: np.ndarray, vectors: np.ndarray) -> None:
        for start in range(0, len(numbers), ROWS):
            rows = []
            for number, vector in zip(numbers[start : start + ROWS].tolist(), vectors[start:], strict=False):
                name, document = self._prints[number].ljust(16, b"\0").hex(), self.documents[number]
                row = {field: document.metadata[field] for field in self._fields if field in document.metadata}
                rows.append(row | {"rqa_id": name, "rqa_vector": vector, "source": document.key[0]})
            self._ask(self._client.upsert, self._building, rows)  # unlike `insert`, can be repeated

    def remove(self, passages: Prints) -> None:
        self._gone = passages  # deleted by `swap`, after their replacements can be found

    def swap(self, stamp: str, dtype: str) -> None:
        """A kill in between leaves a collection that holds all that its stamp says, and perhaps more."""
        client, former = self._client, self._collection
        if distributed.is_main():
            self._ask(client.flush, self._building, timeout=WORK)
            self._ask(client.alter_collection_properties, self._building, {"rqa.stamp": stamp, "rqa.dtype": dtype})
            if self._building != former:
                self._ask(client.alter_alias if former else client.create_alias, self._building, self.name)
                for name in self._ask(client.list_collections):  # the former one, and those of interrupted builds
                    ours = self._ask(client.describe_collection, name)["properties"].get("rqa.alias") == self.name
                    if ours and name != self._building:
                        self._ask(client.drop_collection, name)
            for start in range(0, len(self._gone), MOST):
                names = [each.ljust(16, b"\0").hex() for each in self._gone[start : start + MOST]]
                self._ask(client.delete, self._building, names)
        distributed.barrier()
        self.load()

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, numbers = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
        pairs = re.findall(r"(\w+)=(\d+)", self.flags.index_search_parameters.replace("efSearch", "ef"))
        options = {"search_params": {"params": {name: int(value) for name, value in pairs}}}
        options |= {"output_fields": ["rqa_id"], "filter": self.flags.filter or ""}
        left, limit = np.arange(len(queries)), min(k, MOST)
        while len(left):
            short = []  # queries with too few hits in the database
            for rows in np.array_split(left, -(-len(left) * limit // 2**16)):
                options |= {"data": list(queries[rows]), "limit": limit}
                for row, hits in zip(rows, self._ask(self._client.search, self._collection, **options), strict=True):
                    at = self._places(np.array([bytes.fromhex(name) for name in hits.ids], PRINT))
                    scores[row], numbers[row] = ranked(np.array([hits.distances]), at[None], k)
                    short += [row] if numbers[row, -1] < 0 and len(hits) == limit < MOST else []
            left, limit = np.array(short, int), min(4 * limit, MOST)
        return scores, numbers

    def _ask(self, request: Callable[..., Any], *given: Any, timeout: float = ANSWER, **named: Any) -> Any:
        try:
            return request(*given, timeout=timeout, **named)
        except (pymilvus.MilvusException, RpcError) as error:
            root: Any = error.__cause__ if isinstance(error.__cause__, RpcError) else error
            said = one_line(f"{root.code().name}: {root.details()}" if isinstance(root, RpcError) else root.message)
            cures = [cure for words, cure in ADVICE.items() if re.search(words, said, re.IGNORECASE)]
            raise UserError(f"--index_path {self.path}: {(cures or ['Milvus refuses it'])[0]} ({said})") from None
