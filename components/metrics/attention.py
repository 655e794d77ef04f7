"""Where the attention of the answers goes: shares of each group, and attention a token of media against text, by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mllm_factory import MODALITIES, PAD, Batch, ConfigError, DataError, Metric, MultimodalModel, Output, hint, register
from mllm_factory.components.metrics import lmar
from mllm_factory.components.metrics.attention_capture import AttentionStats, observe
from mllm_factory.components.metrics.attention_groups import GROUPS
from mllm_factory.components.metrics.attention_shown import shown as shown_rows

TEXTS = tuple(name for name in GROUPS if name not in MODALITIES)
"""Groups that may count as text."""

SHARE = "attention_share"

RATIOS: dict[str, Callable[[lmar.PerToken], dict[str, Tensor]]] = {
    "lmar": lambda parts: {"": lmar.lmar(parts)},
    "log_mdi": lambda parts: {"": lmar.log_mdi(parts)},
    "aei": lambda parts: dict(zip(("/text", "/media"), lmar.log_aei(parts), strict=True)),
}
"""What is read from attention a token: by the end of its key, [L, B]. AEI is kept as its logarithm."""


def chosen(option: str, given: Sequence[str] | str | None, known: Sequence[str]) -> tuple[str, ...]:
    """The names of an option, each once; None or ``all``: every known one.

    Raises:
        ValueError: an unknown name, or none.
    """
    if given is None or given == "all":
        return tuple(known)
    names = tuple(dict.fromkeys([given] if isinstance(given, str) else given))
    for name in names:
        if name not in known:
            raise ValueError(f"{option}: there is no '{name}'{hint(name, known)}")
    if not names:
        raise ValueError(f"{option}: the list is empty; choose from {', '.join(known)}")
    return names


@register("attention")
class Attention(Metric):
    """Attention of the rows that predict the answer tokens, teacher-forced, read in up to four ways from one forward.

    ``attention_share/<group>``: mass on system, user, vision, audio, answer and bos keys, mean over heads, rows, samples, in
    [0, 1]; they sum to 1 - ``null`` (learned sinks, a prefix) where all samples carry the same modalities. A medium's share is over the
    samples that carry it, the rest over the samples that carry any. Source: MoReS (arXiv 2412.12359), Figure 1.
    ``lmar/<modality>``: equation 2 of MoReS, the mean over samples of (attention a media token) / (attention a text token), in
    [0, inf). Chosen where the paper is silent: mean over heads and rows before the ratio; teacher-forced rows, the template's
    word before the answer first; text is ``text``, without BOS and answer.
    ``log_mdi/<modality>``: mean over samples of log (attention a text token / a media token), and the median; its negative
    is the logarithm of LMAR's geometric mean. ``aei/<modality>/text`` and ``/media``: part of the attention / part of the
    tokens, geometric mean, which follows from MDI (arXiv 2508.10552).

    Each has ``/layer_NN``, its mean over layers under the bare key, and ``/samples``; ratios also have ``/tokens`` and
    ``/text_tokens``, and all have ``/undefined``: (sample, layer) values left out, by reason of ``lmar.REASONS``. No
    value is made finite by a small constant.

    It cannot tell whether attention is *used*: a model whose picture features are all zero still attends to them. Ratios a
    token drift with the number of media tokens (see ``scale_slope``), so compare none across encoders, resolutions or tilings.
    A share that rises may be a sink, or text that lost. Read it beside a measure of what the answers lose without the picture.

    It runs the batch once more, with the backbone's own kernel, and keeps no attention map.

    Args:
        readings: ``attention_share``, ``lmar``, ``log_mdi``, ``aei``, a list of them, or ``all``.
        modalities: ``vision``, ``audio`` or both; None: every one the model has an encoder for.
        text: the groups that count as text in the ratios; None: ``system`` (with the template) and ``user``.
        heads: also report each head's share of the media, ``attention_share/vision/layer_03/head_05``.
        shown: samples with media, those of the first batches, of which each token's attention is kept in tables, to be drawn over the
            picture or the recording by a report.

    Attributes:
        records: a dict for each sample: ``id``, tokens of each group, and values by layer under the keys above.

    Raises:
        ValueError: an unknown reading, modality or group.
    """

    teacher_forced = True

    def __init__(
        self,
        readings: list[str] | str = "all",
        modalities: list[str] | None = None,
        text: list[str] | None = None,
        heads: bool = False,
        shown: int = 0,
    ) -> None:
        if shown < 0:
            raise ValueError(f"shown: {shown} samples cannot be shown; use 0 or more")
        self.readings = chosen("readings", readings, (SHARE, *RATIOS))
        if heads and SHARE not in self.readings:
            raise ValueError("heads: only attention_share is told by head; add it to readings or set heads: false")
        self.asked = None if modalities is None else chosen("modalities", modalities, tuple(MODALITIES))
        self.text = chosen("text", ["system", "user"] if text is None else text, TEXTS)
        self.heads, self.shown = heads, shown
        self.items: list[dict[str, Any]] = []  # rows of what is shown
        self.tokens: list[dict[str, Any]] = []
        self.modalities: tuple[str, ...] = self.asked or ()
        self.layers: tuple[int, ...] = ()
        self.records: list[dict[str, Any]] = []
        self.values: dict[str, list[Tensor]] = {}  # by key: [L] of each sample, NaN where undefined
        self.by_head: dict[str, list[Tensor]] = {}  # by key: [L, H] of each sample
        self.reasons: Counter[str] = Counter()

    def update(self, model: MultimodalModel, batch: Batch, output: Output) -> None:
        """Run the batch again under observation.

        Raises:
            ConfigError: the model has no encoder for a modality, or its attention cannot be observed.
        """
        self._require_encoders(model)
        if not bool((batch.role != PAD).any()):  # every sample was refused
            return
        left = self.shown - len({item["sample"] for item in self.items})
        with observe(model, keys=left > 0) as recorder:
            model(batch)
        stats = recorder.stats()
        self.add(stats, batch.ids)
        if stats.keys is not None:
            self._show(model, batch, output, stats, left)

    def add(self, stats: AttentionStats, ids: Sequence[str]) -> None:
        """Take in the statistics of some samples."""
        self.layers = stats.layers
        new = [
            {"id": name, "tokens": dict(zip(GROUPS, size, strict=True))}
            for name, size in zip(ids, stats.size.tolist(), strict=True)
        ]
        self.records += new
        if SHARE in self.readings:
            self._add_shares(stats, new)
        for modality in self.modalities:
            parts = lmar.per_token(stats, modality, self.text)
            for name in self.readings:
                for end, values in RATIOS[name](parts).items() if name in RATIOS else ():
                    self._add(f"{name}/{modality}{end}", values, new)
                if name in RATIOS:
                    self._add(f"{name}/{modality}/tokens", parts.n_media, new)
                    self._add(f"{name}/{modality}/text_tokens", parts.n_text, new)
                    undefined = next(iter(RATIOS[name](parts).values())).isnan()
                    self._count(f"{name}/{modality}", parts.reason[undefined])

    def _show(self, model: MultimodalModel, batch: Batch, output: Output, stats: AttentionStats, left: int) -> None:
        """Keep samples of this batch that carry media and have an answer, evenly spread, as neighbours have alike questions."""
        media = torch.cat([batch.media_row[name].cpu() for name in self.modalities]).bincount(minlength=len(batch.ids))
        rows = (media.bool() & stats.valid.any(1).cpu()).nonzero()[:, 0].tolist()
        for row in rows[:: max(1, len(rows) // left)][:left]:
            items, tokens = shown_rows(model, batch, output.logits, stats, row)
            self.items += items
            self.tokens += tokens

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """With ``shown``: ``shown``, a line an item with its picture, and ``shown_tokens``, a line a token with its attention."""
        return {"shown": self.items, "shown_tokens": self.tokens}

    def _require_encoders(self, model: MultimodalModel) -> None:
        """Settle which modalities are read."""
        for modality in self.asked or ():
            if modality not in model.tokens_per_item:
                raise ConfigError(
                    f"modalities: the model has no {modality} encoder; remove {modality} or choose {modality}=..."
                )
        self.modalities = self.asked or tuple(model.tokens_per_item)

    def _add_shares(self, stats: AttentionStats, new: list[dict[str, Any]]) -> None:
        share = lmar.shares(stats)  # [L, B, G]
        carried = stats.size > 0  # [B, G]
        media = [GROUPS.index(modality) for modality in MODALITIES]
        some = carried[:, media].any(1)
        answers = stats.valid.any(1)
        for g, group in enumerate(GROUPS):
            if group in MODALITIES and group not in self.modalities:
                continue
            enters = carried[:, g] if group in MODALITIES else some
            self._add(f"{SHARE}/{group}", share[..., g].masked_fill(~enters, torch.nan), new)
            if group in MODALITIES:
                told = torch.where(enters, 1 + lmar.REASONS.index("no_answer"), 1 + lmar.REASONS.index("no_media"))
                self._count(f"{SHARE}/{group}", told[~(enters & answers)].repeat(len(stats.layers)))
                if self.heads:
                    alone = lmar.head_shares(stats)[..., g].masked_fill(~enters, torch.nan)  # [L, H, B]
                    self.by_head.setdefault(f"{SHARE}/{group}", []).extend(alone.cpu().unbind(2))
        self._add(f"{SHARE}/null", (1 - share.sum(-1)).masked_fill(~some, torch.nan), new)

    def _add(self, key: str, values: Tensor, new: list[dict[str, Any]]) -> None:
        """Values [L, B] of the samples of ``new``."""
        for sample, value in zip(new, values.detach().cpu().unbind(1), strict=True):
            self.values.setdefault(key, []).append(value)
            sample[key] = value.tolist()

    def _count(self, key: str, codes: Tensor) -> None:
        for code, number in zip(*(t.tolist() for t in codes.unique(return_counts=True)), strict=True):
            self.reasons[f"{key}/undefined/{lmar.REASONS[code - 1]}"] += number
            self.reasons[f"{key}/undefined"] += number

    # ---------------------------------------------------------------- numbers

    def compute(self) -> dict[str, float]:
        """Every reading's keys, the chosen modalities' first.

        Raises:
            DataError: no sample carries a modality that was asked for by name.
        """
        if not self.records:
            return {reading: float("nan") for reading in self.readings}
        for modality in self.asked or ():
            if not any(record["tokens"][modality] for record in self.records):
                raise DataError(
                    f"modalities: no sample carries {modality}; evaluate on data that has it, or remove {modality}"
                )
        result: dict[str, float] = {}
        for reading in self.readings:
            for modality in self.modalities:
                result |= self._of_modality(reading, modality)
            if reading == SHARE:
                for group in (*TEXTS, "null"):
                    result |= self._layers(f"{SHARE}/{group}")
        return result

    def _of_modality(self, reading: str, modality: str) -> dict[str, float]:
        key = f"{reading}/{modality}"
        result: dict[str, float] = {}
        for end in ("/text", "/media") if reading == "aei" else ("",):
            result |= self._layers(key + end, exp=reading == "aei")
        if reading == "log_mdi":
            result[f"{key}/median"] = float(torch.stack(self.values[key]).nanmedian(0).values.nanmean())
        if reading in RATIOS:
            result |= {
                f"{key}/{n}": float(torch.stack(self.values[f"{key}/{n}"]).nanmean()) for n in ("tokens", "text_tokens")
            }
        for layer, row in zip(self.layers, self._heads(key), strict=False):
            result |= {f"{key}/layer_{layer:02d}/head_{h:02d}": value for h, value in enumerate(row)}
        counts = {name: float(n) for name, n in sorted(self.reasons.items()) if name.startswith(f"{key}/undefined")}
        return {**result, f"{key}/samples": self._defined(key), f"{key}/undefined": 0.0, **counts}

    def _layers(self, key: str, exp: bool = False) -> dict[str, float]:
        """Means over samples by layer, and their mean over layers (of what is defined); of logarithms where ``exp``."""
        means = torch.stack(self.values[key]).double().nanmean(0)
        means = means.exp() if exp else means
        by_layer = {f"{key}/layer_{n:02d}": float(value) for n, value in zip(self.layers, means, strict=True)}
        return {key: float(means.nanmean()), **by_layer}

    def _heads(self, key: str) -> list[list[float]]:
        values = self.by_head.get(key)
        heads: list[list[float]] = torch.stack(values).double().nanmean(0).tolist() if values else []
        return heads

    def _defined(self, key: str) -> float:
        """Samples with a value in some layer."""
        values = self.values.get(key, self.values.get(f"{key}/text", []))
        return float(sum(bool((~value.isnan()).any()) for value in values))
