"""One process or several: start, wrap, reduce, gather, end. The rest of the engine does not know the difference."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mllm_factory import torchrun
from mllm_factory.errors import ConfigError, UserError, WorkerError, lost_worker, no_memory, one_line
from mllm_factory.interfaces import Backbone

T = TypeVar("T")
_PEER_LOST = re.compile("Connection (closed|reset)|Broken pipe|Timed out waiting|timeout caused pair closure")  # gloo


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


# ---------------------------------------------------------------- start and end


@contextmanager
def joined(device: str, timeout: float) -> Iterator[World]:
    """Join the processes that ``torchrun`` started, or be alone; leave at the end.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<n>``; several processes on cuda take one device each.
        timeout: seconds that a process waits for the others.

    Raises:
        ConfigError: no such device, or the processes do not find each other.
        UserError: another process failed, a loader worker was killed, or memory ran out.
    """
    world = _start(device, timeout)
    try:
        yield world
    except (RuntimeError, MemoryError) as error:
        told = _told(error, world)
        if told is None:
            raise
        raise told from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _told(error: Exception, world: World) -> UserError | None:
    """What to say of an error that comes from outside of the code; None for any other."""
    if world.size > 1 and (isinstance(error, dist.DistError) or _PEER_LOST.search(str(error))):
        cause = f"process {world.rank} stopped because another one did; the cause is in that one's output"
        return UserError(f"{cause} ({next(iter(str(error).splitlines()), '')})")
    if no_memory(error):
        return UserError(
            f"memory ran out ({one_line(error, 200)}); lower trainer.batch_size and raise trainer.accumulate by as much, lower "
            "trainer.eval_batch_size, or set trainer.gradient_checkpointing=true; mllm-factory check estimates what a step takes"
        )
    return WorkerError(error) if lost_worker(error) else None


def _start(device: str, timeout: float) -> World:
    _require_introduction()
    torchrun.end_with_it()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = _device(device, size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        return World(0, 1, chosen)
    try:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"WORLD_SIZE={size} announces {size} processes but they do not find each other "
            f"({next(iter(str(error).splitlines()), '')}); start them with torchrun, or unset WORLD_SIZE"
        ) from error
    if dist.get_world_size() != size:
        raise RuntimeError(f"{size} processes were announced but {dist.get_world_size()} joined")
    return World(dist.get_rank(), size, chosen)


def _require_introduction() -> None:
    """Refuse processes of ``srun`` that know nothing of each other: each would train a run of its own."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            f"srun started {tasks} processes that know nothing of each other; let it start torchrun, one task a machine "
            "(--ntasks-per-node=1), as scripts/train.sbatch does"
        )


def _device(name: str, size: int) -> torch.device:
    """The device of this process among ``size``."""
    available = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if available else "cpu"
    found = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", name)
    if found is None or (found[1] == "cpu" and found[2]):
        raise ConfigError(f"trainer.device: '{name}' is no device; use auto, cpu, cuda or cuda:<n>")
    if found[1] == "cpu":
        return torch.device("cpu")
    if size > 1 and found[2]:
        raise ConfigError(
            f"trainer.device: {size} processes cannot share {name}; use cuda, and each takes one of its own"
        )
    index = int(found[2] or os.environ.get("LOCAL_RANK", "0"))
    if index >= available:
        raise ConfigError(
            f"trainer.device: cuda:{index} was asked for but there are {available} cuda devices; use auto or cpu"
        )
    return torch.device("cuda", index)


# ---------------------------------------------------------------- models


def wrap(model: nn.Module, world: World, strategy: str) -> nn.Module:
    """The module to call in training, on its device: the model itself, DDP around it, or the model sharded in place (FSDP2)."""
    if world.size > 1 and strategy == "fsdp":
        return _shard(model, world)
    model.to(world.device)
    if world.size == 1:
        return model
    ids = [world.device] if world.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)


def _shard(model: nn.Module, world: World) -> nn.Module:
    """Each decoder layer by itself, all other weights together; moved to the device piece by piece."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(world.device.type, (world.size,))
    for backbone in [m for m in model.modules() if isinstance(m, Backbone)]:
        for layer in backbone.layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if not isinstance(model, FSDPModule):
        raise RuntimeError("the model was not sharded")
    register_fsdp_forward_method(model, "generate")
    return model


def reshard(model: nn.Module) -> None:
    """Of a sharded model, free the whole weights that a pass without backward leaves behind."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.reshard()


def unsynced(wrapped: nn.Module, last: bool) -> Any:
    """A context in which DDP keeps gradients to itself until the last forward pass of a step."""
    if last or not isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return wrapped.no_sync()


# ---------------------------------------------------------------- values; to be called in every process


def total(value: Tensor, world: World) -> Tensor:
    """The sum of a tensor over all processes; the tensor itself is not changed."""
    if world.size == 1:
        return value
    value = value.to(world.device, copy=True)
    dist.all_reduce(value)
    return value


def gather(value: Any, world: World) -> list[Any]:
    """Every process's value, by rank."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def lead(world: World, call: Callable[[], T]) -> T:
    """What the first process finds, in all of them. A user's error there is raised in all of them."""
    if world.size == 1:
        return call()
    found: list[Any] = [None]
    if world.leads:
        try:
            found = [call()]
        except UserError as error:
            found = [error]
    dist.broadcast_object_list(found, device=world.device)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


def sharded(tensors: Iterable[Tensor]) -> bool:
    """True if this process holds a piece only of one of them."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in tensors)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one; any other tensor as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_leader(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole tensors in the memory of the first process, one after the other; nothing in the others."""
    result = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if world.leads:
            result[name] = full.cpu().contiguous()
    return result


# ---------------------------------------------------------------- optimizer


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state by parameter name, whole, in the first process: the same however the model is spread."""
    return {name: on_leader(optimizer.state[p], world) for name, p in model.named_parameters() if p in optimizer.state}


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Continue from what ``optimizer_state`` gave. Rates, decay and betas stay as the optimizer was made."""
    names = {id(p): name for name, p in model.named_parameters()}
    order = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        i: {key: _like(value, p) for key, value in saved[names[id(p)]].items()}
        for i, p in enumerate(order)
        if names[id(p)] in saved
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """Spread a whole tensor like a parameter of its shape."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    place = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), *place, src_data_rank=None)
