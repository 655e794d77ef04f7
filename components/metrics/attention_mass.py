"""Softmax mass per group of keys, computed for blocks of query rows: no [T, T] map exists.

With q_i, k_j of a head, scale c and the visible keys S(i) of row i:

    A[i, j] = exp(c q_i k_j) / sum_{j' in S(i)} exp(c q_i k_j'),      mass[i, g] = sum_{j in g} A[i, j]

Letters: B rows of a batch, H heads, Hkv key heads, R wanted query rows, r rows of a block, K keys, D width of a head, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

BLOCK = 64
"""Query rows of a block."""


@dataclass
class Plan:
    """The wanted rows of one call of every layer.

    Attributes:
        index: [B, R] int64, each wanted row's place among the call's queries; rows are filled up with their last one.
        valid: [B, R] bool, False on what fills up.
        codes: [B, R] int64, each wanted row's group as a query.
        position: [B, R] int64, each wanted row's place in the batch.
        groups: [B, E] int64, each key position's group, up to the last position of the call.
        blocks: (start, end, lowest, highest) of each block of wanted rows: the smallest and largest index in it.
        seen: visible keys [B, R, G] by the mask that says so; a mask is shared by layers of one kind.
        members: what ``member`` gave, by number of keys and of those in front.
        rooms: memory that all blocks of all layers use in turn: fresh blocks of ever other sizes would leave holes.
    """

    index: Tensor
    valid: Tensor
    codes: Tensor
    position: Tensor
    groups: Tensor
    blocks: list[tuple[int, int, int, int]]
    seen: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = field(default_factory=dict)
    members: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    rooms: dict[str, Tensor] = field(default_factory=dict)

    def room(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """float32 memory of that shape; what was in it is lost."""
        size = math.prod(shape)
        if name not in self.rooms or self.rooms[name].numel() < size:
            self.rooms[name] = torch.empty(size, device=self.index.device, dtype=torch.float32)
        return self.rooms[name][:size].view(shape)

    def forget(self) -> None:
        """Free what only the calls needed."""
        for table in (self.seen, self.members, self.rooms):
            table.clear()

    def member(self, keys: int, count: int, front: int = 0) -> Tensor:
        """[B, K, G] float32, 1 where a key is in a group; the keys are the last positions of the call's end.

        The first ``front`` of the ``keys`` are a prefix's, in no group.
        """
        if (keys, front) not in self.members:
            groups = self.groups[:, max(self.groups.shape[1] - (keys - front), 0) :]
            groups = torch.nn.functional.pad(groups, (front, keys - front - groups.shape[1]), value=count)
            self.members[keys, front] = torch.nn.functional.one_hot(groups, count + 1)[..., :count].float()
        return self.members[keys, front]


def plan_rows(wanted: Tensor, codes: Tensor, groups: Tensor, start: int) -> Plan | None:
    """The plan for a call whose queries are positions ``start`` ... of ``wanted``.

    Args:
        wanted: [B, E] bool, all positions up to the call's end; those before ``start`` are not among the queries.
        codes, groups: [B, E] int64.
        start: the first query's position.

    Returns:
        None where no row is wanted.
    """
    here = wanted[:, start:]
    number = here.sum(1)  # [B]
    R = int(number.max()) if here.numel() else 0
    if R == 0:
        return None
    order = torch.argsort(~here, dim=1, stable=True)[:, :R]  # wanted rows first, in their order
    last = (number - 1).clamp(min=0)[:, None]
    place = torch.arange(R, device=here.device)[None]
    index = order.gather(1, place.minimum(last))
    position = index + start
    spans = []
    for a in range(0, R, BLOCK):
        low, high = index[:, a : a + BLOCK].aminmax()
        spans.append((a, min(a + BLOCK, R), int(low), int(high)))
    return Plan(index, place < number[:, None], codes.gather(1, position), position, groups, spans)


def along(tensor: Tensor, index: Tensor) -> Tensor:
    """Rows of the third dimension: [b, h, Q, X], [B, r] -> [B, h, r, X], with b = B or 1."""
    tensor = tensor.expand(index.shape[0], -1, -1, -1)
    return tensor.gather(2, index[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def probabilities(
    plan: Plan, query: Tensor, key: Tensor, scale: float, mask: Tensor | None, causal: bool
) -> Iterator[tuple[slice, Tensor]]:
    """A of the wanted rows, block by block.

    Args:
        plan: which rows.
        query: [B, H, Q, D].
        key: [B, Hkv, K, D], a head of it for each H / Hkv heads of the query.
        scale: c.
        mask: bool (True: visible) or additive, [B or 1, H or 1, Q, K]; None: no mask.
        causal: without a mask, row i sees the keys 0 ... i.

    Yields:
        A slice of the wanted rows and their A [B, H, r, K'], float32, valid until the next is asked for; the keys beyond K' are
        seen by none of them. The largest block comes first, so that its memory is enough for the others.
    """
    B, H, _, D = query.shape
    Hkv, K = key.shape[1], key.shape[2]
    keys = key.float().transpose(2, 3)  # [B, Hkv, D, K]
    for start, end, low, high in reversed(plan.blocks):
        index = plan.index[:, start:end]
        r, K_ = end - start, min(high + 1, K) if causal and mask is None else K
        q = along(query, index).float().mul_(scale).view(B, Hkv, H // Hkv * r, D)
        scores = plan.room("scores", (B, Hkv, H // Hkv * r, K_))
        scores = torch.matmul(q, keys[..., :K_], out=scores).view(B, H, r, K_)
        if mask is not None:
            _hide(scores, along(mask[..., :K_], index))
        elif causal:
            ahead = torch.arange(low, K_, device=index.device) > index[..., None]  # [B, r, K' - low]
            scores[..., low:].masked_fill_(ahead[:, None], -torch.inf)
        yield slice(start, end), torch.softmax(scores, -1, out=plan.room("probabilities", (B, H, r, K_)))


def _hide(scores: Tensor, mask: Tensor) -> None:
    """Apply a mask in place."""
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)  # finite: a row that sees nothing is no NaN
    else:
        scores.add_(mask)


def given_probabilities(plan: Plan, weights: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The same from attention weights [B, H, Q, K] that the kernel itself returned; they may sum to less than 1."""
    for start, end, *_ in plan.blocks:
        yield slice(start, end), along(weights, plan.index[:, start:end]).float()


def visible(plan: Plan, member: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """[B, R, G] float32: how many keys of each group a wanted row sees."""
    G = member.shape[2]
    if mask is None:
        total = member.cumsum(1) if causal else member.sum(1, keepdim=True)
        at = plan.index if causal else torch.zeros_like(plan.index)
        return total.gather(1, at[..., None].expand(-1, -1, G))
    parts = []
    for start, end, *_ in plan.blocks:
        rows = along(mask[:, :1], plan.index[:, start:end])[:, 0]  # [B, r, K]
        shown = rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2
        parts.append(torch.matmul(shown.float(), member[:, : rows.shape[-1]]))
    return torch.cat(parts, 1)
