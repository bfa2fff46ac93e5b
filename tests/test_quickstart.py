"""The quickstart with tiny models in place of the pretrained ones; its commands run as they do for a user."""

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest
from pydocs.wheels import MINILM


@pytest.fixture
def quickstart(lm_path: str, encoder_path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = str(Path(__file__).parents[1] / "bin" / "quickstart")
    module = module_from_spec(spec_from_loader("quickstart", SourceFileLoader("quickstart", path)))
    module.__spec__.loader.exec_module(module)
    module.fetch_model = lambda wheel: Path(encoder_path if wheel is MINILM else lm_path)
    module.QUICKSTART = ("statistics", "textwrap", "shutil", "numpy.fft")
    module.TRAINING = {**module.TRAINING, "max_steps": 1}
    module.PROMPT = {**module.PROMPT, "max_new_tokens": 4}
    return module


def test_the_quickstart_trains_compares_and_answers(
    quickstart: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    quickstart.train_and_compare(tmp_path, max_test_examples=2)
    printed = capfd.readouterr().out
    commands = [line.split()[1] for line in printed.splitlines() if line.startswith("$ ")]
    assert commands == ["bin/build_index", "bin/evaluate_rqa", "bin/train_swr", "bin/evaluate_rqa"]
    for label in ("Recall@1", "Recall@4", "ROUGE-L", "F1", "exact match", "tokens a second", "question", "gold"):
        assert f"\n{label}" in printed
    quickstart.ask("What does fft return?", tmp_path)
    assert capfd.readouterr().out.count("\n[") + 1 == quickstart.PASSAGES


def test_asking_before_training_says_what_to_run_first(quickstart: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(quickstart.UserError, match="no trained model; run bin/quickstart first"):
        quickstart.ask("anything", tmp_path)
