"""AdaLoRA (arXiv 2303.10512) through peft: low-rank updates whose ranks move to the layers that need them.

Importance of weights (eq. 8 to 11), of triplets (eq. 7), the budget (eq. 12) and the masks are those of peft's ``RankAllocator``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mllm_factory import ConfigError, Tuning, register, sharded
from mllm_factory.components.tuning.peft_layers import fold, insert, pattern
from mllm_factory.components.tuning.targets import ALL_LINEAR, resolve

if TYPE_CHECKING:
    from mllm_factory import MultimodalModel, TrainState


@register("adalora")
class AdaLora(Tuning):
    """h = W x + s P diag(E) Q x, s = alpha / rank, with P [out, rank] and Q [rank, in] random and E [rank] zero at the start.

    Every E_i has an importance, from running averages of |weight * gradient| of E_i, row i of Q and column i of P. After every
    ``every`` steps, t of T, the least important of all layers together are set to zero, so that b(t), rounded down, of them are
    left in n layers:

        b(t) = n rank                                                                          t <= t_i
        b(t) = n budget + (n rank - n budget) (1 - (t - t_i) / (T - t_i - t_f))^3              t_i < t < T - t_f
        b(t) = n budget, and which ones no longer changes                                      t >= T - t_f

    The gradients are those of the loss and a penalty, ``orthogonality`` times the mean over all P and Q of the Frobenius norms
    of P^T P - I and Q Q^T - I, as in peft; the paper's eq. 4 squares and adds. What is logged as ``loss`` is without it.

    Args:
        rank: width of the factors, of every layer at the start.
        budget: mean rank of a layer at the end; less than ``rank``.
        alpha: the update is scaled by s = alpha / rank, whatever ranks are left.
        dropout: on the input of Q.
        targets: ends of module names at a dot, such as ``q_proj`` or ``3.mlp.up_proj``; or ``all-linear``: every linear layer
            of the part, of a backbone those of its decoder layers.
        warmup: t_i as a share of all steps: nothing is taken away so long.
        final: t_f as a share of all steps: ranks stay as they are so long.
        every: steps between two allotments.
        beta1: averaging factor of the importance of a weight.
        beta2: averaging factor of how much that varies.
        orthogonality: weight of the penalty; 0 leaves it out.

    Attributes:
        resolved: full names of the adapted layers inside the part, after ``apply``.
        kept: by the name of a layer's E, which of its entries the last allotment kept; None before the first.

    Raises:
        ValueError: a value outside its range, or shares that leave no step to allot in.
    """

    def __init__(
        self,
        rank: int = 24,
        budget: int = 16,
        alpha: float = 48.0,
        dropout: float = 0.0,
        targets: list[str] | str = "all-linear",
        warmup: float = 0.1,
        final: float = 0.3,
        every: int = 10,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orthogonality: float = 0.5,
    ) -> None:
        if budget < 1:
            raise ValueError(f"budget: {budget} is no rank; use 1 or more")
        if budget >= rank:
            raise ValueError(f"budget: {budget} takes nothing away from rank {rank}; use less, or the strategy lora")
        if not alpha > 0:
            raise ValueError(f"alpha: {alpha} must be above 0")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: {dropout} is no probability; use 0 or more and less than 1")
        if not targets:
            raise ValueError(f"targets: nothing to adapt; name layers such as q_proj, or set {ALL_LINEAR}")
        for name, share in (("warmup", warmup), ("final", final)):
            if not 0 <= share < 1:
                raise ValueError(f"{name}: {share} is no share of all steps; use 0 or more and less than 1")
        if warmup + final >= 1:
            raise ValueError(
                f"warmup: {warmup} and final: {final} leave no step to allot ranks in; use less than 1 together"
            )
        if every < 1:
            raise ValueError(f"every: {every} must be 1 or more steps")
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 < beta < 1:
                raise ValueError(f"{name}: {beta} is no averaging factor; use more than 0 and less than 1")
        if orthogonality < 0:
            raise ValueError(f"orthogonality: {orthogonality} must be 0 or more")
        self.rank, self.budget, self.alpha, self.dropout, self.targets = rank, budget, alpha, dropout, targets
        self.warmup, self.final, self.every = warmup, final, every
        self.beta1, self.beta2, self.orthogonality = beta1, beta2, orthogonality
        self.resolved: list[str] = []
        self.kept: dict[str, list[bool]] | None = None
        self.settled = False

    def apply(self, part: nn.Module, model: MultimodalModel) -> None:
        """Wrap the target layers and freeze what they were.

        Raises:
            ConfigError: the part has no linear layer, a target names none of them, or another strategy has one of them.
        """
        from peft import AdaLoraConfig
        from peft.tuners.adalora import RankAllocator

        self.resolved = resolve(part, self.targets, "adalora")
        scale: Any = self.alpha  # peft's annotation knows whole numbers only
        self.plan = AdaLoraConfig(
            init_r=self.rank,
            target_r=self.budget,
            lora_alpha=scale,
            lora_dropout=self.dropout,
            target_modules=pattern(self.resolved),
            deltaT=self.every,
            beta1=self.beta1,
            beta2=self.beta2,
            total_step=1,  # until the first step says how many there are
        )
        insert(part, self.plan)
        for name in self.resolved:  # the divisor of the scale, which peft lets learn on a part of half precision
            part.get_parameter(f"{name}.ranknum.default").requires_grad = False
        self.factors = _Factors({name: part.get_submodule(name) for name in self.resolved})
        self.allocator = RankAllocator(self.factors, self.plan, "default")

    def merge(self, part: nn.Module, model: MultimodalModel) -> None:
        """Fold the updates into plain layers."""
        fold(part)

    # ---------------------------------------------------------------- steps

    def before_step(self, state: TrainState) -> None:
        """Add the penalty's gradient. Not by ``backward``: gradients are averaged over processes already.

        Raises:
            ConfigError: the weights are sharded.
        """
        if sharded(p for _, p in self.factors.named_parameters()):
            raise ConfigError("adalora: ranks cannot be allotted on sharded weights; set trainer.strategy=ddp")
        if self.orthogonality:
            sides = [p for _, p in self.factors.sides()]
            for p, gradient in zip(sides, torch.autograd.grad(self.penalty(), sides), strict=True):
                p.grad = gradient if p.grad is None else p.grad.add_(gradient)

    def penalty(self) -> Tensor:
        """[] ``orthogonality`` times the mean over all P and Q of ||P^T P - I|| and ||Q Q^T - I||, Frobenius norms, as in peft."""
        products = [p @ p.T if rows else p.T @ p for rows, p in self.factors.sides()]
        norms = [torch.linalg.matrix_norm(c - torch.eye(len(c), dtype=c.dtype, device=c.device)) for c in products]
        return self.orthogonality * torch.stack(norms).sum() / len(norms)

    def after_step(self, state: TrainState) -> None:
        """Measure importance and allot; at the end hold what is not kept at zero (peft's ``update_and_allocate``).

        A part from which a schedule takes the gradients rests: nothing is measured, what was measured stands.
        """
        t, allocator, last = state.step + 1, self.allocator, self._plan(state.max_steps)
        if t >= last and self.settled:
            allocator.mask_using_rank_pattern(self.factors, self.kept)
            return
        self.settled = False
        if t < last or not allocator.ipt:
            allocator.update_ipt(_Factors(self.factors.layers, moved=True))
        budget, due = allocator.budget_schedule(t)
        measured = len(allocator.ipt) == 3 * len(self.factors.layers)
        if measured and (due or t >= last):
            self.kept, self.settled = allocator.mask_to_budget(self.factors, budget), t >= last
        if self.settled:
            allocator.reset_ipt()

    def _plan(self, steps: int) -> int:
        """Tell peft the steps; the one after which ranks stay."""
        self.plan.total_step = steps
        self.plan.tinit, self.plan.tfinal = (int(round(share * steps, 6)) for share in (self.warmup, self.final))
        return steps - self.plan.tfinal

    def readings(self) -> dict[str, float]:
        """Ranks of the layers as last allotted: their mean, the least and the largest."""
        ranks = [self.rank] * len(self.resolved) if self.kept is None else [sum(kept) for kept in self.kept.values()]
        return {"rank_mean": sum(ranks) / len(ranks), "rank_min": float(min(ranks)), "rank_max": float(max(ranks))}

    def state_dict(self) -> dict[str, Any]:
        """The running averages, what is kept, and whether that is final."""
        allocator = self.allocator
        return {
            "importance": dict(allocator.exp_avg_ipt),
            "variation": dict(allocator.exp_avg_unc),
            "kept": self.kept,
            "settled": self.settled,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what ``state_dict`` gave."""
        home, allocator = dict(self.factors.named_parameters()), self.allocator
        allocator.exp_avg_ipt = {name: value.to(home[name].device) for name, value in state["importance"].items()}
        allocator.exp_avg_unc = {name: value.to(home[name].device) for name, value in state["variation"].items()}
        allocator.ipt = dict(allocator.exp_avg_ipt)  # peft starts new averages for names that are not here; values go
        self.kept, self.settled = state["kept"], state["settled"]


class _Factors:
    """The factors of some layers and nothing else of their part, which other strategies may have adapted too.

    Args:
        layers: by name.
        moved: only those that have a gradient.
    """

    def __init__(self, layers: dict[str, nn.Module], moved: bool = False) -> None:
        self.layers, self.moved = layers, moved

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What peft asks a model for: Q (``lora_A``), P (``lora_B``) and E of each layer."""
        for name, layer in self.layers.items():
            for factor in ("lora_A", "lora_B", "lora_E"):
                p = layer.get_parameter(f"{factor}.default")
                if p.grad is not None or not self.moved:
                    yield f"{name}.{factor}.default", p

    def sides(self) -> Iterator[tuple[bool, nn.Parameter]]:
        """Every Q (True: its rows are the vectors) and P (False: its columns are)."""
        for layer in self.layers.values():
            for factor, rows in (("lora_A", True), ("lora_B", False)):
                yield rows, layer.get_parameter(f"{factor}.default")
