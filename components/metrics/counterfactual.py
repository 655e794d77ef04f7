"""Whether the answers depend on what is seen and heard, and on the question: the same answers under changed inputs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mllm_factory import MODALITIES, PAD, Batch, ConfigError, DataError, Metric, MultimodalModel, Output, register
from mllm_factory.components.metrics.attention import chosen
from mllm_factory.components.metrics.counterfactual_passes import QUESTION, Passes, carried
from mllm_factory.components.metrics.counterfactual_scores import Scores, interactions, shapley
from mllm_factory.components.metrics.counterfactual_summary import Row, summary
from mllm_factory.components.metrics.interventions import STEPS, digests, question

GAIN = {"vision": "image_gain", "audio": "audio_gain"}
DIVERGENCE = {"vision": "js_image", "audio": "js_audio"}
REASONS = ("no_media", "no_partner", "no_answer")
"""Why a sample has no value: it carries no item of the modality; its batch allows no exchange; it has no answer token."""


@register("counterfactual")
class Counterfactual(Metric):
    """What the reference answers lose when a modality's content changes and all else stays: teacher-forced, exact, signed.

    Conditions: ``shuffle`` (default, no suffix), a derangement of the items between samples that show something else; ``blank``
    (mean pixel, silence); ``noise_<t>`` (VCD's diffusion, arXiv 2311.16922); ``drop``, item and positions gone, which changes
    the layout and so says nothing alone; and a question that asks nothing (``neutral`` repeated to the same length).

    Keys, for vision (audio: ``audio_gain``, ``js_audio``, ``.../audio``), each with an interval ``/low``, ``/high``:
    ``image_gain[/condition]``: (1/Y) sum_t [log p(y_t | all) - log p(y_t | changed)], nats an answer token (the turn's end
    token is one), any real number; below 0 the image hurts; ``/first`` of the first answer token, as later ones can read the
    image off the answer so far; ``/p`` of a sign-flip test. ``js_image[/condition]``: divergence of the two next-token
    distributions, [0, ln 2]; it cannot tell helpful from harmful. ``flip_rate/vision[/condition]``: samples whose likeliest
    token changes at any answer position. ``accuracy``: samples whose every answer token is the likeliest (greedy decoding
    would give the reference). ``blind_accuracy/vision/<condition>``, ``/question``, ``/everything`` (all blanked),
    ``/majority`` (always the commonest answer). ``multimodal_gain/vision``: MMStar's MG (arXiv 2403.20330, equation 1) with
    blank as without, in [-1, 1], and ``/drop``. ``perceptual_score/vision`` (arXiv 2110.14375): accuracy - accuracy under
    shuffle; ``/normalised`` / accuracy; ``/ceiling`` 1 - sum_c pi_c^2, which a model that only looks reaches at most by exchange.
    Both with ``/p``, McNemar's exact test. ``modality_shapley/<player>`` of v = mean log p, blank or neutral for who is absent,
    and ``/accuracy`` of v = accuracy; ``modality_shapley/share/<player>`` |phi| / sum |phi|; ``modality_shapley/total``;
    ``interaction/<a>+<b>``: above 0 synergy, below 0 redundancy; equal phi occur in both. ``noise_floor/gain``, ``/js``: what
    rounding does to the same input in another batch layout; smaller readings mean nothing.

    Counts: ``image_gain/samples``, ``/undefined`` by reason of ``REASONS``; ``clusters``. Intervals resample pictures
    (recordings), not questions, all keys on the same resamples; a share of 0 or 1 has Wilson's interval.

    It cannot tell why the model does not look, nor whether a partner's picture would have had the same answer.

    Args:
        modalities: ``vision``, ``audio`` or both; None: every one the model has an encoder for.
        shuffles: exchanges, averaged within a sample; with 2 or more, ``/draws_sd`` is the spread of the mean.
        noise: steps t of the diffusion, 0 ... 999; one condition each.
        drop: also ``drop``.
        shapley: also the Shapley values, from 2^players passes in all.
        neutral: the words that stand for a question.
        resamples: of intervals and sign-flip tests.
        seed: of exchanges, noise and resamples.

    Attributes:
        rows: per-sample values and what they belong to.

    Raises:
        ValueError: an option out of its range.
    """

    teacher_forced = True

    def __init__(
        self,
        modalities: list[str] | None = None,
        shuffles: int = 1,
        noise: list[int] | None = None,
        drop: bool = False,
        shapley: bool = True,
        neutral: str = "Answer. ",
        resamples: int = 2000,
        seed: int = 0,
    ) -> None:
        self.asked = None if modalities is None else chosen("modalities", modalities, tuple(MODALITIES))
        self.steps = list(noise or ())
        for step in self.steps:
            if not 0 <= step < STEPS:
                raise ValueError(f"noise: there is no step {step}; use 0 to {STEPS - 1}")
        if shuffles < 1:
            raise ValueError(f"shuffles: {shuffles} exchanges measure nothing; use 1 or more")
        if resamples < 1:
            raise ValueError(f"resamples: {resamples} give no interval; use 1 or more, 2000 for reports")
        if not neutral.strip():
            raise ValueError("neutral: no words; give some that ask nothing, such as 'Answer. '")
        self.shuffles, self.drop, self.shapley, self.neutral = shuffles, drop, shapley, neutral
        self.resamples, self.seed = resamples, seed
        self.modalities: tuple[str, ...] = self.asked or ()
        self.rows: list[Row] = []
        self.reasons: Counter[str] = Counter()
        self.floor: tuple[float, float] | None = None

    # ---------------------------------------------------------------- batches

    def update(self, model: MultimodalModel, batch: Batch, output: Output) -> None:
        """Run the batch under every condition.

        Raises:
            ConfigError: the model has no encoder for a modality, is in training mode, or cannot write ``neutral``.
        """
        self._require(model)
        if output.logits is None or not bool((batch.role != PAD).any()):  # every sample was refused
            return
        passes = Passes(model, batch, output.logits, self._neutral_ids(model), self.seed)
        if self.floor is None:
            self.floor = passes.floor()
        answered = ~passes.full.logp.isnan()
        columns: dict[str, Tensor] = {}
        for name in self.modalities:
            there = carried(batch, name)
            partner = self._add_modality(columns, passes, name, there)
            self._count(name, ~there, there & ~partner, there & partner & ~answered)
        columns["accuracy"] = passes.full.right
        if self.shapley:
            self._add_shapley(columns, passes)
        self._keep(batch, columns, passes.row.bincount(minlength=len(batch.ids)).tolist())

    def _require(self, model: MultimodalModel) -> None:
        if model.training:
            raise ConfigError(
                "counterfactual: the model is in training mode, where dropout changes answers; call eval()"
            )
        for name in self.asked or ():
            if name not in model.encoders:
                raise ConfigError(f"modalities: the model has no {name} encoder; remove {name} or choose {name}=...")
        self.modalities = self.asked or tuple(model.encoders)

    def _neutral_ids(self, model: MultimodalModel) -> list[int]:
        ids: list[int] = model.backbone.tokenizer(self.neutral, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ConfigError(f"neutral: the tokenizer makes no token of '{self.neutral}'; choose other words")
        return ids

    def _add_modality(self, columns: dict[str, Tensor], passes: Passes, name: str, there: Tensor) -> Tensor:
        """Columns of one modality; [B] bool, the rows that could be exchanged."""
        if not bool(there.any()):
            return there
        draws = [passes.shuffled(name, k) for k in range(self.shuffles)]
        found = {"": _mean(draws), "blank": passes.without(frozenset({name}))}
        found |= {f"noise_{step}": passes.noised(name, step) for step in self.steps}
        found |= {"drop": passes.dropped(name)} if self.drop else {}
        for kind, changed in found.items():
            self._add_condition(columns, passes.full, changed, name, kind, there)
        for k, draw in enumerate(draws):
            columns[f"_gain/{name}/{k}"] = passes.full.logp - draw.logp
        columns[f"_right/{name}"] = draws[0].right
        return ~found[""].logp.isnan() | passes.full.logp.isnan()

    def _add_condition(
        self, columns: dict[str, Tensor], full: Scores, changed: Scores, name: str, kind: str, there: Tensor
    ) -> None:
        end = f"/{kind}" if kind else ""
        new = {
            f"{GAIN[name]}{end}": full.logp - changed.logp,
            f"{GAIN[name]}{end}/first": full.first - changed.first,
            f"{DIVERGENCE[name]}{end}": changed.js,
            f"{DIVERGENCE[name]}{end}/first": changed.js_first,
            f"flip_rate/{name}{end}": changed.flip,
            f"blind_accuracy/{name}/{kind or 'shuffle'}": changed.right,
        }
        lost = full.right - changed.right
        new |= {"": {f"perceptual_score/{name}": lost}, "blank": {f"multimodal_gain/{name}": lost}}.get(kind, {})
        new |= {f"multimodal_gain/{name}/drop": lost} if kind == "drop" else {}
        columns |= {key: _where(there, values) for key, values in new.items()}

    def _add_shapley(self, columns: dict[str, Tensor], passes: Passes) -> None:
        """Values of the players that a row has; a player that it lacks changes nothing, so the others' values are exact."""
        plays = {name: there for name in self.modalities if bool((there := carried(passes.batch, name)).any())}
        if not plays:
            return
        some = torch.stack(list(plays.values())).any(0)
        plays[QUESTION] = question(passes.batch).any(1).cpu()
        players, everybody = list(plays), frozenset(plays)
        for end, field in (("", "logp"), ("/accuracy", "right")):

            def v(present: frozenset[str], field: str = field) -> Tensor:
                value: Tensor = getattr(passes.without(everybody - present), field)
                return value

            for name, phi in shapley(players, v).items():
                columns[f"modality_shapley/{name}{end}"] = _where(plays[name] & some, phi)
            columns[f"modality_shapley/total{end}"] = _where(some, v(everybody) - v(frozenset()))
            for (a, b), value in interactions(players, v).items():
                columns[f"interaction/{a}+{b}{end}"] = _where(plays[a] & plays[b], value)
        columns["blind_accuracy/question"] = _where(plays[QUESTION] & some, passes.without(frozenset({QUESTION})).right)
        columns["blind_accuracy/everything"] = _where(some, passes.without(everybody).right)

    def _count(self, name: str, *where: Tensor) -> None:
        for reason, rows in zip(REASONS, where, strict=True):
            self.reasons[f"{name}/{reason}"] += int(rows.sum())

    def _keep(self, batch: Batch, columns: dict[str, Tensor], tokens: Sequence[int]) -> None:
        shown: list[list[str]] = [[] for _ in batch.ids]
        for name in batch.media:
            for things, more in zip(shown, digests(batch, name), strict=True):
                things += more
        table = {key: values.tolist() for key, values in columns.items()}
        for i, (sample, reference) in enumerate(zip(batch.ids, batch.references, strict=True)):
            values = {key: column[i] for key, column in table.items()}
            self.rows.append(Row(sample, reference, shown[i], tokens[i], values))

    # ---------------------------------------------------------------- numbers

    def compute(self) -> dict[str, float]:
        """Every key with its interval; NaN under ``image_gain`` where no sample carries media.

        Raises:
            DataError: no sample carries a modality that was asked for by name.
        """
        for name in self.asked or ():
            if self.rows and self.reasons[f"{name}/no_media"] == len(self.rows):
                raise DataError(f"modalities: no sample carries {name}; evaluate on data that has it, or remove {name}")
        mains = [GAIN[name] for name in self.modalities] or [GAIN["vision"]]
        result = dict.fromkeys(mains, math.nan) | summary(self.rows, self.resamples, self.seed)
        for name in self.modalities:
            missing = {reason: self.reasons[f"{name}/{reason}"] for reason in REASONS}
            result[f"{GAIN[name]}/undefined"] = float(sum(missing.values()))
            result |= {f"{GAIN[name]}/undefined/{reason}": float(n) for reason, n in missing.items() if n}
        gain, js = self.floor or (math.nan, math.nan)
        return {**result, "noise_floor/gain": gain, "noise_floor/js": js}

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """``samples``: a line each with id, reference, what it shows (hashes), answer tokens and every value."""
        return {"samples": [row.line() for row in self.rows]}


def _where(there: Tensor, values: Tensor) -> Tensor:
    return values.masked_fill(~there, torch.nan)


def _mean(draws: Sequence[Scores]) -> Scores:
    """The mean over a sample's own exchanges, those in which it found a partner."""
    return Scores(**{name: torch.stack([getattr(draw, name) for draw in draws]).nanmean(0) for name in vars(draws[0])})
