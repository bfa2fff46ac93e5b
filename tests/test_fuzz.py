"""Whatever a file or a command line holds: one line that names it, or a good value; never a traceback.

`--hypothesis-profile thorough` makes up a thousand inputs for each test instead of 25.
"""

import ast
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import Regression
from hypothesis import given
from hypothesis import strategies as st
from trainers import EXECUTABLES, flags_of, parsed, required
from transformers import set_seed

from rqa.data import Document, Example, read_examples, write_examples
from rqa.documents import read_documents, write_documents
from rqa.models.encoder import load_encoder
from rqa.models.loading import LoraArguments, load_causal_lm, load_tokenizer, train_adapters
from rqa.recipe.system import ReaderArguments, load_reader
from rqa.retrieval.faiss_index import FaissIndex
from rqa.retrieval.index import IndexArguments
from rqa.runtime.errors import UserError
from rqa.runtime.files import _sha256, damage
from rqa.runtime.flags import parse
from rqa.training.arguments import LoopArguments
from rqa.training.checkpoint import checkpoint_to_resume, load_checkpoint, save_checkpoint
from rqa.training.journal import RunState, resume_state
from rqa.training.optim import Optimization

ROOT = Path(__file__).parents[1]


def result(call: Callable[[], Any], *named: str) -> Any:
    """What a call returns; None if it refuses, in one line that names what it refuses."""
    try:
        return call()
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert not named or any(name in message for name in named), message
    return None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
CONTENT = st.text(max_size=9) | st.just("The \ud800 mark") | JSON
METADATA = JSON | st.fixed_dictionaries({}, optional={"source": JSON, "title": JSON})
DOCUMENT = st.fixed_dictionaries({"page_content": CONTENT}, optional={"metadata": METADATA, "fmt_content": CONTENT})
DOCUMENTS = st.lists(DOCUMENT, max_size=3) | JSON
TURN = st.fixed_dictionaries({"speaker": CONTENT, "message": CONTENT})
OPTIONAL = {"questions": st.lists(CONTENT, max_size=3) | JSON, "gold_answer": CONTENT, "gold_docs": DOCUMENTS,
            "other_answers": JSON, "hard_neg_docs": DOCUMENTS, "ctxs": DOCUMENTS,
            "chat_history": st.lists(TURN, max_size=2) | JSON}  # fmt: skip
EXAMPLE = st.fixed_dictionaries({"question": CONTENT}, optional=OPTIONAL)


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


def copied(source: Path, name: str) -> Path:
    target = source.with_name(name)
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(source, target)


def damaged(draw: st.DataObject, directory: Path) -> bool:
    """Change one of the files; whether it is another one now, and not the mark of completion."""
    path = draw.draw(st.sampled_from(sorted(directory.iterdir())))
    before = path.read_bytes()
    path.write_bytes(after := draw.draw(mutated(before) | st.binary(max_size=40)))
    return after != before and path.name != "COMPLETE"


PICKLED = pickle.dumps([{"page_content": "A harbour.", "metadata": {"source": "a", "title": "b"}}] * 2)


@given(data=lines(DOCUMENT) | st.binary(max_size=60), pickled=mutated(PICKLED) | st.binary(max_size=60))
def test_documents(data: bytes, pickled: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    for suffix, content in ((".jsonl", data), (".pkl", pickled)):
        path = tmp_path_factory.getbasetemp() / f"documents{suffix}"
        path.write_bytes(content)
        if documents := result(lambda path=path: read_documents(path), str(path)):
            assert all(isinstance(document, Document) for document in documents)
            again = path.with_name("again.jsonl")
            write_documents(again, documents)
            assert [*read_documents(again)] == [*documents] or any(d.metadata for d in documents)  # NaN is not itself


@given(data=lines(EXAMPLE) | st.binary(max_size=60), answers=st.booleans())
def test_examples(data: bytes, answers: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "examples.jsonl"
    path.write_bytes(data)
    examples = result(lambda: read_examples(path, answers), str(path))
    if examples:
        assert all(isinstance(e, Example) and e.question.strip() and (e.gold_answer or not answers) for e in examples)
        write_examples(path, examples)
        assert len(read_examples(path, answers)) == len(examples)


FOUR = [Document(str(number)) for number in range(4)]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "index"
    built = FaissIndex(FOUR, IndexArguments())
    built.replace(np.eye(4, dtype=np.float32))
    built.save(path)
    return path


@given(draw=st.data())
def test_a_damaged_index_is_not_loaded(draw: st.DataObject, index: Path) -> None:
    copy = copied(index, "copy")
    damaged(draw, copy)
    loaded = FaissIndex(FOUR, IndexArguments())
    found = result(lambda: loaded.load(copy))
    assert not found or loaded.search(np.eye(4, dtype=np.float32), 1)[1].tolist() == [[0], [1], [2], [3]]


def one_step(optimization: Optimization, step: int = 0) -> None:
    sum(weight.sum() for weight in optimization.trained.values()).backward()
    optimization.step(step, float(optimization.clip()))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first of two checkpoints of one run."""
    output, module = tmp_path_factory.mktemp("fuzz"), Regression()
    trained = Optimization(module, LoopArguments(output_dir=str(output)), 10)
    for step in (1, 2):
        one_step(trained, step - 1)
        save_checkpoint(output, module, trained, RunState(step=step, examples=8 * step))
    return output / "checkpoint-1"


@given(draw=st.data())
def test_a_damaged_checkpoint_is_passed_over(draw: st.DataObject, checkpoint: Path) -> None:
    output = copied(checkpoint.parent, "copy")
    newest = output / "checkpoint-2"
    told = damaged(draw, newest)
    arguments = LoopArguments(output_dir=str(output), resume_from_checkpoint="true")
    chosen = result(lambda: checkpoint_to_resume(arguments))
    assert chosen == (output / "checkpoint-1" if damage(newest) else newest)
    assert damage(newest) or not told
    named = LoopArguments(output_dir=str(output), resume_from_checkpoint=str(newest))
    assert bool(result(lambda: checkpoint_to_resume(named), str(newest))) == (damage(newest) is None)


NAMES = st.sampled_from([*RunState.__dataclass_fields__, "other"])
STATE = st.dictionaries(NAMES, JSON | st.integers(-2, 9), max_size=5)


@given(draw=st.data())
def test_a_checkpoint_whose_checksums_lie_is_refused_in_one_line(draw: st.DataObject, checkpoint: Path) -> None:
    copy = copied(checkpoint, "lying")
    name = draw.draw(st.sampled_from(["trainer_state.json", "training_state.pt"]))
    made_up = STATE.map(lambda state: json.dumps(state).encode())
    other = made_up if name.endswith("json") else st.binary(max_size=40)
    (copy / name).write_bytes(draw.draw(mutated((copy / name).read_bytes()) | other))
    sums = {path.name: _sha256(path) for path in copy.iterdir() if path.name != "COMPLETE"}
    (copy / "COMPLETE").write_text(json.dumps(sums))
    trained = Optimization(Regression(), LoopArguments(output_dir=str(copy)), 10)

    def resume() -> RunState:
        state = resume_state(copy, LoopArguments(output_dir=str(copy.parent), metric_for_best_model="loss"))
        load_checkpoint(copy, Regression(), trained, state, None)
        return state

    state = result(resume, str(copy))
    if state:
        assert state.step >= 0
        assert state.examples >= 0
        one_step(trained, state.step)


TELLING = ["true", "false", "no", "steps", "0", "1", "-1", "nan", "inf", "-0.5", "1e400", "9" * 30, ""]
VALUE = st.sampled_from(TELLING) | st.text(max_size=6) | st.integers().map(str) | st.floats().map(str)


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """An executable, and flags that are mostly its own."""
    name = draw(st.sampled_from(EXECUTABLES))
    flag = st.sampled_from([flag.name for flag in fields(flags_of(name)[0])]) | st.text(max_size=8)
    return name, draw(st.dictionaries(flag, st.lists(VALUE, max_size=2) | JSON, max_size=4))


@given(command=command_lines(), in_file=st.booleans(), other=JSON)
def test_command_lines_and_files_of_flags(
    command: tuple[str, dict[str, Any]], in_file: bool, other: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What is accepted is good enough to train with."""
    (name, values), path = command, tmp_path_factory.getbasetemp() / "flags.json"
    parts = {flag: value if isinstance(value, list) else [value] for flag, value in values.items()}
    told = (str(part) for flag, given in parts.items() for part in (f"--{flag}", *given))
    line = [part.replace("\0", "").encode("utf-8", "replace").decode() for part in told]  # as a command line can be
    path.write_text(json.dumps(dict.fromkeys(required(name), "x") | values))
    if "--help" not in line and "-h" not in line:
        flags = result(lambda: parse(*flags_of(name), [str(path)]) if in_file else parsed(name, line))
        if isinstance(flags, LoopArguments) and not flags.fp16 and flags.new_layers is None:
            set_seed(flags.seed)
            one_step(Optimization(Regression(), flags, 10))
    path.write_text(json.dumps(other))
    assert not result(lambda: parse(*flags_of("train_ctl"), [str(path)])), "it lacks what is required"


def altered(data: bytes) -> st.SearchStrategy[bytes]:
    """A JSON file with one value replaced by another, or with other bytes."""
    value = json.loads(data)
    places = [(at, key) for at, row in enumerate(value) for key in row] if isinstance(value, list) else list(value)

    def replaced(place: Any, new: Any) -> bytes:
        copy = json.loads(data)
        at, key = place if isinstance(place, tuple) else (None, place)
        (copy if at is None else copy[at])[key] = new
        return json.dumps(copy).encode()

    return (
        st.builds(replaced, st.sampled_from(places), JSON | VALUE)
        | mutated(data)
        | JSON.map(lambda v: json.dumps(v).encode())
    )


@pytest.fixture(scope="module")
def encoder_directory(encoder_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder as sentence-transformers saves it, with our settings beside."""
    path = tmp_path_factory.mktemp("fuzz") / "encoder"
    path.mkdir()
    load_encoder(encoder_path).save_pretrained(path)
    return path


LAYOUT = [
    "rqa_encoder.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
]


@given(draw=st.data(), ours=st.booleans())
def test_the_files_around_an_encoder(draw: st.DataObject, ours: bool, encoder_directory: Path) -> None:
    path = copied(encoder_directory, "copy")
    name = draw.draw(st.sampled_from(LAYOUT[:1] if ours else LAYOUT[1:]))
    if not ours:
        (path / LAYOUT[0]).unlink()
    (path / name).write_bytes(draw.draw(altered((path / name).read_bytes())))
    if encoder := result(lambda: load_encoder(str(path)), str(path)):
        assert np.isfinite(encoder.embed(encoder.tokenize_passages(["A harbour."]))).all()


@pytest.fixture(scope="module")
def reader_directory(lm_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter, and the generation settings that its base might bring."""
    path = tmp_path_factory.mktemp("fuzz") / "adapter"
    model = load_causal_lm(lm_path)
    train_adapters(model, LoraArguments(use_lora=True), lm_path)
    model.save_pretrained(path)
    load_tokenizer(lm_path).save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps(GENERATION))
    return path


GENERATION = {
    "suppress_tokens": [5],
    "max_time": 0.1,
    "num_beams": 4,
    "do_sample": True,
    "temperature": 0.5,
    "eos_token_id": 3,
}


@given(draw=st.data(), name=st.sampled_from(["adapter_config.json", "generation_config.json"]))
def test_adapters_and_generation_settings(draw: st.DataObject, name: str, reader_directory: Path) -> None:
    path = copied(reader_directory, "copy")
    (path / name).write_bytes(draw.draw(altered((path / name).read_bytes())))
    flags = ReaderArguments(max_new_tokens=2, max_seq_length=128)
    if reader := result(lambda: load_reader(str(path), flags), str(path)):
        assert len(reader.answer([Example("Where?")], [[]])) == 1


def test_nothing_that_is_read_may_execute_code() -> None:
    sources = [*(ROOT / "rqa").rglob("*.py"), *(path for path in (ROOT / "bin").iterdir() if path.is_file())]
    assert len(sources) > 40
    for path in sources:
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            where = f"{path}:{call.lineno}"
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "marshal.loads", "joblib.load"), where
            assert name != "torch.load" or given.get("weights_only") == "True", where
            assert "allow_pickle" not in given, where
            assert given.get("trust_remote_code") != "True", where
    assert LoopArguments(output_dir="out").trust_remote_code is False
