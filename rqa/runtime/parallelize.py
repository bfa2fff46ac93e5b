"""How a module runs: gradient checkpointing, then compile, then data parallelism. Always in that order."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from rqa.runtime import distributed


def parallelize(module: nn.Module, device: torch.device, gradient_checkpointing: bool, compile: bool) -> nn.Module:
    """Move a module to its device and wrap it for training; its parameters stay those of `module`."""
    module.to(device)
    for model in module.modules():
        if gradient_checkpointing and isinstance(model, PreTrainedModel) and model.supports_gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
    if compile:
        module.compile(dynamic=True)
    if distributed.world_size() == 1:
        return module
    return DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)


@contextmanager
def gradient_sync(module: nn.Module, enabled: bool) -> Iterator[None]:
    """Exchange gradients in this backward pass, or only accumulate them."""
    if enabled or not isinstance(module, DistributedDataParallel):
        yield
    else:
        with module.no_sync():
            yield
