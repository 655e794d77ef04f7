"""One process or several: start, wrap, reduce, gather, end. The rest of the engine does not know the difference."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mllm_factory.errors import ConfigError
from mllm_factory.interfaces import Backbone


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """True in the one process that writes files and draws the progress bar."""
        return self.rank == 0


def start(device: str, timeout: float = 1800.0) -> World:
    """Join the processes that ``torchrun`` started, or be alone.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<n>``; several processes on cuda take one device each.
        timeout: seconds that a collective may wait for a peer.

    Raises:
        ConfigError: no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"trainer.device: '{device}' is no device; use auto, cpu, cuda or cuda:<n>") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"trainer.device: '{device}' was asked for but there is no cuda device; use auto or cpu")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1, chosen)
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
    if dist.get_world_size() != size:
        raise RuntimeError(f"{size} processes were announced but {dist.get_world_size()} joined")
    return World(dist.get_rank(), size, chosen)


def end() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(model: nn.Module, world: World, strategy: str) -> nn.Module:
    """The module to call in training: the model itself, DDP around it, or the model sharded in place (FSDP2)."""
    if world.size == 1:
        return model
    if strategy == "ddp":
        ids = [world.device] if world.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)
    return _shard(model, world)


def _shard(model: nn.Module, world: World) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for backbone in [m for m in model.modules() if isinstance(m, Backbone)]:
        for layer in backbone.layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if not isinstance(model, FSDPModule):
        raise RuntimeError("the model was not sharded")
    return model


def unsynced(wrapped: nn.Module, last: bool) -> Any:
    """A context in which DDP keeps gradients to itself until the last forward pass of a step."""
    if last or not isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return wrapped.no_sync()


def total(value: Tensor, world: World) -> Tensor:
    """The sum of a tensor over all processes."""
    if world.size > 1:
        dist.all_reduce(value)
    return value


def gather(value: Any, world: World) -> list[Any]:
    """Every process's value, by rank."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def agree(value: Any, world: World) -> Any:
    """The first process's value, in all of them."""
    return gather(value, world)[0]


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one; any other tensor as it is. To be called in every process."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _sharded(model: nn.Module) -> bool:
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for p in model.parameters())


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The whole optimizer state, gathered from all processes where it is sharded. To be called in every process."""
    if not _sharded(model):
        return optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Continue from what ``optimizer_state`` gave."""
    if not _sharded(model):
        optimizer.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, optimizer, state, options=options)
