"""Preparing a module to train: gradient checkpointing, compilation and FSDP2, in that order; sharded weights."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from rqa.runtime import distributed

log = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")


class WholePass(nn.Module):
    """A module that FSDP2 shards as one root: `forward` and `whole_passes` are full passes through its models."""

    whole_passes: tuple[str, ...] = ()


def parallelize(module: nn.Module, checkpointing: bool, compile: bool, shard: bool, dtype: torch.dtype) -> None:
    """Move a module to its device and prepare it for training; every process gets the main process's weights.

    `shard` divides parameters, gradients and optimizer state among the processes (FSDP2): parameters are gathered in
    `dtype`, gradients reduced in float32. Otherwise each process has all of them.
    """
    device = distributed.device()
    module.to(device)
    if device.type == "cuda" and dtype == torch.float32:
        log.warning("training computes in float32; --bf16 true is several times as fast")
    for model in module.modules():
        trained = isinstance(model, PreTrainedModel) and any(p.requires_grad for p in model.parameters())
        if checkpointing and trained and model.supports_gradient_checkpointing:
            newer = getattr(model, "activation_checkpointing_enable", None)  # its name after transformers 5.17
            (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
    for layer in _layers(module) if compile else []:  # all layers share one graph, compiled inside their sharding
        if any(parameter.requires_grad for parameter in layer.parameters()):
            layer.compile(dynamic=True)
    if distributed.world_size() > 1:
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.detach(), src=0)
        if shard:
            _shard(module, dtype)


def _shard(module: nn.Module, dtype: torch.dtype) -> None:
    """Shard each layer, then the rest of each model; models are roots because evaluation calls them by themselves."""
    half = dtype in (torch.bfloat16, torch.float16)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if half else MixedPrecisionPolicy()
    mesh = dist.init_device_mesh(distributed.device().type, (distributed.world_size(),))
    log.info("FSDP2: %d layers and the rest of the model, sharded over %d processes", len(_layers(module)), mesh.size())
    for part in [*_layers(module), *_roots(module)]:
        # The backward pass gathers parameters again, so that everything is sharded outside of forward and backward.
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        for name in part.whole_passes if isinstance(part, WholePass) else ():
            register_fsdp_forward_method(part, name)


def _roots(module: nn.Module) -> list[nn.Module]:
    """The models, and outside of them other modules with parameters of their own, such as a projection."""
    owns = any(True for _ in module.parameters(recurse=False))
    if isinstance(module, PreTrainedModel | WholePass) or owns:
        return [module]
    return [root for child in module.children() for root in _roots(child)]


def _layers(module: nn.Module) -> list[nn.Module]:
    """The repeated layers of encoders and decoders: the children of each outermost `ModuleList`."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [layer for child in module.children() for layer in _layers(child)]


def sum_gradients(weights: Iterable[nn.Parameter]) -> None:
    """Sum the gradients of unsharded weights over all processes, once a step; FSDP2 sums the sharded ones."""
    if distributed.world_size() == 1:
        return
    whole = [weight for weight in weights if not isinstance(weight, DTensor)]
    for weight in whole:  # every process takes part, even if its batches did not use a weight
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    for work in filter(None, [dist.all_reduce(weight.grad, async_op=True) for weight in whole]):
        work.wait()


def is_sharded(module: nn.Module) -> bool:
    """Whether a forward pass of this module needs all processes."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def in_step(module: nn.Module, batches: Sequence[T], filler: T) -> Iterator[T]:
    """Yield this process's batches, and for a sharded module fillers, until the process with the most is done.

    A sharded module's forward pass needs all processes; other modules get no fillers.
    """
    longest = max(distributed.total_by_rank(len(batches))) if is_sharded(module) else len(batches)
    yield from batches
    yield from (filler for _ in range(int(longest) - len(batches)))


def ahead(make: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """`map`, but a thread makes each result while the previous one is used."""
    with ThreadPoolExecutor(1) as thread:
        futures: Iterator[Any] = chain((thread.submit(make, item) for item in items), [None])
        for future, _ in pairwise(futures):  # submits the next one before it waits for this one
            yield future.result()


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Let `state_dict` of a sharded module and of its parts return whole tensors in CPU memory, inside the block.

    Every process enters; only the main process gets the tensors, one copy of them. Tied weights stay tied.
    """
    whole = {id(part): whole_on_main(part.detach()) for part in module.parameters() if isinstance(part, DTensor)}

    def replace(part: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name, parameter in part.named_parameters(recurse=False):
            if id(parameter) in whole and prefix + name in state:
                state[prefix + name] = whole[id(parameter)]

    handles = [part.register_state_dict_post_hook(replace) for part in module.modules()] if whole else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def assembled(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; if it is, every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_on_main(tensor: Tensor) -> Tensor:
    """The whole tensor in CPU memory of the main process, an empty one on the others; every process calls this."""
    whole = assembled(tensor)
    return whole.cpu() if distributed.is_main() else torch.empty(0)


def load_whole_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """`module.load_state_dict` with the main process's weights; of the other processes' only the shapes are used."""
    present = module.state_dict()
    module.load_state_dict({name: divided_like(present[name], value, source=0) for name, value in weights.items()})


def divided_like(like: Tensor, value: Tensor, source: int | None = None) -> Tensor:
    """A whole tensor on the device of `like` and, unless it is a scalar, sharded like it; the value is `source`'s."""
    value = value.to(like.device)
    if isinstance(like, DTensor) and value.ndim:
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=source)
    if source is not None and distributed.world_size() > 1:  # None: all processes have the same value
        dist.broadcast(value, src=source)
    return value
