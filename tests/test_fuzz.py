"""Whatever a file or a command line holds: one line that names it, or a good value; never a traceback.

RQA_FUZZ_EXAMPLES sets how many inputs each test makes up.
"""

import ast
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import numpy as np
import pytest
from torch import nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rqa.data import Document, Example, read_documents, read_examples, write_documents, write_examples
from rqa.models.encoder import EncoderArguments
from rqa.retrieval.index import Index, IndexArguments
from rqa.runtime.errors import UserError
from rqa.runtime.files import _sha256, damage
from rqa.runtime.flags import parse
from rqa.training.arguments import LoopArguments
from rqa.training.checkpoint import checkpoint_to_resume, load_checkpoint, save_checkpoint
from rqa.training.journal import RunState, resume_state
from rqa.training.optim import Optimization

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
fuzz = settings(
    max_examples=int(os.environ.get("RQA_FUZZ_EXAMPLES", "100")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
tried = {"refused": 0, "accepted": 0}


@pytest.fixture(autouse=True, scope="module")
def _count(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nfuzz: {sum(tried.values())} inputs, {tried['refused']} refused in one line")


def result(call: Callable[[], Any], *named: str) -> Any:
    """What a call returns; None if it refuses, in one line that names what it refuses."""
    try:
        value = call()
    except UserError as error:
        message = str(error)
    else:
        tried["accepted"] += 1
        return value
    tried["refused"] += 1
    assert "\n" not in message
    assert not named or any(name in message for name in named), message
    return None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
CONTENT = st.text(max_size=9) | st.just("The \ud800 mark") | JSON
DOCUMENT = st.fixed_dictionaries({"page_content": CONTENT}, optional={"metadata": JSON | st.fixed_dictionaries(
    {}, optional={"source": JSON, "title": JSON}), "fmt_content": CONTENT})  # fmt: skip
DOCUMENTS = st.lists(DOCUMENT, max_size=3) | JSON
EXAMPLE = st.fixed_dictionaries(
    {"question": CONTENT},
    optional={
        "questions": st.lists(CONTENT, max_size=3) | JSON,
        "gold_answer": CONTENT,
        "gold_docs": DOCUMENTS,
        "hard_neg_docs": DOCUMENTS,
        "ctxs": DOCUMENTS,
        "chat_history": st.lists(st.fixed_dictionaries({"speaker": CONTENT, "message": CONTENT}), max_size=2) | JSON,
    },
)


def lines(rows: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """JSONL of these rows, and of things between that are none."""
    row = rows.map(lambda value: json.dumps(value).encode())
    return st.lists(row | row | row | st.binary(max_size=12), max_size=4).map(b"\n".join)


def mutated(data: bytes) -> st.SearchStrategy[bytes]:
    """The data with a few bytes replaced, cut out or put in."""
    edit = st.tuples(st.integers(0, len(data)), st.integers(0, 9), st.binary(max_size=6))

    def apply(edits: list[tuple[int, int, bytes]]) -> bytes:
        changed = data
        for start, length, new in edits:
            changed = changed[:start] + new + changed[start + length :]
        return changed

    return st.lists(edit, min_size=1, max_size=3).map(apply)


@given(data=lines(DOCUMENT) | st.binary(max_size=60))
@fuzz
def test_documents(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "documents.jsonl"
    path.write_bytes(data)
    documents = result(lambda: read_documents(path), str(path))
    if documents:
        write_documents(path, documents)
        assert read_documents(path) == documents or any(d.metadata for d in documents)  # NaN is not itself


@given(data=lines(EXAMPLE) | st.binary(max_size=60), answers=st.booleans())
@fuzz
def test_examples(data: bytes, answers: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "examples.jsonl"
    path.write_bytes(data)
    examples = result(lambda: read_examples(path, answers), str(path))
    if examples:
        assert all(isinstance(e, Example) and e.question.strip() and (e.gold_answer or not answers) for e in examples)
        write_examples(path, examples)
        assert len(read_examples(path, answers)) == len(examples)


PICKLED = pickle.dumps([{"page_content": "A harbour.", "metadata": {"source": "a", "title": "b"}}] * 2)


@given(data=mutated(PICKLED) | st.binary(max_size=60))
@fuzz
def test_pickles(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "documents.pkl"
    path.write_bytes(data)
    documents = result(lambda: read_documents(path), str(path))
    assert documents is None or all(isinstance(document, Document) for document in documents)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "index"
    built = Index(IndexArguments())
    built.replace(np.eye(4, dtype=np.float32), "stamp")
    built.save(path)
    return path


@given(draw=st.data())
@fuzz
def test_a_damaged_index_is_not_loaded(draw: st.DataObject, index: Path) -> None:
    copy = index.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(index, copy)
    name = draw.draw(st.sampled_from(sorted(path.name for path in copy.iterdir())))
    before = (copy / name).read_bytes()
    (copy / name).write_bytes(draw.draw(mutated(before) | st.binary(max_size=40)))
    loaded = Index(IndexArguments())
    found = result(lambda: loaded.load(copy))
    assert not found or loaded.search(np.eye(4, dtype=np.float32), 1)[1].tolist() == [[0], [1], [2], [3]]


class Saved(nn.Linear):
    def save_pretrained(self, directory: Path) -> None:
        torch.save(self.state_dict(), directory / "w.pt")


def optimization(module: nn.Module, arguments: LoopArguments) -> Optimization:
    return Optimization(module, arguments, 10, CPU)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first of two checkpoints of one run."""
    output, module = tmp_path_factory.mktemp("fuzz"), Saved(2, 2)
    trained = optimization(module, LoopArguments(output_dir=str(output)))
    for step in (1, 2):
        trained.backward(module(torch.ones(2)).sum())
        trained.step()
        save_checkpoint(output, module, trained, RunState(step=step, examples=8 * step, window={"loss": 1.0}))
    return output / "checkpoint-1"


@given(draw=st.data())
@fuzz
def test_a_damaged_checkpoint_is_passed_over(draw: st.DataObject, checkpoint: Path) -> None:
    output = checkpoint.parent.with_name("copy")
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(checkpoint.parent, output)
    newest = output / "checkpoint-2"
    name = draw.draw(st.sampled_from(sorted(path.name for path in newest.iterdir())))
    before = (newest / name).read_bytes()
    after = draw.draw(mutated(before) | st.binary(max_size=40))
    (newest / name).write_bytes(after)
    arguments = LoopArguments(output_dir=str(output), resume_from_checkpoint="true")
    chosen = result(lambda: checkpoint_to_resume(arguments))
    assert chosen == (output / "checkpoint-1" if damage(newest) else newest)
    assert damage(newest) or after == before or name == "COMPLETE"
    named = LoopArguments(output_dir=str(output), resume_from_checkpoint=str(newest))
    assert bool(result(lambda: checkpoint_to_resume(named), str(newest))) == (damage(newest) is None)


STATE = st.dictionaries(
    st.sampled_from([*RunState.__dataclass_fields__, "other"]), JSON | st.integers(-2, 9), max_size=5
)


@given(draw=st.data())
@fuzz
def test_a_checkpoint_whose_checksums_lie_is_refused_in_one_line(draw: st.DataObject, checkpoint: Path) -> None:
    copy = checkpoint.parent.with_name("lying")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkpoint, copy)
    name = draw.draw(st.sampled_from(["trainer_state.json", "training_state.pt"]))
    made_up = STATE.map(lambda state: json.dumps(state).encode())
    data = draw.draw(
        mutated((copy / name).read_bytes()) | (made_up if name.endswith("json") else st.binary(max_size=40))
    )
    (copy / name).write_bytes(data)
    sums = {path.name: _sha256(path) for path in copy.iterdir() if path.name != "COMPLETE"}
    (copy / "COMPLETE").write_text(json.dumps(sums))
    trained = optimization(Saved(2, 2), LoopArguments(output_dir=str(copy)))

    def resume() -> RunState:
        state = resume_state(copy, LoopArguments(output_dir=str(copy.parent), metric_for_best_model="loss"))
        load_checkpoint(copy, trained, state, None)
        return state

    state = result(resume, str(copy))
    if state:
        assert state.step >= 0
        assert state.examples >= 0
        trained.backward(next(iter(trained.trained)).sum())
        trained.step()


FLAGS = sorted({*LoopArguments.__dataclass_fields__, *EncoderArguments.__dataclass_fields__})
VALUE = (
    st.sampled_from(["true", "false", "no", "steps", "0", "1", "-1", "nan", "inf", "-0.5", "1e400", "9" * 30, ""])
    | st.text(max_size=6)
    | st.integers().map(str)
    | st.floats().map(str)
)
LINE = st.lists(st.tuples(st.sampled_from(FLAGS) | st.text(max_size=8), st.lists(VALUE, max_size=2)), max_size=4)


@given(flags=LINE)
@fuzz
def test_command_lines(flags: list[tuple[str, list[str]]]) -> None:
    line = ["--output_dir", "out", *(part for name, values in flags for part in (f"--{name}", *values))]
    if "--help" in line or "-h" in line:
        return
    _check(line)


@given(
    values=JSON
    | st.dictionaries(st.sampled_from(FLAGS), JSON | VALUE, max_size=4).map(lambda d: {"output_dir": "out"} | d)
)
@fuzz
def test_files_of_flags(values: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "flags.json"
    path.write_text(json.dumps(values))
    _check([str(path)])


def _check(line: list[str]) -> None:
    """What is accepted is good enough to train with."""
    parsed = result(lambda: parse((LoopArguments, EncoderArguments), "fuzz", line))
    if parsed:
        arguments = parsed[0]
        module = nn.Linear(2, 2)
        torch.manual_seed(arguments.seed)
        np.random.seed(arguments.seed)
        if not arguments.fp16:
            trained = optimization(module, arguments)
            trained.backward(module(torch.ones(2)).sum())
            trained.step()


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_that_is_read_may_execute_code() -> None:
    sources = [*(ROOT / "rqa").rglob("*.py"), *(path for path in (ROOT / "bin").iterdir() if path.is_file())]
    assert len(sources) > 40
    for path in sources:
        for name, call in calls(path):
            where = f"{path}:{call.lineno}"
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "marshal.loads", "joblib.load"), where
            assert name != "torch.load" or given.get("weights_only") == "True", where
            assert "allow_pickle" not in given, where
            assert given.get("trust_remote_code") != "True", where
    assert LoopArguments(output_dir="out").trust_remote_code is False
