"""What may import what, what `import rqa` offers, and what a wheel contains."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from functools import partial
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

import rqa

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "rqa").rglob("*.py"))
# From the top down: a file imports from its own folder and from those below, not from a neighbour.
LEVELS = [["recipe"], ["serving"], ["evaluation", "preparation"], ["endpoint"], ["objectives"],
          ["training", "retrieval"], ["models"], ["packing"], ["prompts"], ["documents"], ["data"],
          ["runtime"]]  # fmt: skip
OPTIONAL = ["flash_attn", "peft", "wandb", "tensorboard", "trackio", "gguf", "sentence_transformers", "trl",
            "trafilatura", "pypdf", "torchao", "pymilvus", "starlette", "uvicorn"]  # fmt: skip


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """The modules of rqa that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports by a relative name"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name.split(".")[0] == "rqa"}


def test_a_file_imports_only_from_its_own_folder_and_those_below() -> None:
    depth = {folder: number for number, level in enumerate(LEVELS) for folder in level}
    for name, path in MODULES.items():
        if name != "rqa":
            own = name.split(".")[1]
            for other in imports(path):
                place = other.split(".")[1]
                assert place == own or depth[place] > depth[own], f"{name} imports {other}"


def test_no_import_goes_round_in_a_circle_and_no_executable_imports_another() -> None:
    TopologicalSorter({name: imports(path) - {name} for name, path in MODULES.items()}).prepare()
    for path in (path for path in (ROOT / "bin").iterdir() if path.is_file()):
        assert imports(path) <= set(MODULES), path.name
        assert not re.search(r"^(from|import) bin", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert path.stat().st_mode & 0o111, f"{path.name} has no run bit"


def test_torch_is_imported_before_faiss() -> None:
    """The other way round each has an OpenMP of its own, and searches take ten times as long."""
    texts = [path.read_text(encoding="utf-8") for path in [*FILES, *(ROOT / "benchmarks").glob("*.py")]]
    found = [text for text in texts if "\nimport faiss" in text]
    assert found
    assert all("\nimport torch" in text.partition("\nimport faiss")[0] for text in found)


def test_every_benchmark_can_be_imported_without_its_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for peer in ("sentence_transformers", "trl", "datasets", "langchain_text_splitters", "semchunk"):
        monkeypatch.setitem(sys.modules, peer, None)
    for path in set((ROOT / "benchmarks").glob("*.py")) - {ROOT / "benchmarks/cuda.py"}:  # which hides from `import`
        assert importlib.import_module(path.stem).__doc__


def test_importing_rqa_is_quick_and_no_module_needs_an_optional_package_or_waits_for_a_slow_one() -> None:
    later = ("rqa.endpoint.client", "rqa.retrieval.milvus", "rqa.serving.app")  # imported for a server, or as one
    names = [name for name in MODULES if name not in later]
    code = f"""
import importlib, sys
import rqa
print([name for name in ("torch", "transformers") if name in sys.modules])
sys.modules.update(dict.fromkeys({OPTIONAL!r}))
for name in {names!r}:
    importlib.import_module(name)
print([name for name in ("openai", "nltk", "pandas", "matplotlib") if name in sys.modules])
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["[]", "[]"]


@pytest.fixture
def run_code(
    lm_path: str, encoder_path: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], dict[str, Any]]:
    """Run a user's code beside the files that it names, whatever models it names replaced by tiny ones."""
    for name, path in (("load_encoder", encoder_path), ("load_reader", lm_path)):
        place = importlib.import_module(rqa.SURFACE[name])
        tiny = partial(lambda load, path, _, *rest, **named: load(path, *rest, **named), getattr(place, name), path)
        monkeypatch.setattr(place, name, tiny)

    def run(code: str) -> dict[str, Any]:
        for name in re.findall(r'"([\w./]+\.jsonl)"', code):
            kind = next((kind for kind in ("train", "eval", "test") if kind in name), None)
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(data / (f"{kind}_w_qa.jsonl" if kind else "documents.jsonl"), tmp_path / name)
        monkeypatch.chdir(tmp_path)
        names: dict[str, Any] = {"rqa": rqa, "__name__": "example"}
        exec(compile(code, "example", "exec"), names)
        return names

    return run


def test_the_surface_is_at_most_ten_names_that_are_what_they_are_elsewhere() -> None:
    assert len(rqa.SURFACE) <= 10
    for name, place in rqa.SURFACE.items():
        assert getattr(rqa, name) is getattr(importlib.import_module(place), name)
    assert dir(rqa) == sorted(rqa.SURFACE)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = rqa.nothing


def test_the_readme_s_python_answers_a_question_and_trains_with_a_loss_of_one_s_own(
    run_code: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall("^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    (own,) = (block for block in blocks if "def forward(" in block)
    assert readme.index("Your own algorithm") < readme.index(own)
    for block in [textwrap.dedent("\n".join(re.findall("^    .*", rqa.__doc__, re.MULTILINE))), *blocks]:
        names = run_code(block)
        if "rqa.answer(" in block:
            assert isinstance(names["text"], str)
            assert [type(passage) for passage in names["passages"]] == [rqa.Document] * 3
    assert list(tmp_path.rglob("trainer_state.json"))
    assert list(tmp_path.rglob("model.safetensors"))


@pytest.mark.slow
def test_a_wheel_contains_every_package_and_executable(tmp_path: Path) -> None:
    source = tmp_path / "source"  # without what an earlier build left in the tree
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*pip, "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for path in [*FILES, *(ROOT / "rqa").rglob("*.html")]:
        assert str(path.relative_to(ROOT)) in names
    for path in (path for path in (ROOT / "bin").iterdir() if path.is_file()):
        assert any(name.endswith(f"scripts/{path.name}") for name in names)
