"""Which heads' reading of the media moves the answer's first token, and which way: one forward and one backward."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from mllm_factory import (
    MODALITIES,
    PAD,
    Batch,
    ConfigError,
    DataError,
    Metric,
    MultimodalModel,
    Output,
    register,
)
from mllm_factory.components.metrics.attention import chosen
from mllm_factory.components.metrics.attention_routes import TEXT, Routes
from mllm_factory.components.metrics.counterfactual_passes import carried
from mllm_factory.components.metrics.interventions import digests, select
from mllm_factory.components.metrics.statistics import bootstrap, clusters, interval

REASONS = ("no_media", "no_answer")
"""Why a sample has no value: it carries no item of the modality; it has no answer token."""


@register("route_effect")
class RouteEffect(Metric):
    """First-order effect of each head's direct reading of each modality on l = log p(first answer token), teacher-forced.

    Before a layer's output projection a head's output at the row that predicts the token is the sum of what it reads from
    vision, audio and all other keys (``text``): O = sum_m O_m. With a gate on each part, O(g) = O + sum_m (g_m - 1) O_m,

        Delta_m = dl / dg_m at g = 1 = <dl / dO, O_m>     nats, of each sample, layer and head

    Source: 'Causal Route Gating' (ICML 2026), section 3, equations 1 to 3. ``route_effect/<route>``: sum |Delta_m| / sum over
    routes of sum |Delta_m|, sums over samples, layers and heads, in [0, 1], with an interval ``/low``, ``/high`` that resamples
    pictures; ``/layer_NN`` the same of one layer (a mean over heads of the paper's VRI would be noise where effects are near
    0). ``/signed``: mean over samples of the sum of Delta_m, any real number, above 0 where the route supports the reference
    answer; ``/signed/layer_NN``, and ``/signed/layer_NN/head_MM`` with ``heads``. ``/samples``, ``/undefined`` by reason of
    ``REASONS``. NaN where no route has any effect.

    With ``verify`` = n the n heads of each batch with the largest mean |Delta_m| are shut one by one:
    ``route_effect/<modality>/verify/sign``, the share of (sample, head) whose exact difference has the sign of Delta_m, and
    ``/verify/ratio``, the sum of exact differences over that of Delta_m; 1 where the score is linear in the route.

    It cannot tell indirect routes: what earlier layers moved from the picture into the words counts as text. Nor what the
    media's places hold: they also carry what they read from places before them. First order holds near g = 1; signs and late
    layers can be trusted more than sizes in early ones.

    Args:
        modalities: ``vision``, ``audio`` or both; None: every one the model has an encoder for.
        samples: how many to take; the rest of the data is passed over.
        heads: also report each head's signed effect.
        verify: how many heads of each batch to shut; a forward each.
        resamples: of the intervals.
        seed: of the resamples.

    Attributes:
        effects: of each sample taken, [L, H, M] Delta; NaN for the route of a medium that it lacks.

    Raises:
        ValueError: an option out of its range.
    """

    teacher_forced = True

    def __init__(
        self,
        modalities: list[str] | None = None,
        samples: int = 64,
        heads: bool = False,
        verify: int = 0,
        resamples: int = 2000,
        seed: int = 0,
    ) -> None:
        self.asked = None if modalities is None else chosen("modalities", modalities, tuple(MODALITIES))
        for name, value in {"samples": samples, "resamples": resamples}.items():
            if value < 1:
                raise ValueError(f"{name}: {value} measure nothing; use 1 or more")
        if verify < 0:
            raise ValueError(f"verify: {verify} heads cannot be shut; use 0 or more")
        self.most, self.heads, self.verify, self.resamples, self.seed = samples, heads, verify, resamples, seed
        self.modalities: tuple[str, ...] = self.asked or ()
        self.layers: list[int] = []
        self.effects: list[Tensor] = []
        self.shown: list[list[str]] = []
        self.ids: list[str] = []
        self.reasons: Counter[str] = Counter()
        self.pairs: dict[
            str, list[Tensor]
        ] = {}  # by modality: [2, ...] Delta and exact difference of heads that were shut

    # ---------------------------------------------------------------- batches

    def update(self, model: MultimodalModel, batch: Batch, output: Output) -> None:
        """One forward and one backward of the samples that are still wanted.

        Raises:
            ConfigError: the model has no encoder for a modality, is in training mode, or its attention cannot be observed.
        """
        self._require(model)
        rows = list(range(min(len(batch.ids), self.most - len(self.ids))))
        if not rows or not bool((batch.role != PAD).any()):
            return
        batch = select(batch, rows)
        there = torch.stack([carried(batch, name) for name in self.modalities], 1)  # [B, M - 1]
        routes = Routes(model, batch, self.modalities)
        answered = ~routes.logp.isnan().cpu()
        for m, name in enumerate(self.modalities):
            for reason, where in zip(REASONS, (~there[:, m], there[:, m] & ~answered), strict=True):
                self.reasons[f"{name}/{reason}"] += int(where.sum())
        carries = torch.cat([there, there.any(1, keepdim=True)], 1)
        self.layers = routes.layers or self.layers
        effects = routes.effects.cpu().masked_fill(~carries[:, None, None], torch.nan)  # [B, L, H, M]
        self._keep(batch, effects)
        if self.verify and effects.numel():
            self._verify(routes, effects)

    def _require(self, model: MultimodalModel) -> None:
        if model.training:
            raise ConfigError("route_effect: the model is in training mode, where dropout changes answers; call eval()")
        for name in self.asked or ():
            if name not in model.encoders:
                raise ConfigError(f"modalities: the model has no {name} encoder; remove {name} or choose {name}=...")
        self.modalities = self.asked or tuple(model.encoders)

    def _keep(self, batch: Batch, effects: Tensor) -> None:
        shown: list[list[str]] = [[] for _ in batch.ids]
        for name in batch.media:
            for things, more in zip(shown, digests(batch, name), strict=True):
                things += more
        self.ids += batch.ids
        self.shown += shown
        self.effects += list(effects.double())

    def _verify(self, routes: Routes, effects: Tensor) -> None:
        """Shut the heads that matter most to this batch."""
        for m, name in enumerate(self.modalities):
            sizes = effects[..., m].abs().nanmean(0).nan_to_num(-1.0)  # [L, H]
            for place in sizes.flatten().topk(min(self.verify, sizes.numel())).indices.tolist():
                layer, head = divmod(place, sizes.shape[1])
                pair = torch.stack([effects[:, layer, head, m], routes.exact(layer, head, m).cpu()])
                self.pairs.setdefault(name, []).append(pair[:, ~pair.isnan().any(0)])

    # ---------------------------------------------------------------- numbers

    def compute(self) -> dict[str, float]:
        """Every route's share with its interval, then by layer, signed, and what was verified.

        Raises:
            DataError: no sample carries a modality that was asked for by name.
        """
        for name in self.asked or ():
            if self.ids and self.reasons[f"{name}/no_media"] == len(self.ids):
                raise DataError(f"modalities: no sample carries {name}; evaluate on data that has it, or remove {name}")
        names = [*self.modalities, TEXT]
        measured = [one for one in self.effects if one.numel()]
        if not measured:
            return {f"route_effect/{name}": math.nan for name in names}
        effects = torch.stack(measured)  # [S, L, H, M]
        groups = clusters([self.shown[i] for i, one in enumerate(self.effects) if one.numel()])
        result: dict[str, float] = {}
        for m, name in enumerate(names):
            result |= self._shares(f"route_effect/{name}", effects, m, groups)
        for m, name in enumerate(names):
            result |= self._signed(f"route_effect/{name}/signed", effects[..., m])
        for name in self.modalities:
            result |= self._counts(name, effects[..., names.index(name)])
        return result

    def _shares(self, key: str, effects: Tensor, m: int, groups: Tensor) -> dict[str, float]:
        """sum |Delta_m| / sum |Delta|, over the samples that have the route."""
        there = ~effects[..., m].isnan()  # [S, L, H]
        own = effects[..., m].abs().where(there, torch.nan)
        whole = effects.abs().nansum(-1).where(there, torch.nan)
        sums = torch.stack([own.nansum((1, 2)), whole.nansum((1, 2))], 1)  # [S, 2]
        sums = sums.masked_fill(~there.any(-1).any(-1)[:, None], torch.nan)
        drawn = bootstrap(sums, groups, self.resamples, self.seed)
        low, high = interval(drawn[:, :1] / drawn[:, 1:])
        by_layer = own.nansum((0, 2)) / whole.nansum((0, 2))
        value = float(sums[:, 0].nansum() / sums[:, 1].nansum())
        ends = {f"{key}/low": float(low), f"{key}/high": float(high)}
        return {key: value, **ends, **self._by_layer(key, by_layer)}

    def _signed(self, key: str, effects: Tensor) -> dict[str, float]:
        """Means over samples of Delta [S, L, H]: of all heads together, of a layer's, of each one's."""
        mean = effects.nanmean(0)  # [L, H]
        layers = mean.nansum(1).where((~mean.isnan()).any(1), torch.nan)
        result = {key: float(layers.sum()), **self._by_layer(key, layers)}
        for layer, row in zip(self.layers, mean.tolist(), strict=True) if self.heads else ():
            result |= {f"{key}/layer_{layer:02d}/head_{h:02d}": value for h, value in enumerate(row)}
        return result

    def _by_layer(self, key: str, values: Tensor) -> dict[str, float]:
        return {f"{key}/layer_{n:02d}": value for n, value in zip(self.layers, values.tolist(), strict=True)}

    def _counts(self, name: str, effects: Tensor) -> dict[str, float]:
        """Samples and what was left out; and the heads that were shut."""
        key = f"route_effect/{name}"
        missing = {reason: self.reasons[f"{name}/{reason}"] for reason in REASONS}
        result = {f"{key}/samples": float((~effects.isnan()).flatten(1).any(1).sum())}
        result[f"{key}/undefined"] = float(sum(missing.values()))
        result |= {f"{key}/undefined/{reason}": float(n) for reason, n in missing.items() if n}
        if self.verify:
            first, exact = torch.cat([torch.zeros(2, 0), *self.pairs.get(name, [])], 1).double()
            result[f"{key}/verify/sign"] = float((first.sign() == exact.sign()).double().mean())
            result[f"{key}/verify/ratio"] = float(exact.sum() / first.sum())
        return result

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """``heads``: a line each with layer, head and, by route, mean Delta and mean |Delta| over samples."""
        measured = [one for one in self.effects if one.numel()]
        if not measured:
            return {"heads": []}
        effects = torch.stack(measured)
        mean, size = effects.nanmean(0), effects.abs().nanmean(0)  # [L, H, M]
        rows: list[dict[str, Any]] = []
        for place, layer in enumerate(self.layers):
            for head in range(mean.shape[1]):
                row: dict[str, Any] = {"layer": layer, "head": head}
                for m, name in enumerate([*self.modalities, TEXT]):
                    row |= {name: float(mean[place, head, m]), f"{name}/size": float(size[place, head, m])}
                rows.append(row)
        return {"heads": rows}
