"""``check_component`` finds what it promises to find: each broken rule by a class that breaks that one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mllm_factory import Encoder, Message, Metric, MultimodalModel, Projector, Sample, Schedule, Source, Tuning
from mllm_factory.errors import ConfigError
from mllm_factory.testing import BrokenContract, check_component

PAGE = Path(__file__).parents[1] / "docs" / "own_components.md"


class Good(Encoder):
    """The mean colours of a picture's quarters; ``fault`` breaks one rule."""

    modality, dim, num_tokens = "vision", 5, 4

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault
        self.linear = nn.Linear(3, 5)
        self.calls = 0
        if fault == "tokens":
            self.num_tokens = 3
        if fault == "width":
            self.dim = 6
        if fault == "unused":
            self.spare = nn.Parameter(torch.zeros(2))
        if fault == "frozen":
            self.linear.requires_grad_(False)
        if fault == "unseeded":
            nn.init.normal_(self.linear.weight, generator=torch.Generator().manual_seed(torch.seed() % 1000))
        if fault == "constant":
            nn.init.ones_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
        if fault == "secret":
            self.shift = torch.randn(5, device="cpu")
        if fault == "memory":
            self.linear = nn.Linear(3, 5, device="cpu")
        if fault == "lambda":
            self.transform = lambda picture: self._pixels(picture)  # type: ignore[method-assign]

    def transform(self, picture: Image.Image) -> Tensor:
        """A picture -> [1, 3, 2, 2]"""
        pixels = self._pixels(picture)
        self.calls += 1
        if self.fault == "unsteady":
            return pixels + self.calls
        return pixels

    def _pixels(self, picture: Image.Image) -> Tensor:
        raw = torch.tensor(list(picture.resize((2, 2)).tobytes()), dtype=torch.float32)
        return raw.view(1, 2, 2, 3).permute(0, 3, 1, 2) / 255

    def forward(self, items: Tensor) -> Tensor:
        """[n, 3, 2, 2] -> [n, 4, 5]"""
        tokens = items.flatten(2).transpose(1, 2)
        if self.fault == "neighbours" and not items.is_meta:
            tokens = tokens - items.mean()
        if self.fault == "float":
            return self.linear(tokens).float()
        return self.linear(tokens) + (self.shift if self.fault == "secret" else 0)


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        ("tokens", r"the declared sizes are those of the output: says \(1, 3, 5\), gives \(1, 4, 5\)"),
        ("width", r"the declared sizes are those of the output: says \(1, 4, 6\)"),
        ("unused", "a gradient reaches every parameter: none reaches spare"),
        ("frozen", "only a tuning sets requires_grad: linear.weight, linear.bias"),
        ("unseeded", "two builds with one seed are equal"),
        ("constant", "weights are drawn from the seed"),
        ("secret", "a saved and loaded state gives bit-equal output"),
        ("neighbours", "an item does not depend on the others of a batch: item 0 does"),
        ("float", r"a part in bf16 gives bf16: torch\.float32"),
        ("memory", "on the meta device no parameter takes memory: found cpu"),
        ("unsteady", "transform is deterministic"),
        ("lambda", "transform can be sent to loader workers"),
    ],
)
def test_a_broken_rule_is_named(fault: str, rule: str) -> None:
    with pytest.raises(BrokenContract, match=rule) as raised:
        check_component(Good, {"fault": fault})
    assert "\n" not in str(raised.value)


def test_a_good_encoder_passes_by_class_and_by_path() -> None:
    check_component(Good)
    check_component(Encoder, {"name": "test_testing:Good"})
    check_component("Encoder", {"name": "test_testing:Good", "fault": ""})


def test_what_cannot_be_found_again_is_refused() -> None:
    class Local(Projector):
        """Nowhere to be imported from."""

        def __init__(self, in_dim: int, out_dim: int, in_tokens: int) -> None:
            super().__init__()

        def forward(self, features: Tensor) -> Tensor:
            return features

    with pytest.raises(BrokenContract, match="defined at the top level of a module"):
        check_component(Local)
    with pytest.raises(ConfigError, match="there is no kind 'Encodr'"):
        check_component("Encodr", {})
    with pytest.raises(ConfigError, match="no option 'fualt'"):
        check_component(Good, {"fualt": ""})


class Widens(Projector):
    """Says that it keeps the tokens; ``given`` sizes are those of the test."""

    def __init__(self, in_dim: int, out_dim: int, in_tokens: int) -> None:
        super().__init__()
        if in_dim != 3:
            raise ValueError(f"in_dim: {in_dim} is not 3")
        self.num_tokens, self.linear = in_tokens, nn.Linear(in_dim, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """[n, in_tokens, in_dim] -> [n, in_tokens, out_dim]"""
        return self.linear(features)


def test_a_projector_is_built_with_the_given_sizes() -> None:
    check_component(Widens, given={"in_dim": 3})
    with pytest.raises(ConfigError, match="in_dim: 8 is not 3"):
        check_component(Widens)


# ---------------------------------------------------------------- the other kinds


class Meddles(Tuning):
    """Freezes more than its part, or keeps its state in a buffer."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def apply(self, part: nn.Module, model: MultimodalModel) -> None:
        """Mark everything."""
        if self.fault == "others":
            model.backbone.requires_grad_(False)
            model.projectors.requires_grad_(False)
        if self.fault == "buffer":
            part.register_buffer("count", torch.zeros(1))
        if self.fault == "dead":
            part.register_parameter("spare", nn.Parameter(torch.zeros(1)))
        if self.fault == "never":
            raise ConfigError("it fits nothing")


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        ("others", "a strategy changes nothing but its part"),
        ("buffer", "all state of an inserted module lives in parameters: new buffers .*count"),
        ("dead", "a gradient reaches every parameter that learns: .* none reaches spare"),
        ("never", "a strategy fits at least one part: it fits nothing"),
    ],
)
def test_a_strategy_that_meddles_is_found(fault: str, rule: str) -> None:
    with pytest.raises(BrokenContract, match=rule):
        check_component(Meddles, {"fault": fault})


class Thaws(Tuning):
    """Lets every second gradient through; ``remembers`` where it was."""

    def __init__(self, remembers: bool = True) -> None:
        self.remembers, self.steps = remembers, 0

    def apply(self, part: nn.Module, model: MultimodalModel) -> None:
        """All weights learn."""
        self.weights = list(part.requires_grad_(True).parameters())

    def before_step(self, state: Any) -> None:
        """Count; three steps of five are halved."""
        self.steps += 1
        for weight in self.weights:
            weight.grad *= 0.5 if self.steps % 5 < 3 else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Where it is."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on."""
        if self.remembers:
            self.steps = state["steps"]


def test_a_strategy_with_steps_that_forgets_is_found() -> None:
    check_component(Thaws, {"remembers": True})
    with pytest.raises(BrokenContract, match="a strategy that loads a state goes on .*: on vision"):
        check_component(Thaws, {"remembers": False})


class Forgets(Schedule):
    """Counts its steps; forgets the count unless told otherwise."""

    def __init__(self, saves: bool = False) -> None:
        self.saves, self.count = saves, 0

    def before_step(self, state: Any) -> None:
        """A rate for each count."""
        for group in state.optimizer.param_groups:
            group["lr"] = 0.001 * self.count
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count} if self.saves else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state.get("count", 0)


def test_a_schedule_that_forgets_is_found() -> None:
    check_component(Forgets, {"saves": True})
    with pytest.raises(BrokenContract, match="a schedule that loads a state goes on as the one that gave it"):
        check_component(Forgets)


class Counts(Metric):
    """Counts all passes of the class."""

    max_new_tokens = 1
    passes = 0

    def __init__(self, both: bool = False) -> None:
        self.teacher_forced = both
        Counts.passes += 1

    def update(self, model: Any, batch: Any, output: Any) -> None:
        """Nothing."""

    def compute(self) -> dict[str, float]:
        return {"passes": float(Counts.passes)}


def test_a_metric_with_a_memory_and_one_that_wants_both_are_found() -> None:
    with pytest.raises(BrokenContract, match="a metric is deterministic"):
        check_component(Counts)
    with pytest.raises(BrokenContract, match="generated answers or teacher-forced logits, one of them"):
        check_component(Counts, {"both": True})


class Pairs(Source):
    """Two samples; ``fault`` breaks one rule."""

    modalities = frozenset({"vision"})

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def __len__(self) -> int:
        return 0 if self.fault == "empty" else 2

    def __getitem__(self, index: int) -> Sample:
        mark = "" if self.fault == "mark" else "<image>"
        name = "a" if self.fault == "twins" else f"sample {index}"
        modality = "audio" if self.fault == "modality" else "vision"
        return Sample(name, (Message("user", f"{mark}why?"), Message("assistant", "so")), {modality: ("picture.png",)})


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        ("empty", "a source has samples"),
        ("mark", "each <image> stands for one item: number 0 has 0 for 1 items"),
        ("twins", "ids are unique"),
        ("modality", "samples carry declared modalities only: number 0 carries audio"),
    ],
)
def test_a_source_that_misleads_is_found(fault: str, rule: str) -> None:
    check_component(Pairs)
    with pytest.raises(BrokenContract, match=rule):
        check_component(Pairs, {"fault": fault})


# ---------------------------------------------------------------- the page


def test_the_encoder_of_the_page_has_thirty_lines_and_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text(encoding="utf-8")
    section = text.partition("## Bring your own encoder in 30 lines")[2].partition("\n## ")[0]
    blocks = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", section, re.DOTALL))
    assert set(blocks) == {"stripes.py", "test_stripes.py"}
    assert len([line for line in blocks["stripes.py"].splitlines() if line.strip()]) <= 30
    for name, code in blocks.items():
        (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    import test_stripes

    test_stripes.test_stripes_keeps_the_contract()
