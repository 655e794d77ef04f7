"""A forward with attention statistics against the same forward without, and against keeping transformers' eager maps.

The language model has SmolLM2-135M's shape with random weights: 30 layers, 9 heads, 3 key heads, width 576. Times: all sides
alternate in one process. Memory: each side in a process of its own, the peak above what it holds when the model is loaded.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import Result, Row, Spread, compare
from benchmarks.sides import Side, Turns

MARKS = {"answer": 1.1, "all": 1.7}
MEMORY = 0.02
LONG_MB = 4096.0
SAME = 1e-5


@dataclass(frozen=True)
class Sizes:
    """Of the model and the sequences."""

    layers: int = 30
    length: int = 2048
    long: int = 8192


SMALL = Sizes(2, 160, 256)


def model_and_batch(layers: int, length: int) -> tuple[Any, Any]:
    """The model in eval mode, and a batch of one row: a picture, a question, and an answer of a tenth of the row."""
    from PIL import Image

    from mllm_factory import Message, Sample
    from mllm_factory.assemble import build_collator, build_model

    sizes = {
        **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers, "num_attention_heads": 9},
        **{"num_key_value_heads": 3, "max_position_embeddings": length},
    }
    tree = {
        "seed": 0,
        "vision": {"name": "timm", "architecture": "test_vit", "image_size": 96},
        "projector": {"name": "mlp", "depth": 2},
        "backbone": {"name": "hf", "architecture": "llama", "sizes": sizes, "tokenizer": "bytes"},
        "tuning": {part: {"name": "frozen"} for part in ("vision", "projector", "backbone")},
        "data": {"max_length": length},
    }
    model = build_model(tree).eval()
    collator = build_collator(tree, model)
    answer = length // 10

    def sample(question: int) -> Sample:
        turns = (Message("user", "<image>" + "q" * question), Message("assistant", "a" * (answer - 1)))
        return Sample("one", turns, {"vision": (Image.new("RGB", (96, 96), (90, 120, 30)),)})

    words = collator.length(sample(0))
    return model, collator([sample(length - words)])


def forwards(model: Any, batch: Any) -> dict[str, Callable[[], Any]]:
    """Each side's forward."""
    from mllm_factory.components.metrics.attention_capture import observe

    def observed(rows: str) -> Any:
        with observe(model, rows) as recorder:
            model(batch)
        return recorder.stats()

    return {
        "plain": lambda: model(batch).loss_sum,
        "answer": lambda: observed("answer"),
        "all": lambda: observed("all"),
        "eager": lambda: eager(model, batch, maps=False),
        "maps": lambda: eager(model, batch, maps=True),
    }


def eager(model: Any, batch: Any, maps: bool) -> Any:
    """The eager kernel; with ``maps`` the attention of all layers, as ``output_attentions`` keeps it."""
    language = model.backbone.model
    language.set_attn_implementation("eager")
    try:
        if not maps:
            return model(batch).loss_sum
        given = {"inputs_embeds": model.embed(batch), "use_cache": False}
        return language.get_decoder()(**given, output_attentions=True).attentions
    finally:
        language.set_attn_implementation("sdpa")


def serve(turns: Turns, side: str, layers: int, length: int) -> None:
    """One side in its own process: a forward at each step."""
    import torch

    model, batch = model_and_batch(layers, length)
    forward = forwards(model, batch)[side]
    with torch.no_grad():
        model.features("vision", batch.media["vision"])  # what a first use loads
        turns.begin()
        while True:
            found = forward()
            turns.step()
            del found


def check(result: Result) -> None:
    """At a small size, both ways give the same masses, and the forward is the same with and without."""
    import torch

    from mllm_factory.components.metrics.attention_groups import GROUPS, key_groups

    model, batch = model_and_batch(2, 160)
    with torch.no_grad():
        sides = forwards(model, batch)
        loss, stats, maps = sides["plain"](), sides["all"](), torch.stack(sides["maps"]())
        from mllm_factory.components.metrics.attention_capture import observe

        with observe(model):
            same = model(batch).loss_sum
    groups = key_groups(batch, model.backbone.tokenizer.bos_token_id)[0]
    masses = [maps[:, :, :, :, groups == g].sum(-1).mean(2) for g in range(len(GROUPS))]
    gap = float((torch.stack(masses, -1) - stats.rows).abs().max())
    result.facts["largest difference to eager masses"] = gap
    result.checks[f"masses equal to {SAME:g}"] = gap <= SAME
    result.checks["losses equal"] = bool(torch.equal(loss, same))


def measure_times(result: Result, sizes: Sizes, runs: int) -> None:
    """All sides in turns."""
    import torch

    model, batch = model_and_batch(sizes.layers, sizes.length)
    sides = {name: forward for name, forward in forwards(model, batch).items() if name != "maps"}
    wall: dict[str, list[float]] = {name: [] for name in sides}
    used: dict[str, list[float]] = {name: [] for name in sides}
    gc.collect()
    with torch.no_grad():
        for turn in range(runs + 1):  # the first one warms up
            for name in list(sides) if turn % 2 else reversed(list(sides)):
                clock, cpu = time.perf_counter(), time.process_time()
                sides[name]()
                if turn:
                    wall[name].append(1e3 * (time.perf_counter() - clock))
                    used[name].append(1e3 * (time.process_time() - cpu))
    for rows, mark in MARKS.items():
        case = f"{rows} rows, {sizes.length} tokens"
        result.rows.append(compare(f"{case}, against plain", "ms", wall[rows], wall["plain"], "<=", mark))
        result.rows.append(compare(f"{case}, against plain", "CPU ms", used[rows], used["plain"]))
        result.rows.append(compare(f"{case}, against eager", "CPU ms", used[rows], used["eager"], "<=", 1.0))


def extra(side: str, layers: int, length: int) -> tuple[float, float]:
    """MB of one forward above the loaded model, and of the whole process, in a fresh one."""
    process = Side(serve, side, layers, length)
    report = process.turn(1)
    process.close()
    return report["extra"] / 1e6, (report["extra"] + process.idle["idle"]) / 1e6


def measure_memory(result: Result, sizes: Sizes) -> None:
    """Peaks, each of a fresh process. What a plain forward takes is subtracted from both sides."""
    plain = extra("plain", sizes.layers, sizes.length)[0]
    kept = max(extra("maps", sizes.layers, sizes.length)[0] - plain, 0.1)
    for rows in MARKS:
        ours = max(extra(rows, sizes.layers, sizes.length)[0] - plain, 0.1)
        case = f"{rows} rows, {sizes.length} tokens, above plain, against kept maps"
        result.rows.append(compare(case, "MB", [ours], [kept], "<=", MEMORY))
    few = max(2, sizes.layers // 5)
    above = max(extra("all", few, sizes.length)[0] - extra("plain", few, sizes.length)[0], 0.1)
    result.facts[f"all rows with {few} layers, MB above plain"] = round(above, 1)
    ours, other = (extra(side, sizes.layers, sizes.long)[1] for side in ("all", "plain"))
    case = f"all rows, {sizes.long} tokens, whole process, against plain"
    mine, theirs, ratio = Spread.of([ours]), Spread.of([other]), Spread.of([ours / other])
    result.rows.append(Row(case, "MB", mine, theirs, ratio, mark=LONG_MB, absolute=True))


def run(runs: int | None, small: bool) -> Result:
    """Check, times, memory. A run is one forward of each side."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sizes = SMALL if small else Sizes()
    result = Result("attention", "the same forward without statistics, with eager attention, and with its maps kept")
    check(result)
    measure_times(result, sizes, runs or 5)
    measure_memory(result, sizes)
    return result
