"""Attention statistics of one ordinary forward or generation, without attention maps.

While ``observe`` is open, the attention of a backbone's layers runs through a function of ours, registered with transformers'
``AttentionInterface`` (and its mask function under the same name with ``AttentionMaskInterface``; without it the mask would be
dropped). It returns what the fast kernel returns, and adds the softmax mass of the wanted query rows, group by group, to a
small tensor. A backbone whose attention does not pass there is refused, never reported as empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mllm_factory import PAD, Batch, ConfigError, MultimodalModel
from mllm_factory.components.metrics.attention_groups import ANSWER, GROUPS, answer_rows, key_groups, query_groups
from mllm_factory.components.metrics.attention_kernels import Call, observed_kernels, require_softmax
from mllm_factory.components.metrics.attention_mass import Plan, plan_rows, probabilities, visible
from mllm_factory.components.metrics.attention_mass import given_probabilities as given

ROWS = ("answer", "all")
"""Query rows that can be wanted: those that predict an answer token, or all that are no padding."""

G = len(GROUPS)


@dataclass(frozen=True)
class AttentionStats:
    """What ``observe`` found. L layers that were seen, H heads, B samples, R wanted rows, G groups (``GROUPS``), T positions.

    For a row i and a group g, mass = sum of A[i, j] over the keys j in g; mass over all groups is 1 - what a learned sink, a
    learned prefix or padding takes (``null``).

    Attributes:
        layers: the numbers of the layers, counted in the backbone's list.
        mass: [L, H, B, G, G] mass summed over the wanted rows, by the row's group and the key's.
        count: [B, G] number of wanted rows by group.
        rows: [L, B, R, G] mean over heads of each wanted row's mass.
        visible: [L, B, R, G] how many keys of a group a wanted row sees.
        valid: [B, R] False where a sample has fewer wanted rows than R.
        position: [B, R] the wanted rows' positions in the batch; those from T on were generated.
        size: [B, G] positions of each group in the batch, seen by a wanted row or not.
        keys: [L, B, T'] mean over heads and wanted rows of each key's A, if asked for.
    """

    layers: tuple[int, ...]
    mass: Tensor
    count: Tensor
    rows: Tensor
    visible: Tensor
    valid: Tensor
    position: Tensor
    size: Tensor
    keys: Tensor | None = None

    @property
    def null(self) -> Tensor:
        """[L, B, R] what a wanted row gives to no key of a group: 0 up to rounding, but for learned sinks and prefixes."""
        return (1 - self.rows.sum(-1)) * self.valid


class Recorder:
    """Adds up what the layers do with one batch."""

    def __init__(self, model: MultimodalModel, rows: str, keys: bool) -> None:
        self.model, self.want_all, self.want_keys = model, rows == "all", keys
        self.batch: Batch | None = None
        self.plans: dict[tuple[int, int, int], Plan | None] = {}
        self.done: dict[int, int] = {}  # positions that a layer has seen
        self.chunks: dict[int, list[tuple[Plan, Tensor, Tensor]]] = {}  # by layer: plan, rows, visible
        self.mass: dict[int, Tensor] = {}  # by layer: [H, B, G, G]
        self.keys: dict[int, Tensor] = {}  # by layer: [B, T']
        self.ended: Tensor | None = None

    # ---------------------------------------------------------------- what happens while a model runs

    def fed(self, ids: Tensor) -> None:
        """Told the ids that were embedded: behind a stop token a sample's generated rows predict nothing any more."""
        if not self.done or ids.shape[1] != 1:  # the prompt, or no step of a generation
            return
        stops = torch.tensor(self.model.template.stop_ids, device=ids.device)
        over = torch.isin(ids[:, 0], stops)
        self.ended = over if self.ended is None else self.ended | over

    def watch(self, call: Call) -> Tensor:
        """Add one call of a layer's attention; its output as it was."""
        if not call.again:
            self._record(call)
        return call.output

    @torch.no_grad()
    def _record(self, call: Call) -> None:
        query, key, weights = call.query, call.key, call.weights
        plan = self._plan(call.layer, query, key.shape[2] - call.front)
        if plan is None:
            return
        member = plan.member(key.shape[2], G, call.front)
        blocks = (
            given(plan, weights)
            if weights is not None
            else probabilities(plan, query, key, call.scale, call.mask, call.causal)
        )
        shape = (*query.shape[:2], plan.index.shape[1], G)
        mass, first = query.new_empty(shape, dtype=torch.float32), None  # [B, H, R, G]
        for span, A in blocks:
            mass[:, :, span] = torch.matmul(A, member[:, None, : A.shape[-1]])
            first = A[:, :, 0].clone() if span.start == 0 else first
            if self.want_keys:
                self._add_keys(call.layer, plan, span, A[..., call.front :], key.shape[2] - call.front)
        self._add(call.layer, plan, mass, self._visible(plan, member, call.mask, call.causal))
        if first is not None and weights is None:
            require_softmax(call, plan, first)

    def _plan(self, layer: int, query: Tensor, keys: int) -> Plan | None:
        """Which rows of this call are wanted; the same for all layers. ``keys`` are those of positions."""
        batch, Q = self._in_flight(query), query.shape[2]
        done = self.done.get(layer, 0)
        cached = done > 0 and (done > Q or keys > Q)
        start, end = (done, done + Q) if cached else (0, Q)
        self.done[layer] = max(done, end)
        call = (done, start, end)
        if call not in self.plans:
            wanted, codes, groups = self._positions(batch, end)
            wanted[:, : min(done, end)] = False  # seen before: decoding without a cache passes everything again
            for old in self.plans.values():
                if old is not None:
                    old.forget()
            self.plans = {call: plan_rows(wanted, codes, groups, start)}
        return self.plans[call]

    def _in_flight(self, query: Tensor) -> Batch:
        batch = self.model.batch
        if batch is None or (self.batch is not None and batch.input_ids is not self.batch.input_ids):
            raise ConfigError(
                "observe: attention of one batch at a time, run by model(batch) or model.generate(batch, ...)"
            )
        if query.shape[0] != len(batch.input_ids):
            raise ConfigError(
                f"observe: {query.shape[0]} rows pass the backbone but the batch has {len(batch.input_ids)}"
            )
        self.batch = batch
        return batch

    def _positions(self, batch: Batch, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """Wanted [B, end] bool, and the groups as query and as key [B, end]; what was generated counts as answer."""
        T = batch.input_ids.shape[1]
        groups = key_groups(batch, getattr(self.model.backbone.tokenizer, "bos_token_id", None))
        predicts = answer_rows(batch)
        codes = query_groups(groups, predicts)
        wanted = batch.role != PAD if self.want_all else predicts
        pad = (0, end - T)
        alive = True if self.ended is None else ~self.ended[:, None]
        wanted = nn.functional.pad(wanted, pad)
        wanted[:, T:] = alive
        return wanted, nn.functional.pad(codes, pad, value=ANSWER), nn.functional.pad(groups, pad, value=ANSWER)

    def _visible(self, plan: Plan, member: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """[B, R, G], counted once for each mask."""
        name = (id(mask), member.shape[1])
        if name not in plan.seen:
            plan.seen[name] = (
                mask,
                visible(plan, member, mask, causal),
            )  # keeps the mask, so that its id stays its own
        return plan.seen[name][1]

    def _add(self, layer: int, plan: Plan, mass: Tensor, seen: Tensor) -> None:
        mass = mass.masked_fill(~plan.valid[:, None, :, None], 0)
        of_query = nn.functional.one_hot(plan.codes, G + 1)[..., :G].float()  # [B, R, G]
        total = torch.einsum("brq,bhrg->hbqg", of_query, mass)
        self.mass[layer] = self.mass[layer] + total if layer in self.mass else total
        self.chunks.setdefault(layer, []).append((plan, mass.mean(1), seen))

    def _add_keys(self, layer: int, plan: Plan, span: slice, A: Tensor, K: int) -> None:
        """Sum of A over heads (mean) and rows, at the keys' places in the batch."""
        part = torch.einsum("bhrk,br->bk", A, plan.valid[:, span].float()) / A.shape[1]
        offset = max(plan.groups.shape[1] - K, 0)
        part = nn.functional.pad(part, (offset, 0))
        before = self.keys.get(layer, part[:, :0])
        width = max(before.shape[1], part.shape[1])
        self.keys[layer] = sum(nn.functional.pad(t, (0, width - t.shape[1])) for t in (before, part))  # type: ignore[assignment]

    # ---------------------------------------------------------------- what was found

    def stats(self) -> AttentionStats:
        """The statistics of what ran.

        Raises:
            ConfigError: no layer's attention was seen, or some layers saw other rows than the rest.
        """
        if not self.done:
            what = type(getattr(self.model.backbone, "model", self.model.backbone)).__name__
            raise ConfigError(
                f"attention of {what} cannot be observed: none of its layers passed transformers' AttentionInterface; leave out "
                "the metrics on attention, or run the model inside observe"
            )
        layers = tuple(sorted(self.done))
        if not self.chunks:
            return self._empty(layers)
        chunks = [self.chunks[layer] for layer in layers]
        plans = [plan for plan, *_ in chunks[0]]
        valid = torch.cat([plan.valid for plan in plans], 1)
        codes = torch.cat([plan.codes for plan in plans], 1)
        count = nn.functional.one_hot(codes, G + 1)[..., :G].mul(valid[..., None]).sum(1)
        heads = max(self.mass[layer].shape[0] for layer in layers)
        masses = [_widened(self.mass[layer], heads) for layer in layers]
        per_row = count.sum(1).clamp(min=1)[:, None]
        return AttentionStats(
            layers,
            torch.stack(masses),
            count,
            torch.stack([torch.cat([rows for _, rows, _ in parts], 1) for parts in chunks]),
            torch.stack([torch.cat([seen for *_, seen in parts], 1) for parts in chunks]),
            valid,
            torch.cat([plan.position for plan in plans], 1),
            self._size(),
            torch.stack([self.keys[layer] / per_row for layer in layers]) if self.want_keys else None,
        )

    def _empty(self, layers: tuple[int, ...]) -> AttentionStats:
        """No row was wanted in any sample."""
        size, L = self._size(), len(layers)
        B = len(size)
        rows, none = size.new_zeros(L, B, 0, G).float(), size.new_zeros(B, 0)
        mass = size.new_zeros(L, 1, B, G, G).float()
        return AttentionStats(layers, mass, torch.zeros_like(size), rows, rows, none.bool(), none, size)

    def _size(self) -> Tensor:
        """[B, G] positions of each group."""
        batch: Any = self.batch
        _, _, groups = self._positions(batch, batch.input_ids.shape[1])
        return nn.functional.one_hot(groups, G + 1)[..., :G].sum(1)


def _widened(mass: Tensor, heads: int) -> Tensor:
    """[h, B, G, G] -> [H, B, G, G]; NaN for heads that a layer does not have."""
    return nn.functional.pad(mass, (0, 0, 0, 0, 0, 0, 0, heads - mass.shape[0]), value=torch.nan)


@contextmanager
def observe(model: MultimodalModel, rows: str = "answer", keys: bool = False) -> Iterator[Recorder]:
    """Collect attention statistics of one ``model(batch)`` or one ``model.generate(batch, ...)``; then ask for ``.stats()``.

    The outputs are those of the fast kernel (``sdpa``; ``eager`` where the backbone uses it or has no other; another kernel
    is replaced by ``sdpa`` meanwhile). Attention is what the layers compute, steering and adapters included. Nothing is kept
    but the statistics, so memory does not grow with T squared.

    In a generation the rows behind a sample's stop token are left out, with and without a cache.

    Args:
        model: its backbone is observed.
        rows: ``answer``: the positions that predict an answer token; ``all``: every position that is no padding.
        keys: also keep each key's mean attention, to draw it over a picture or a recording.

    Raises:
        ValueError: unknown ``rows``.
        ConfigError: the backbone's attention cannot be observed; a second batch; or, at the first call of a layer, that its
            output is not what softmax(q k) v gives, so that the statistics would be wrong.
    """
    if rows not in ROWS:
        raise ValueError(f"rows: '{rows}' is neither {' nor '.join(ROWS)}")
    recorder = Recorder(model, rows, keys)
    backbone = model.backbone
    embed: Any = backbone.embed

    def told(ids: Tensor) -> Tensor:
        recorder.fed(ids)
        return embed(ids)

    own = vars(backbone).get("embed")
    with observed_kernels(backbone, recorder.watch), model.row_by_row():  # statistics are by row: one sample each
        vars(backbone)["embed"] = told
        try:
            yield recorder
        finally:
            if own is None:
                del vars(backbone)["embed"]
            else:
                vars(backbone)["embed"] = own
