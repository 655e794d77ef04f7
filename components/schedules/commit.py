"""CoMMIT (Wu, Li et al., arXiv 2407.20454; EMNLP 2025): rates that follow how far each component's step moves the answers.

    kappa_t = d_llm / d_encoder                               eq. 3, measured by ``probe``
    lr_c    = base_c * schedule(t) * m_c(average of kappa)     eq. 6, ``balance``
    g_c    <- g_c - weight * grad_c D_c                        eqs. 7 and 8, ``regularizer``

The paper leaves much open; every choice is an option here, and docs/commit.md says which readings there are.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from torch import Tensor

from mllm_factory import DataError, Schedule, TrainState, hint, register
from mllm_factory.components.schedules.balance import AVERAGES, Balance, partition
from mllm_factory.components.schedules.cosine import Cosine
from mllm_factory.components.schedules.distances import DISTANCES, ORDER
from mllm_factory.components.schedules.norms import input_norms, norms
from mllm_factory.components.schedules.probe import Probe, Seen, copies
from mllm_factory.components.schedules.regularizer import POINTS, Regularizer

log = logging.getLogger("mllm_factory")
PATIENCE = 20
"""So many measurements in a row may fail before training stops, unless ``act`` is false."""


@register("commit")
class Commit(Schedule):
    """Measure kappa and multiply the rates of encoder and LLM by m_llm = gain / (kappa + 1), m_encoder = gain / (1/kappa + 1).

    The rates under the multipliers are those of a cosine with warm-up (``final: 1`` and ``warmup: 0``: constant), or of any
    other schedule given as ``base``. Multipliers stay 1 during the warm-up and until ``min_samples`` measurements are there.

    Args:
        lr: peak learning rate.
        part_lr: peak rate of single parts (vision, audio, projector, backbone); None: ``lr``.
        warmup: share of all steps spent rising linearly from 0, in [0, 1].
        final: rate at the end as a share of the peak, in [0, 1].
        base: another schedule in place of that cosine.
        components: name -> parts; None for ``encoder`` (everything before the backbone) and ``llm``.
        distance: ``sqrt_js``, ``kl``, ``reverse_kl``, ``js``, ``tv``, ``hellinger`` or ``l2``.
        average: ``arithmetic`` (the paper's), ``log``, ``median`` or ``ratio`` (of mean distances).
        bounds: each kappa is cut to this range before it is averaged.
        window: steps that an average reaches back.
        update_every: steps between changes of the multipliers.
        measure_every: steps between measurements.
        min_samples: measurements before the multipliers leave 1; None: half a window.
        gain: sum of the two multipliers; 2 keeps the rates where kappa is 1.
        batches: which batches of an accumulated step are probed: ``last`` or ``all``.
        eps: a distance below it counts as not measurable; None: 1e-14, or its root 1e-7 for distances that grow with the step.
        weight: of the regulariser; 0 is CoMMIT-CLR, the scheduler alone.
        point: where its gradient is taken: ``lookahead`` (one provisional step ahead) or ``lagged`` (the last step).
        cap: largest norm of its gradient as a share of the component's own; None does not cap.
        act: False measures and logs only, and leaves the run bit for bit as it is without.

    Raises:
        ValueError: a value outside its range.
    """

    reads_media = True  # for the norms of raw items in H

    def __init__(
        self,
        lr: float = 1e-3,
        part_lr: dict[str, float | None] | None = None,
        warmup: float = 0.05,
        final: float = 0.0,
        base: Schedule | None = None,
        components: dict[str, list[str]] | None = None,
        distance: str = "sqrt_js",
        average: str = "arithmetic",
        bounds: list[float] | None = None,
        window: int = 100,
        update_every: int = 20,
        measure_every: int = 4,
        min_samples: int | None = None,
        gain: float = 2.0,
        batches: str = "last",
        eps: float | None = None,
        weight: float = 0.0,
        point: str = "lookahead",
        cap: float | None = 0.1,
        act: bool = True,
    ) -> None:
        self.base = Cosine(lr, part_lr, warmup, final) if base is None else base
        self.wanted, self.kind, self.act = components, distance, act
        self.update_every, self.measure_every, self.warmup = update_every, measure_every, warmup
        for name, value, known in (
            ("distance", distance, DISTANCES),
            ("average", average, (*AVERAGES, "ratio")),
            ("batches", batches, ("last", "all")),
            ("point", point, POINTS),
        ):
            if value not in known:
                raise ValueError(f"{name}: '{value}'{hint(value, known)}")
        low, high = _bounds(bounds)
        _check(window, update_every, measure_every, gain, weight, cap, eps, act)
        if window <= ORDER[distance] * update_every:
            log.warning(
                "schedule.window: %d steps with update_every %d can swing from one limit to the other with %s; "
                "use more than %d",
                *(window, update_every, distance, ORDER[distance] * update_every),
            )
        size = max(1, window // measure_every)
        self.balance = Balance(size, gain, average, (low, high))
        self.min_samples = max(1, size // 2) if min_samples is None else min_samples
        self.eps = 10.0 ** (-14 / (3 - ORDER[distance])) if eps is None else eps
        self.every_batch = batches == "all"
        self.regularizer = Regularizer(weight, point, cap) if weight else None
        self.multipliers: dict[str, float] = {}
        self.measured, self.skipped, self.failures = 0, 0, 0
        self.values: dict[str, float] = {}
        self.probe: Probe | None = None
        self.seen: list[Seen] = []
        self.old: list[Tensor] = []

    # ---------------------------------------------------------------- steps

    def before_step(self, state: TrainState) -> None:
        """Set the rates; look at the answers before the weights change."""
        probe = self._attached(state)
        self.base.before_step(state)
        part_of = {part: component.name for component in probe.components for part in component.parts}
        for group in state.optimizer.param_groups if self.act else ():
            group["lr"] *= self.multipliers.get(part_of[group["part"]], 1.0)
        if not self._measures(state.step):
            return
        self.values |= norms(probe.components)
        self.seen = probe.reference(state)
        if self.regularizer is not None:
            self._take(self.regularizer.apply(probe, self.seen, state), state)
        else:
            self.old = copies(probe.params)

    def after_step(self, state: TrainState) -> None:
        """Measure what each component's step did; change the multipliers where it is time to."""
        probe = self._attached(state)
        if self.old:
            self._take(probe.distances(self.seen, self.old, state), state)
        self.seen, self.old = [], []
        if (state.step + 1) % self.update_every == 0 and self._ready(state):
            names = [component.name for component in probe.components]
            self.multipliers = dict(zip(names, self.balance.multipliers(), strict=True))
        probe.listening = self._measures(state.step + 1)
        self.base.after_step(state)

    def _attached(self, state: TrainState) -> Probe:
        if self.probe is None:
            components = partition(state.model, self.wanted)
            self.probe = Probe(state.model, components, self.kind, self.every_batch)
        return self.probe

    def _measures(self, step: int) -> bool:
        return self.regularizer is not None or (step + 1) % self.measure_every == 0

    def _ready(self, state: TrainState) -> bool:
        return self.measured >= self.min_samples and state.step + 1 >= self.warmup * state.max_steps

    def _take(self, distances: list[float], state: TrainState) -> None:
        """Take in one measurement, or skip it."""
        probe = self._attached(state)
        names = [component.name for component in probe.components]
        self.values |= {f"d/{name}": d for name, d in zip(names, distances, strict=True)}
        if all(math.isfinite(d) and d > self.eps for d in distances):
            self.balance.push(distances)
            self.measured, self.failures = self.measured + 1, 0
            self.values |= input_norms(probe, self.seen, dict(zip(names, distances, strict=True)), state.world)
            return
        self.skipped, self.failures = self.skipped + 1, self.failures + 1
        if self.failures >= PATIENCE and self.act:  # a monitor leaves the run as it is
            shown = ", ".join(f"{name} {d:.3g}" for name, d in zip(names, distances, strict=True))
            raise DataError(
                f"schedule: {PATIENCE} measurements in a row gave no balance (distances: {shown}; eps: {self.eps:g}); "
                "a component does not move the answers: look at its rate and tuning, or choose schedule=cosine"
            )

    # ---------------------------------------------------------------- what others see

    def readings(self) -> dict[str, float]:
        """kappa of the last measurement and averaged, d, H, norms and multipliers of each component."""
        values = {f"balance/{name}": value for name, value in self.values.items()}
        if self.probe is not None and self.balance.window:
            names = [component.name for component in self.probe.components[:-1]]
            last, averaged = self.balance.window[-1], self.balance.kappas()
            for c, name in enumerate(names):
                of = "" if len(names) == 1 else f"/{name}"
                values[f"balance/kappa{of}"] = last[-1] / last[c]
                values[f"balance/kappa_average{of}"] = averaged[c]
        values |= {f"balance/multiplier/{name}": value for name, value in self.multipliers.items()}
        return {**values, "balance/skipped": float(self.skipped)}

    def state_dict(self) -> dict[str, Any]:
        """The window, the multipliers and the counters; ``lagged`` adds the weights of the last step."""
        return {
            "window": [list(d) for d in self.balance.window],
            "multipliers": dict(self.multipliers),
            "counts": [self.measured, self.skipped, self.failures],
            "values": dict(self.values),
            "base": self.base.state_dict(),
            "previous": self.regularizer.previous if self.regularizer is not None else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        self.balance.window.extend(state["window"])
        self.multipliers, self.values = dict(state["multipliers"]), dict(state["values"])
        self.measured, self.skipped, self.failures = state["counts"]
        self.base.load_state_dict(state["base"])
        if self.regularizer is not None:
            self.regularizer.previous = list(state["previous"])


def _bounds(bounds: list[float] | None) -> tuple[float, float]:
    low, high = bounds if bounds is not None and len(bounds) == 2 else (1e-3, 1e3)
    if (bounds is not None and len(bounds) != 2) or not 0 < low <= 1 <= high:
        raise ValueError(f"bounds are two numbers around 1, such as [0.001, 1000], got {bounds}")
    return low, high


def _check(
    window: int,
    update_every: int,
    measure_every: int,
    gain: float,
    weight: float,
    cap: float | None,
    eps: float | None,
    act: bool,
) -> None:
    for name, value in (("window", window), ("update_every", update_every), ("measure_every", measure_every)):
        if value < 1:
            raise ValueError(f"{name} is a number of steps, 1 or more, got {value}")
    if window < update_every:
        raise ValueError(f"window: {window} steps are less than update_every ({update_every}); make it longer")
    if window < measure_every:
        raise ValueError(f"window: {window} steps hold no measurement of every {measure_every}; make it longer")
    for name, number in (("gain", gain), ("eps", eps), ("cap", cap)):
        if number is not None and not number > 0:
            raise ValueError(f"{name} must be above 0, got {number}")
    if weight < 0:
        raise ValueError(f"weight of the regulariser must be 0 or more, got {weight}")
    if weight and not act:
        raise ValueError("act: false only measures, but the regulariser changes gradients; set weight: 0")
