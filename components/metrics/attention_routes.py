"""Gates on what each head reads from each modality, at the row that predicts an answer's first token.

The output of a head, before the layer's output projection, is split exactly by the keys that it comes from ('Causal Route
Gating', ICML 2026, section 3):

    O = sum_m O_m,     O_m = sum_{k in m} A[k] v_k,     O(g) = O + sum_m (g_m - 1) O_m

With every g_m at 1 nothing changes, to the bit. For a score l, dl / dg_m at 1 is <dl / dO, O_m>, the first-order effect of the
route; l(1) - l(g_m = 0) is the exact one.

Letters: B samples, H heads, M routes (the modalities, then all other keys as ``text``), K keys, D' width of a head's value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mllm_factory import IGNORE_INDEX, Batch, ConfigError, MultimodalModel
from mllm_factory.components.metrics.attention_capture import G
from mllm_factory.components.metrics.attention_groups import GROUPS, answer_rows, key_groups
from mllm_factory.components.metrics.attention_kernels import Call, mixed, observed_kernels, require_softmax
from mllm_factory.components.metrics.attention_mass import Plan, along, plan_rows, probabilities
from mllm_factory.components.metrics.attention_mass import given_probabilities as given

TEXT = "text"
"""The route of all keys that are no medium; those of a learned prefix too."""


def first_rows(batch: Batch) -> Tensor:
    """[B, T] bool: the position that predicts each sample's first answer token."""
    predicts = answer_rows(batch)
    return predicts & (predicts.cumsum(1) == 1)


class Gates:
    """The gates of one forward.

    Args:
        model: whose backbone is gated.
        batch: whole conversations with labels.
        modalities: those with a route of their own; the rest of the keys is ``text``.

    Attributes:
        values: by layer, [B, H, M] gates. Those that are missing when a layer runs are made as ones that ask for a gradient.
    """

    def __init__(self, model: MultimodalModel, batch: Batch, modalities: Sequence[str]) -> None:
        groups = key_groups(batch, getattr(model.backbone.tokenizer, "bos_token_id", None))
        self.batch, self.media = batch, [GROUPS.index(name) for name in modalities]
        self.plan = plan_rows(first_rows(batch), groups, groups, 0)
        self.values: dict[int, Tensor] = {}

    def watch(self, call: Call) -> Tensor:
        """The gated output of one call, [B, Q, H, D']."""
        if self.plan is None:
            return call.output
        parts = self._parts(call, self.plan)  # [B, H, M, D']
        if call.layer not in self.values:
            self.values[call.layer] = torch.ones(parts.shape[:3], device=parts.device, requires_grad=True)
        g = self.values[call.layer]
        change = ((g - 1)[..., None] * parts).sum(2) * self.plan.valid[:, :, None]  # [B, H, D']
        rows = torch.arange(len(change), device=change.device)
        return call.output.index_put((rows, self.plan.index[:, 0]), change.to(call.output.dtype), accumulate=True)

    @torch.no_grad()
    def _parts(self, call: Call, plan: Plan) -> Tensor:
        """O_m of the wanted row: [B, H, M, D'] float32; the last one is what the others leave of O."""
        if call.query.shape[2] != self.batch.input_ids.shape[1]:
            raise ConfigError("routes: a whole teacher-forced pass is gated, no generation; run model(batch)")
        mask, causal = call.mask, call.causal
        blocks = (
            given(plan, call.weights)
            if call.weights is not None
            else probabilities(plan, call.query, call.key, call.scale, mask, causal)
        )
        _, A = next(iter(blocks))  # one row a sample is one block
        A = A[:, :, 0]  # [B, H, K']
        if call.weights is None and not call.again:
            require_softmax(call, plan, A)
        member = plan.member(call.key.shape[2], G, call.front)[:, : A.shape[-1]]  # [B, K', G]
        media = [mixed(A * member[:, None, :, m], call.value) for m in self.media]
        whole = along(call.output.transpose(1, 2), plan.index)[:, :, 0].float()
        return torch.stack([*media, whole - sum(media, torch.zeros_like(whole))], 2)


@contextmanager
def gated(model: MultimodalModel, gates: Gates) -> Iterator[None]:
    """Run ``model(gates.batch)`` with its attention gated; the backbone is as before afterwards.

    Raises:
        ConfigError: the backbone's attention cannot be observed; or a layer's output is not what softmax(q k) v gives.
    """
    with observed_kernels(model.backbone, gates.watch), model.row_by_row():  # gates are by row: one sample each
        yield


def first_logp(batch: Batch, logits: Tensor) -> Tensor:
    """[N, V] logits of the label positions -> [B] log p of each sample's first answer token; NaN where there is none."""
    keep = batch.labels[:, 1:] != IGNORE_INDEX
    row, targets = keep.nonzero()[:, 0], batch.labels[:, 1:][keep]
    begins = torch.cat([torch.ones_like(row[:1], dtype=torch.bool), row[1:] != row[:-1]])
    logp = logits[begins].log_softmax(-1).gather(1, targets[begins, None])[:, 0]
    return logits.new_full((len(batch.ids),), torch.nan).index_put((row[begins],), logp)


class Routes:
    """One batch, its answers' first tokens, and what each route does to them.

    Args:
        model: in eval mode.
        batch: whole conversations with labels.
        modalities: those with a route of their own.

    Attributes:
        layers: numbers of the layers that were seen.
        logp: [B] log p of the first answer token, in nats; NaN for a sample without one.
        effects: [B, L, H, M] first-order effects; NaN for a sample without an answer token, and for heads that a layer does
            not have.
    """

    def __init__(self, model: MultimodalModel, batch: Batch, modalities: Sequence[str]) -> None:
        self.model, self.batch, self.modalities = model, batch, modalities
        with torch.no_grad():
            self.features = {name: model.features(name, items) for name, items in batch.media.items() if len(items)}
        gates = self._gates()
        with torch.enable_grad(), gated(model, gates):  # still gated where layers run again for their gradients
            score = self._run()
            found = sorted(gates.values.items())
            asked = [value for _, value in found]
            slopes = torch.autograd.grad(score.nansum(), asked) if asked else ()
        self.layers, self.logp = [layer for layer, _ in found], score.detach()
        self._shapes = [value.shape for value in asked]
        heads = max((slope.shape[1] for slope in slopes), default=0)
        wide = [torch.nn.functional.pad(s, (0, 0, 0, heads - s.shape[1]), value=torch.nan) for s in slopes]
        self.effects = torch.stack(wide, 1) if wide else self.logp.new_zeros(len(batch.ids), 0, 0, len(modalities) + 1)
        self.effects = self.effects.masked_fill(self.logp.isnan()[:, None, None, None], torch.nan)

    def _gates(self) -> Gates:
        return Gates(self.model, self.batch, self.modalities)

    def _run(self) -> Tensor:
        """[B] log p of the first answer tokens, in a pass that is gated already."""
        return first_logp(self.batch, self.model(self.batch, logits=True, features=self.features).logits)

    @torch.no_grad()
    def exact(self, layer: int, head: int, m: int) -> Tensor:
        """[B] l(1) - l(0): what the answers lose where a route of a head is shut; ``layer`` counts in ``layers``."""
        gates = self._gates()
        device = self.logp.device
        gates.values = {n: torch.ones(shape, device=device) for n, shape in zip(self.layers, self._shapes, strict=True)}
        gates.values[self.layers[layer]][:, head, m] = 0
        with gated(self.model, gates):
            return self.logp - self._run()
