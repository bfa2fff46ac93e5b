"""A learned map of the pooled embedding into the space that is indexed, in the layout of `sentence-transformers`."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file

from rqa.runtime.errors import UserError, one_line

DENSE, LAYER_NORM = "2_Dense", "3_LayerNorm"


class Projection(nn.Module):
    """Linear map and LayerNorm (Izacard & Grave 2020, whose retriever ends so). [B, H] -> [B, D]"""

    def __init__(self, width: int, dimension: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, dimension)
        self.norm = nn.LayerNorm(dimension)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.norm(self.linear(pooled))

    def save_pretrained(self, directory: Path) -> None:
        """Save as the modules `Dense` and `LayerNorm` of `sentence-transformers`."""
        dimension, width = self.linear.weight.shape
        dense = {
            "in_features": width,
            "out_features": dimension,
            "bias": True,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
        parts: tuple[tuple[str, str, nn.Module, dict[str, Any]], ...] = (
            (DENSE, "linear", self.linear, dense),
            (LAYER_NORM, "norm", self.norm, {"dimension": dimension}),
        )
        for folder, name, part, config in parts:
            (directory / folder).mkdir(parents=True, exist_ok=True)
            weights = part.state_dict(prefix=f"{name}.")
            save_file(
                {key: value.contiguous() for key, value in weights.items()}, directory / folder / "model.safetensors"
            )
            (directory / folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_projection(path: str, width: int, dimension: int, subfolder: str = "") -> Projection:
    """What `save_pretrained` wrote, from a directory or a hub repository.

    Raises:
        UserError: its weights are missing or have other shapes.
    """
    projection = Projection(width, dimension)
    weights: dict[str, torch.Tensor] = {}
    try:
        for folder in (DENSE, LAYER_NORM):
            weights |= load_file(cached_file(path, str(Path(subfolder, folder, "model.safetensors"))))
        projection.load_state_dict(weights)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model {path}: the projection cannot be loaded: {one_line(error)}") from None
    return projection
