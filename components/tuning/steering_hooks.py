"""How the maps get into a backbone: hooks on its decoder layers that live as long as the model.

A hook steers where ``MultimodalModel.batch`` says so, the batch in flight:

- no batch in flight, or none of the steered tokens in it: the hidden states pass as they are, the same tensor;
- fewer positions than the batch has (decoding with a cache): only the prompt was to be steered, and that is done;
- more of them (decoding without a cache): the prompt's positions are steered again, so both ways give the same;
- more rows (beams): every copy of a row is steered like the row.

Recomputation: the engine's and transformers' gradient checkpointing wrap a layer's ``forward``, so hooks stand outside and
run once. Where a wrapper of another kind runs them again in the backward pass, the positions of the last training batch are
taken; so there must be one backward for each forward.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from mllm_factory import Batch, DataError, MultimodalModel
from mllm_factory.components.tuning.positions import CODES, Places, Positions
from mllm_factory.components.tuning.steering import LowRankMap

PATIENCE = 16
"""Training batches without a steered token, from the first on, after which a run is refused: a window of length buckets."""


class Flight:
    """Finds the steered positions of the batch in flight: once for each batch, for all layers.

    A deep copy of the model gets a copy that looks at the copied model's batch. A copy of the backbone alone belongs to no
    model, so nothing is in flight for it.

    Args:
        model: whose ``batch`` is looked at; None: nothing is ever in flight.
        positions: what to select.
    """

    def __init__(self, model: MultimodalModel | None, positions: Positions) -> None:
        self.model, self.positions = model, positions
        self.batches, self.proven, self.learning = 0, False, False
        self.batch: weakref.ref[Batch] | None = None
        self.last: Places | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Flight:
        return Flight(memo.get(id(self.model)), self.positions)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "batch": None, "last": None}

    def places(self, hidden: Tensor, learning: bool) -> Tensor | None:
        """Indices into hidden states [B * T, D] given as [B, T, D], or None where nothing is to be done.

        While a graph is made and something learns, the answer for a batch without steered tokens is empty instead of None:
        every parameter then gets a gradient of zeros, and no process of several waits for one.

        Raises:
            DataError: no steered token in the first batches of a training run, or hidden states of another batch.
        """
        found = self._in_flight(learning)
        if found is None or hidden.shape[1] < found.size[1]:
            return None
        if found.rows.numel() == 0 and not (learning and torch.is_grad_enabled()):
            return None
        return found.flat(hidden.shape[0], hidden.shape[1])

    def _in_flight(self, learning: bool) -> Places | None:
        batch = None if self.model is None else self.model.batch
        if batch is None:
            return self.last if _in_backward() else None
        if self.last is None or self.batch is None or self.batch() is not batch or self.learning != learning:
            self.last, self.batch, self.learning = self.positions.places(batch, learning), weakref.ref(batch), learning
            if learning and not self.proven:
                self._prove(batch, self.last)
        return self.last

    def _prove(self, batch: Batch, places: Places) -> None:
        """Look whether a run has anything to steer, until it has."""
        self.batches += 1
        self.proven = places.rows.numel() > 0
        if not self.proven and self.batches >= PATIENCE:
            counts = ((batch.modality[batch.attention_mask] == code).sum().item() for code in CODES.values())
            seen = ", ".join(f"{name} {count}" for name, count in zip(CODES, counts, strict=True))
            raise DataError(
                f"positions: '{self.positions.text}' of {', '.join(self.positions.modalities)} selected nothing in the first "
                f"{PATIENCE} training batches (tokens in the last one: {seen}); steer what the data has, or train on other data"
            )


def _in_backward() -> bool:
    """True while autograd runs a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1


class Site:
    """One map at one layer. Its methods are the hooks; being methods, they are copied with the model."""

    def __init__(self, flight: Flight, change: LowRankMap) -> None:
        self.flight, self.change = flight, change

    def steer(self, hidden: Tensor) -> Tensor:
        """[B, T, D] -> the same tensor, or a new one in which the steered positions are changed."""
        places = self.flight.places(hidden, self.change.training)
        if places is None:
            return hidden
        flat = hidden.reshape(-1, hidden.shape[-1])
        return flat.index_copy(0, places, self.change(flat.index_select(0, places))).view(hidden.shape)

    def after(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook: the layer's output is [B, T, D], or a tuple that starts with it."""
        if isinstance(output, tuple):
            return (self.steer(output[0]), *output[1:])
        return self.steer(output)

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Forward pre-hook: the hidden states are the first argument, or named ``hidden_states``."""
        if args:
            return (self.steer(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.steer(kwargs["hidden_states"])}


def attach(layer: nn.Module, site: Site, placement: str) -> None:
    """Put a site's hook on a layer, after those that are there."""
    if placement == "block_output":
        layer.register_forward_hook(site.after)
    else:
        layer.register_forward_pre_hook(site.before, with_kwargs=True)


def detach(layer: nn.Module, flight: Flight) -> None:
    """Take the hooks of a flight's sites from a layer, and no others."""
    for table in (layer._forward_hooks, layer._forward_pre_hooks):
        for key, hook in list(table.items()):
            site = getattr(hook, "__self__", None)
            if isinstance(site, Site) and site.flight is flight:
                del table[key]
                layer._forward_pre_hooks_with_kwargs.pop(key, None)
