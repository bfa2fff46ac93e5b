"""The one-way street, the shape of the repository, and what a wheel contains."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STREET = ["data", "prompts", "packing", "models", "retrieval", "objectives", "training", "evaluation", "recipes"]
OPTIONAL = [
    "flash_attn",
    "peft",
    "wandb",
    "tensorboard",
    "trackio",
    "gguf",
    "sentence_transformers",
    "trl",
    "trafilatura",
    "pypdf",
]


def imports(path: Path) -> set[str]:
    """The modules of rqa that a file imports, below the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        found |= {name.split(".")[1] for name in names if name.startswith("rqa.")}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "rqa").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_its_left(path: Path) -> None:
    place = path.relative_to(ROOT / "rqa").parts[0].removesuffix(".py")
    allowed = {"runtime"} if place in ("runtime", "__init__") else {"runtime", *STREET[: STREET.index(place) + 1]}
    assert imports(path) <= allowed


def file_tree() -> str:
    """Every file of rqa and what it says of itself, as a list in Markdown."""
    lines = []
    for path in sorted((ROOT / "rqa").rglob("*.py")):
        says = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if path.name != "__init__.py":
            says = re.sub(r" \([^)]*\)", "", " ".join(says.split()))
            sentence = re.split(r"(?<=[.;])\s", says)[0].rstrip(";.")
            item = f"- `{path.relative_to(ROOT)}`: {sentence}"
            lines.append(textwrap.fill(item, 120, subsequent_indent="  ", break_on_hyphens=False))
    return "\n".join(lines)


def test_the_readme_names_every_file_with_its_own_words() -> None:
    assert file_tree() in (ROOT / "README.md").read_text(encoding="utf-8"), f"it should hold:\n{file_tree()}"


def test_no_executable_imports_another() -> None:
    for path in (ROOT / "bin").iterdir():
        assert not re.search(r"^(from|import) bin", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert path.stat().st_mode & 0o111, f"{path.name} has no run bit"


def test_torch_is_imported_before_faiss() -> None:
    """The other way round each has an OpenMP of its own, and searches take ten times as long (retrieval/index.py)."""
    paths = [*(ROOT / "rqa").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    texts = [path.read_text(encoding="utf-8") for path in paths]
    found = [text for text in texts if "\nimport faiss" in text]
    assert found
    assert all("\nimport torch" in text.partition("\nimport faiss")[0] for text in found)


def test_every_benchmark_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert importlib.import_module(path.stem).__doc__


def test_importing_rqa_loads_no_heavy_and_no_optional_package() -> None:
    code = f"import rqa, sys; print([m for m in {[*OPTIONAL, 'torch', 'transformers']!r} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_no_module_needs_an_optional_package_and_none_waits_for_a_slow_one() -> None:
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "rqa").rglob("*.py")]
    modules.remove("rqa.endpoint.client")  # imported when a server is asked
    code = f"""
import importlib, sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None
for name in {modules!r}:
    importlib.import_module(name)
print([name for name in ("openai", "nltk", "pandas") if name in sys.modules])
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_a_wheel_contains_every_package_and_executable(tmp_path: Path) -> None:
    source = tmp_path / "source"  # without what an earlier build left in the tree
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for path in [*(ROOT / "rqa").rglob("*.py"), *(ROOT / "rqa").rglob("*.html")]:
        assert str(path.relative_to(ROOT)) in names
    for path in (ROOT / "bin").iterdir():
        assert any(name.endswith(f"scripts/{path.name}") for name in names)
