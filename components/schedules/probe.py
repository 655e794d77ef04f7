"""How far each component's own step moves the model's answers: the two distances in CoMMIT's kappa (arXiv 2407.20454, eq. 3).

    d_c = d[ model(theta_t), model(theta_t but component c at theta_t+1) ]

Distributions are taken at the answer tokens, in float32 with dropout off whatever the training precision: one step moves
them so little that bfloat16 rounding would drown it and pull kappa to 1. Nothing that training sees is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm_factory import IGNORE_INDEX, Batch, ConfigError, MultimodalModel, TrainState, total, untouched
from mllm_factory.components.schedules.balance import Component
from mllm_factory.components.schedules.balance_turns import require_whole
from mllm_factory.components.schedules.distances import distance, sample_sum


@dataclass
class Seen:
    """One batch as the model at theta_t sees it: logits [N, V], and by modality what encoders and projectors gave."""

    batch: Batch
    logits: Tensor
    encoded: dict[str, Tensor]
    features: dict[str, Tensor]


@dataclass
class _Caught:
    """What hooks take from a training forward."""

    encoded: dict[str, Tensor] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    exact: bool = True


@contextmanager
def probing(model: MultimodalModel) -> Iterator[None]:
    """Eval mode, float32, untouched random generators; every module's mode is as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    model.eval()
    try:
        with untouched(device), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def held(params: Sequence[nn.Parameter]) -> list[Tensor]:
    """The values themselves, to be shown again after others."""
    return [p.data for p in params]


def show(params: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Let parameters stand for other tensors; nothing is copied."""
    for p, value in zip(params, values, strict=True):
        p.data = value


def copies(params: Sequence[nn.Parameter]) -> list[Tensor]:
    """Clones of the values."""
    return [p.detach().clone() for p in params]


class Probe:
    """Measures distances of a model's components.

    The distribution at theta_t costs nothing where the training forward is the one wanted (float32, no dropout): hooks catch
    its logits and features. That is checked once against a forward of its own; where they differ in one bit, the
    distribution is computed again at every measurement.

    Args:
        model: whose answers are compared.
        components: a partition of its trainable parameters, the LLM's last.
        kind: key of ``DISTANCES``.
        every_batch: probe all batches of a step, instead of the last.

    Raises:
        ConfigError: weights in half precision or sharded ones.
    """

    def __init__(self, model: MultimodalModel, components: Sequence[Component], kind: str, every_batch: bool) -> None:
        _require_float32(model)
        require_whole(model.parameters())
        self.model, self.components, self.kind, self.every_batch = model, list(components), kind, every_batch
        self.params = [p for component in components for p in component.params]
        self.listening, self.free = False, None  # type: bool, bool | None
        self.caught: list[_Caught] = []
        self._catch(model)

    # ---------------------------------------------------------------- theta_t

    def _catch(self, model: MultimodalModel) -> None:
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(self._after)
        for name in model.encoders:
            model.encoders[name].register_forward_hook(self._keep("encoded", name))
            model.projectors[name].register_forward_hook(self._keep("features", name))

    def _before(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not (self.listening and torch.is_grad_enabled()):
            return None
        device = next(self.model.parameters()).device.type
        self.caught = [*(self.caught if self.every_batch else ()), _Caught(exact=not torch.is_autocast_enabled(device))]
        return args, {**kwargs, "logits": True}

    def _after(self, _model: nn.Module, _args: Any, output: Any) -> None:
        if self.listening and torch.is_grad_enabled():
            self.caught[-1].logits = output.logits.detach()

    def _keep(self, what: str, name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            if self.listening and self.caught:
                getattr(self.caught[-1], what)[name] = output.detach()

        return hook

    def reference(self, state: TrainState) -> list[Seen]:
        """The step's batches as the model sees them now; to be called before its weights change."""
        caught, self.caught, self.listening = self.caught, [], False
        batches = state.batches if self.every_batch else state.batches[-1:]
        placed = [batch.to(state.world.device) for batch in batches]
        usable = self.free is not False and len(caught) == len(placed) and all(c.exact for c in caught)
        if not usable or self.free is None:
            seen = self.look(placed)
            if usable:
                self.free = all(
                    torch.equal(c.logits, s.logits) for c, s in zip(caught, seen, strict=True) if c.logits is not None
                )
            return seen
        pairs = zip(placed, caught, strict=True)
        return [Seen(batch, c.logits, *_of_items(batch, c)) for batch, c in pairs if c.logits is not None]

    def look(self, batches: Sequence[Batch]) -> list[Seen]:
        """Batches as the model sees them now, by a forward in eval mode."""
        with torch.no_grad(), probing(self.model):
            result = []
            for batch in batches:
                encoded = {name: self.model.encoders[name](items) for name, items in _filled(batch)}
                features = {name: self.model.projectors[name](value) for name, value in encoded.items()}
                result.append(Seen(batch, self._logits(batch, features), encoded, features))
            return result

    # ---------------------------------------------------------------- theta_t+1

    def distances(self, seen: Sequence[Seen], old: Sequence[Tensor], state: TrainState) -> list[float]:
        """d_c of each component; the parameters hold theta_t+1 and ``old`` theta_t."""
        new = held(self.params)
        sums = []
        try:
            with torch.no_grad(), probing(self.model):
                for component in self.components:
                    self.only(component, old, new)
                    sums.append(torch.stack(self.sum(seen, [self.again(s, component) for s in seen])))
        finally:
            show(self.params, new)
        found = total(torch.stack(sums), state.world).tolist()
        return [d / count if count else float("nan") for d, count in found]

    def only(self, component: Component, old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
        """Show one component at ``new`` and all others at ``old``; the caller shows the model's own values again."""
        own = set(map(id, component.params))
        show(self.params, [n if id(p) in own else o for p, o, n in zip(self.params, old, new, strict=True)])

    def again(self, seen: Seen, component: Component) -> Tensor:
        """Logits [N, V] with the present parameters, encoding again only what the component changes."""
        features = dict(seen.features)
        for name, items in _filled(seen.batch):
            encoder, projector = self.model.encoders[name], self.model.projectors[name]
            moved = name in component.parts and any(p.requires_grad for p in encoder.parameters())
            part = "projector" if name == "vision" else f"{name}_projector"
            if moved or part in component.parts:
                features[name] = projector(encoder(items) if moved else seen.encoded[name])
        return self._logits(seen.batch, features)

    def sum(self, seen: Sequence[Seen], after: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Sum over this process's samples of the mean distance of their answer tokens, and the number of samples."""
        pairs = []
        for s, logits in zip(seen, after, strict=True):
            row = answer_rows(s.batch)
            pairs.append(sample_sum(distance(self.kind, s.logits.detach(), logits), row, len(s.batch.labels)))
        return torch.stack([d for d, _ in pairs]).sum(), torch.stack([n for _, n in pairs]).sum()

    def _logits(self, batch: Batch, features: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = self.model(batch, logits=True, features=features).logits
        return logits


def answer_rows(batch: Batch) -> Tensor:
    """[N] int64, the sample of each position that predicts a label, in the order of the model's logits."""
    keep = F.pad(batch.labels[:, 1:] != IGNORE_INDEX, (0, 1))  # [B, T]
    return keep.nonzero()[:, 0]


def _of_items(batch: Batch, caught: _Caught) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Without what a batch that has no item of a modality sends through its path."""
    names = [name for name, _ in _filled(batch)]
    return {name: caught.encoded[name] for name in names}, {name: caught.features[name] for name in names}


def _filled(batch: Batch) -> list[tuple[str, Tensor]]:
    return [(name, items) for name, items in batch.media.items() if len(items)]


def _require_float32(model: MultimodalModel) -> None:
    half = {
        str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)
    }
    if half:
        raise ConfigError(
            f"schedule: weights are {', '.join(sorted(half))}, whose rounding hides what one step changes; "
            "set backbone.dtype=float32 (trainer.precision=bf16 may stay)"
        )
