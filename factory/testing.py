"""The contract of components as a function, for anybody's own tests: ``check_component(MyEncoder, size=64)``.

Every rule is one sentence, and what breaks it raises ``BrokenContract`` that begins with the rule.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any, NoReturn

import torch
from torch import Tensor

from mllm_factory.errors import ConfigError
from mllm_factory.interfaces import KINDS, Backbone, Encoder, Metric, Projector, Schedule, Source, Tuning
from mllm_factory.randomness import seed_all
from mllm_factory.registry import build, kind_of
from mllm_factory.testing_model import inputs, learned_by, measured, near, output, rates_of, raw_item
from mllm_factory.types import PLACEHOLDERS, Sample
from mllm_factory.weightless import weightless

SIZES = {"in_dim": 8, "out_dim": 16, "in_tokens": 16}
"""What a projector is built with unless a test says otherwise: a grid of 4 x 4 tokens."""


class BrokenContract(AssertionError):
    """A component does not keep a rule of its kind; the message begins with the rule."""


def check_component(
    component: type | str, node: Mapping[str, Any] | None = None, *, given: Mapping[str, int] | None = None
) -> None:
    """Hold a component against the contract of its kind: a line in a test of its own.

    Args:
        component: the class; or a kind (``Encoder`` or ``"Encoder"``), and the node's ``name`` says which.
        node: its options as in YAML; sizes that make a build and a forward pass quick. Weights are those of the node:
            ``pretrained: null`` for no download.
        given: for a projector, ``in_dim``, ``out_dim`` and ``in_tokens``; what is left out is as in ``SIZES``.

    Raises:
        BrokenContract: names the rule and what was found.
        ConfigError: the node does not fit the class.
    """
    kind, full = _resolved(component, dict(node or {}))
    sizes: dict[str, Any] = {**SIZES, **(given or {})} if kind is Projector else {}

    def make(seed: int = 0) -> Any:
        seed_all(seed)
        return build(kind, full, **sizes)

    part = make()
    _require(isinstance(part, kind), f"a {kind.__name__} is built from its node", f"got {type(part).__name__}")
    for rule in RULES[kind]:
        rule(make, sizes)


def _resolved(component: type | str, node: dict[str, Any]) -> tuple[type, dict[str, Any]]:
    """The kind, and a node that names the class."""
    if isinstance(component, str) and component not in KINDS:
        raise ConfigError(f"there is no kind '{component}'; known: {', '.join(KINDS)}")
    cls = KINDS[component] if isinstance(component, str) else component
    if cls in KINDS.values():
        return cls, node
    kind = KINDS[kind_of(cls)]
    path = f"{cls.__module__}:{cls.__qualname__}"
    if "<locals>" in path:
        _break("a component is defined at the top level of a module, where configs and loader workers find it", path)
    return kind, {**node, "name": path}


def _break(rule: str, found: object) -> NoReturn:
    raise BrokenContract(f"{rule}: {' '.join(str(found).split())}")


def _require(kept: bool, rule: str, found: object) -> None:
    if not kept:
        _break(rule, found)


Make = Callable[..., Any]
Sizes = Mapping[str, int]


# ---------------------------------------------------------------- encoders, projectors, backbones


def _sizes_are_true(make: Make, sizes: Sizes) -> None:
    part = make().eval()
    for rows in (1, 3):
        with torch.no_grad():
            found = tuple(output(part, inputs(part, sizes, rows)).shape)
        if isinstance(part, Backbone):
            _require(found[:2] == (rows, 6), "a backbone gives scores for each token", found)
            continue
        width = part.dim if isinstance(part, Encoder) else sizes["out_dim"]
        says = (rows, part.num_tokens, width)
        _require(found == says, "the declared sizes are those of the output", f"says {says}, gives {found}")


def _gradients_reach_all(make: Make, sizes: Sizes) -> None:
    part = make().train()
    learning = {name: p for name, p in part.named_parameters() if p.requires_grad}
    fixed = [name for name, p in part.named_parameters() if not p.requires_grad]
    _require(not fixed, "only a tuning sets requires_grad", f"{', '.join(fixed[:3])} is frozen by its own class")
    if not learning:
        return
    output(part, inputs(part, sizes)).float().square().sum().backward()
    dead = [name for name, p in learning.items() if p.grad is None]
    _require(not dead, "a gradient reaches every parameter", f"none reaches {', '.join(dead[:3])}")
    broken = [name for name, p in learning.items() if p.grad is not None and not p.grad.isfinite().all()]
    _require(not broken, "gradients are finite", f"that of {', '.join(broken[:3])} is not")


def _a_seed_gives_one_part(make: Make, sizes: Sizes) -> None:
    states = [make(seed).state_dict() for seed in (3, 3, 4)]
    same = states[0].keys() == states[1].keys() and all(torch.equal(t, states[1][k]) for k, t in states[0].items())
    _require(same, "two builds with one seed are equal", "they differ")
    if not any(p.numel() for p in make().parameters()):
        return
    other = any(not torch.equal(t, states[2][k]) for k, t in states[0].items())
    _require(other, "weights are drawn from the seed", "two seeds give equal weights; draw them while building")


def _state_is_complete(make: Make, sizes: Sizes) -> None:
    one, other = make(0).eval(), make(1).eval()
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        given = inputs(one, sizes)
        same = torch.equal(output(one, given), output(other, given))
    _require(same, "a saved and loaded state gives bit-equal output", "something of the part is not in its state_dict")


def _half_precision_works(make: Make, sizes: Sizes) -> None:
    part = make().eval()
    with torch.no_grad():
        given = inputs(part, sizes)
        whole = output(part, given)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = output(part, given)
        low = output(part.bfloat16(), given)
    _require(bool(mixed.isfinite().all()), "output under bf16 autocast is finite", "it is not")
    _require(mixed.shape == whole.shape, "bf16 autocast changes no shape", tuple(mixed.shape))
    weighted = next(part.parameters(), None) is not None
    _require(not weighted or low.dtype is torch.bfloat16, "a part in bf16 gives bf16", low.dtype)
    _require(bool(low.isfinite().all()), "output in bf16 is finite", "it is not")


def _items_are_independent(make: Make, sizes: Sizes) -> None:
    part = make().eval()
    with torch.no_grad():
        given = inputs(part, sizes)
        together = output(part, given)
        for i in range(len(given)):
            alone = output(part, given[i : i + 1])
            _require(
                near(alone, together[i : i + 1]), "an item does not depend on the others of a batch", f"item {i} does"
            )


def _builds_without_memory(make: Make, sizes: Sizes) -> None:
    real = make()
    with weightless():
        empty = make()
    devices = {p.device.type for p in empty.parameters()}
    _require(devices <= {"meta"}, "on the meta device no parameter takes memory", f"found {', '.join(sorted(devices))}")
    shapes = [{name: p.shape for name, p in part.named_parameters()} for part in (real, empty)]
    _require(
        shapes[0] == shapes[1], "built on the meta device, parameters have the same names and shapes", "they differ"
    )
    for size in ("dim", "num_tokens", "max_positions"):
        pair = getattr(real, size, None), getattr(empty, size, None)
        _require(pair[0] == pair[1], f"built on the meta device, {size} is the same", f"{pair[0]} and {pair[1]}")


def _transform_travels(make: Make, sizes: Sizes) -> None:
    encoder = make()
    _require(encoder.modality in ("vision", "audio"), "modality is vision or audio", encoder.modality)
    item = raw_item(encoder)
    items = encoder.transform(item)
    _require(
        isinstance(items, Tensor) and len(items) >= 1, "transform gives [m, *item_shape], m >= 1", type(items).__name__
    )
    _require(items.device.type == "cpu", "transform works on the CPU", items.device)
    _require(torch.equal(items, encoder.transform(item)), "transform is deterministic", "two calls differ")
    try:
        travelled = ForkingPickler.loads(ForkingPickler.dumps(encoder.transform))
    except Exception as error:  # whatever pickling meets
        _break("transform can be sent to loader workers", f"{type(error).__name__}: {error}")
    _require(torch.equal(items, travelled(item)), "transform gives the same in a loader worker", "it does not")
    shape = encoder.transform(raw_item(encoder, 1)).shape[1:]
    _require(shape == items.shape[1:], "all items have one shape", f"{tuple(items.shape[1:])} and {tuple(shape)}")


def _backbone_parts_fit(make: Make, sizes: Sizes) -> None:
    part: Backbone = make().eval()
    with torch.no_grad():
        embeds = part.embed(inputs(part, sizes))
        hidden = part(embeds)
        _require(
            embeds.shape == hidden.shape == (3, 6, part.dim), "embed and forward give [B, T, dim]", tuple(hidden.shape)
        )
        ahead = part(embeds[:, :4])
        _require(near(ahead, hidden[:, :4]), "a token does not see later ones", "the first four of six tokens changed")
        mask = torch.ones(3, 6, dtype=torch.bool)
        masked = part(embeds, mask)
        _require(near(masked, hidden), "a mask without padding changes nothing", "it does")
        pairs = [part.generate(embeds, mask, max_new_tokens=4, stop_ids=[], use_cache=cache) for cache in (True, False)]
    _require(
        torch.equal(*pairs),
        "generation with and without cache is equal",
        f"{pairs[0][0].tolist()}, {pairs[1][0].tolist()}",
    )
    _require(
        pairs[0].shape == (3, 4), "generate gives [B, max_new_tokens] where nothing stops it", tuple(pairs[0].shape)
    )
    _require(len(part.layers) > 0, "layers lists the decoder layers", "it is empty")
    limit = part.max_positions
    _require(limit is None or limit > 0, "max_positions is above 0 or None", limit)
    _require(bool(part.tokenizer.chat_template), "the tokenizer has a chat template", "it has none")
    _require(part.tokenizer.pad_token_id is not None, "the tokenizer has a padding token", "it has none")


# ---------------------------------------------------------------- the other kinds


def _tuning_only_marks(make: Make, sizes: Sizes) -> None:
    learned_by(make, _require)


def _schedule_continues(make: Make, sizes: Sizes) -> None:
    first, state = rates_of(make(), None)
    _require(all(r >= 0 for rates in first for r in rates), "rates are 0 or more at every step", first)
    again, _ = rates_of(make(), state)
    _require(
        again == first[2:], "a schedule that loads a state goes on as the one that gave it", f"{again}, {first[2:]}"
    )


def _metric_says_what_it_needs(make: Make, sizes: Sizes) -> None:
    metric: Metric = make()
    _require(
        isinstance(metric.max_new_tokens, int) and metric.max_new_tokens >= 0, "max_new_tokens is 0 or more", metric
    )
    needs = (metric.max_new_tokens > 0, metric.teacher_forced)
    _require(needs[0] != needs[1], "a metric takes generated answers or teacher-forced logits, one of them", needs)
    values = measured(make)
    _require(bool(values), "compute gives at least one number", "it gave none")
    wrong = [key for key, value in values.items() if not (isinstance(key, str) and isinstance(value, int | float))]
    _require(not wrong, "compute gives keys to numbers", wrong)
    _require(values == measured(make), "a metric is deterministic", "two passes over the same data differ")


def _source_gives_samples(make: Make, sizes: Sizes) -> None:
    source: Source = make()
    _require(source.modalities <= {"vision", "audio"}, "modalities are of vision and audio", sorted(source.modalities))
    _require(len(source) > 0, "a source has samples", "it is empty")
    try:
        travelled = ForkingPickler.loads(ForkingPickler.dumps(source))
    except Exception as error:  # whatever pickling meets
        _break("a source can be sent to loader workers", f"{type(error).__name__}: {error}")
    ids = []
    for i in range(min(3, len(source))):
        sample = source[i]
        _require(isinstance(sample, Sample), "a source gives samples", type(sample).__name__)
        _require(sample == source[i] == travelled[i], "a sample is always the same", f"number {i} is not")
        _require(bool(sample.id and sample.messages), "a sample has an id and messages", sample)
        extra = set(sample.media) - source.modalities
        _require(not extra, "samples carry declared modalities only", f"number {i} carries {', '.join(extra)}")
        text = "".join(m.text for m in sample.messages if m.role != "assistant")
        for mark, modality in PLACEHOLDERS.items():
            pair = text.count(mark), len(sample.media.get(modality, ()))
            _require(
                pair[0] == pair[1], f"each {mark} stands for one item", f"number {i} has {pair[0]} for {pair[1]} items"
            )
        ids.append(sample.id)
    _require(len(set(ids)) == len(ids), "ids are unique", ids)


_MODULE = (
    *(_sizes_are_true, _gradients_reach_all, _a_seed_gives_one_part, _state_is_complete),
    *(_half_precision_works, _items_are_independent, _builds_without_memory),
)
RULES: dict[type, tuple[Callable[[Make, Sizes], None], ...]] = {
    Encoder: (*_MODULE, _transform_travels),
    Projector: _MODULE,
    Backbone: (*_MODULE, _backbone_parts_fit),
    Tuning: (_tuning_only_marks,),
    Schedule: (_schedule_continues,),
    Metric: (_metric_says_what_it_needs,),
    Source: (_source_gives_samples,),
}
"""The rules of each kind."""
