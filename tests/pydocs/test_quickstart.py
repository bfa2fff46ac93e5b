"""The quickstart with tiny models in place of the pretrained ones; its commands run as they do for a user."""

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydocs import corpus, wheels
from trainers import parsed

from rqa.runtime.errors import UserError

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
