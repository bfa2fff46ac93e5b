"""A served system with a tiny reader, over real sockets."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from openai_server import OpenAIServer, serving

from rqa.data import Document
from rqa.models.encoder import load_encoder
from rqa.models.reader import CausalLMReader
from rqa.preparation.feedback import Feedback
from rqa.recipe.system import ReaderArguments, load_reader
from rqa.retrieval.retriever import Retriever
from rqa.serving.app import Api, App
from rqa.serving.engine import Engine


@pytest.fixture
def reader(lm_path: str) -> Any:
    flags = ReaderArguments(max_seq_length=500, max_new_tokens=24, dtype="float32", chat_format="template")
    return load_reader(lm_path, flags)


@pytest.fixture
def api(reader: CausalLMReader, encoder_path: str, documents: list[Document], tmp_path: Path) -> Api:
    encoder = load_encoder(encoder_path)
    retriever = Retriever(encoder, documents).open()
    return Api(Engine(retriever, reader), Feedback(tmp_path / "feedback.jsonl", documents), 3, "tiny", "small", encoder)


@pytest.fixture
def remote(api: Api, server: OpenAIServer) -> Api:
    """The same with a reader behind another server, which says what a test wants."""
    api.engine.reader = load_reader(f"openai::{server.url}")
    return api


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Serve an application until the test ends; its URL."""
    with ExitStack() as stack:
        yield lambda app: stack.enter_context(serving(app))


@pytest.fixture
def url(api: Api, serve: Callable[..., str]) -> str:
    return serve(App(api.routes(), api.engine.metrics))
