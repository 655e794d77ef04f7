"""What data costs: the start on a large file, samples per second of one loader worker, and data's share of the quickstart.

The start is compared with reading the file into a list of dicts, each in a process of its own; the worker with cached features
and without.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.harness import Result, Row, Spread, compare

SAMPLES, SMALL_SAMPLES = 665_000, 3_000
SECONDS, MEGABYTES, PER_SECOND, SHARE = 5.0, 500.0, 2000.0, 0.5
START = """
import json, sys, time
{imports}
def held(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))
idle, start = held("VmRSS"), time.perf_counter()
{call}
seconds = time.perf_counter() - start
print(json.dumps([len(source), seconds, held("VmHWM") - idle, held("VmHWM")]))
"""
OURS = (
    "from mllm_factory import Source, build; from mllm_factory.registry import load_packs; load_packs()",
    "source = build(Source, {'name': 'llava_json', 'path': sys.argv[1]}, 'data.train')",
)
OTHER = (
    "",
    "text = open(sys.argv[1]).read(); source = [json.loads(t) for t in text.splitlines()] if sys.argv[1][-1] == 'l' else json.loads(text)",
)


# ---------------------------------------------------------------- the start


def write(folder: Path, samples: int) -> list[Path]:
    """The same conversations as a JSON array on one line, and as JSON lines: one to ten questions about a picture."""
    draw = random.Random(0)
    words = [f"w{i}" for i in range(997)]
    files = [folder / "talk.json", folder / "talk.jsonl"]
    with files[0].open("w") as array, files[1].open("w") as lines:
        for i in range(samples):
            turns = []
            for k in range(draw.randint(1, 10)):
                start = draw.randrange(900)
                question = ("<image>\n" if k == 0 else "") + " ".join(words[start : start + 12])
                turns += [
                    {"from": "human", "value": question},
                    {"from": "gpt", "value": " ".join(words[start // 2 : start // 2 + 36])},
                ]
            text = json.dumps({"id": f"{i:09d}", "image": f"coco/train2017/{i:012d}.jpg", "conversations": turns})
            array.write(("[" if i == 0 else ", ") + text)
            lines.write(text + "\n")
        array.write("]")
    return files


def start(file: Path, side: tuple[str, str]) -> tuple[int, float, float, float]:
    """Samples, seconds, most megabytes above those after the imports, and most in all, of a fresh process."""
    code = START.format(imports=side[0], call=side[1])
    env = {**os.environ, "MLLM_FACTORY_CACHE": str(file.parent / "absent" / file.name)}  # nothing is kept from before
    shutil.rmtree(file.parent / "absent", ignore_errors=True)
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True, env=env)
    found = json.loads(done.stdout.splitlines()[-1])
    return int(found[0]), float(found[1]), float(found[2]), float(found[3])


def starts(result: Result, samples: int, runs: int) -> None:
    """Both file formats, both sides."""
    with tempfile.TemporaryDirectory() as folder:
        for file in write(Path(folder), samples):
            found = [(start(file, OURS), start(file, OTHER)) for _ in range(runs)]
            case = f"start on {samples:,} samples, {file.suffix}"
            result.checks[f"{case}: all are there"] = {n for pair in found for n, *_ in pair} == {samples}
            result.facts[f"{case}: file, MB"] = round(file.stat().st_size / 1e6)
            result.facts[f"{case}: MB of the whole process, with libraries"] = round(max(a[3] for a, _ in found))
            for unit, k, mark in (("seconds", 1, SECONDS), ("MB above libraries", 2, MEGABYTES)):
                row = compare(case, unit, [a[k] for a, _ in found], [b[k] for _, b in found], "<=", mark)
                result.rows.append(Row(**{**vars(row), "absolute": True}))


# ---------------------------------------------------------------- one worker


def quickstart(limit: int, folder: Path) -> tuple[Any, Any, Any, Any]:
    """Tree, model with cached features, training collator and source of the quickstart, with every picture's features stored."""
    import torch

    from mllm_factory.assemble import build_collator, build_model, build_source
    from mllm_factory.cached_items import CachedItems
    from mllm_factory.config import compose
    from mllm_factory.features import cache_features

    tree = compose("train", ["experiment=quickstart", f"data.train.limit={limit}"]).tree
    if tree is None:
        raise RuntimeError("the quickstart does not compose")
    model = build_model(tree)
    source = build_source(tree, "train", {"vision"})
    collator = build_collator(tree, model)
    encoder: Any = model.encoders["vision"]
    cache_features(encoder, folder / "vision.f32")
    cached = collator.for_training(stored={"vision": CachedItems(folder / "vision.f32")})
    seen: set[str] = set()
    for i in range(len(source)):
        sample = source[i]
        if sample.media["vision"][0] not in seen:
            seen.add(sample.media["vision"][0])
            with torch.no_grad():
                encoder(cached([sample]).media["vision"])
    return tree, collator, cached, source


def loading(tree: Any, collate: Any, source: Any) -> Iterator[Any]:
    """Endless batches of one worker, in the order that training would take."""
    from mllm_factory.assemble import length_of
    from mllm_factory.loader import Order, train_batches

    size, bucket = tree["trainer"]["batch_size"], tree["trainer"]["bucket"]
    order = Order(len(source), size, tree["seed"], length_of(source, collate), bucket)
    return train_batches(source, collate, order, first=0, world=1, rank=0, workers=1, pin=False)


def rate(tree: Any, collate: Any, source: Any, batches: int) -> float:
    """Samples per second of the clock, once the worker runs."""
    stream = loading(tree, collate, source)
    next(stream)
    begin = time.perf_counter()
    count = sum(len(batch.ids) for batch in islice(stream, batches))
    return count / (time.perf_counter() - begin)


def worker(result: Result, runs: int, small: bool) -> None:
    """One worker with cached features against one that decodes."""
    with tempfile.TemporaryDirectory() as folder:
        tree, plain, cached, source = quickstart(300 if small else 5000, Path(folder))
        batches = 10 if small else 150
        found = [(rate(tree, cached, source, batches), rate(tree, plain, source, batches)) for _ in range(runs)]
        ours, other = ([pair[k] for pair in found] for k in (0, 1))
        ratios = Spread.of([a / b for a, b in found])
        case = "one worker, cached features"
        result.rows.append(Row(case, "samples/s", Spread.of(ours), Spread.of(other), ratios, ">=", PER_SECOND, True))
        batch = next(loading(tree, cached, source))
        result.checks["batches with cached features carry no pixels"] = batch.media["vision"].ndim == 1


# ---------------------------------------------------------------- data's share of training


def waiting(workers: int, steps: int) -> tuple[float, float]:
    """Seconds that the quickstart's training waits for batches, and seconds in all, from its first step on."""
    from mllm_factory import run
    from mllm_factory.config import compose

    overrides = [
        *("experiment=quickstart", f"trainer.max_steps={steps}", f"trainer.workers={workers}", "metrics=null"),
        *(f"trainer.save_every={steps}", "trainer.device=cpu"),
    ]
    spent = [0.0, 0.0]
    with tempfile.TemporaryDirectory() as folder:
        tree = compose("train", [*overrides, f"output_dir={folder}/run"]).tree
        original = run._batches

        def timed(*given: Any) -> Iterator[Any]:
            stream, first = original(*given), time.perf_counter()
            while True:
                begin = time.perf_counter()
                batch = next(stream)
                spent[0], spent[1] = spent[0] + time.perf_counter() - begin, time.perf_counter() - first
                yield batch

        run._batches = timed
        try:
            run.train(tree or {})
        finally:
            run._batches = original
    return spent[0], spent[1]


def shares(result: Result, runs: int, small: bool) -> None:
    """The quickstart with the loader in the training process, and with one worker."""
    steps = 6 if small else 60
    for workers in (0, 1):
        found = [waiting(workers, steps) for _ in range(runs)]
        waits, whole = ([1e3 * pair[k] / steps for pair in found] for k in (0, 1))
        result.rows.append(
            compare(f"waiting for data in the quickstart, {workers} workers", "ms a step", waits, whole, "<=", SHARE)
        )


def run(runs: int | None, small: bool) -> Result:
    """All three. ``other`` is a list of dicts, a worker that decodes, and the whole step."""
    result = Result("data", "a list of dicts; a worker that decodes; the whole step")
    starts(result, SMALL_SAMPLES if small else SAMPLES, runs or (1 if small else 3))
    worker(result, runs or (1 if small else 5), small)
    shares(result, runs or (1 if small else 3), small)
    return result
