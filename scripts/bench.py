"""Measure the project against its alternatives: ``python scripts/bench.py NAME [--json]``; ``--help`` tells the names.

Both sides run alternately on the same machine; the result is the median of the pairwise ratios with the smallest and the
largest. Speed is reported and never enforced: the exit code is 1 only where the two sides compute different things.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from benchmarks import harness

BENCHES = {
    "overhead": "train step and forward against the same model in plain PyTorch",
    "step": "train step and memory against transformers' LLaVA with its Trainer",
    "tuning": "MoReS against nothing trained in the backbone and its published arithmetic, LoRA against peft",
    "commit": "what measuring the learning balance costs against plain steps",
    "startup": "CPU time and memory of the command line's quick verbs",
    "check": "time and memory of checking models that no laptop holds",
    "compose": "composition and validation of a tree against bare Hydra",
    "sweep": "a job of a sweep against the same training by hand, two at a time against one after the other",
    "data": "start on a large file, one worker, data's share of a step",
    "packing": "packed rows against padded ones",
    "attention": "a forward with attention statistics against one without, and against eager maps",
}
DOCS = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def main() -> int:
    """Run one benchmark and show its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=BENCHES, help="; ".join(f"{name}: {what}" for name, what in BENCHES.items()))
    parser.add_argument("--json", action="store_true", help="print JSON on stdout and nothing else")
    parser.add_argument("--runs", type=int, help="measured pairs; default: the benchmark's own")
    parser.add_argument("--small", action="store_true", help="smallest sizes, to see that it works")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = parser.parse_args()
    result = import_module(f"benchmarks.{given.bench}").run(given.runs, given.small)
    if given.json:
        print(json.dumps(result.as_json(), indent=2))
    else:
        harness.show(result)
    if given.write:
        write(result)
    return 0 if result.ok else 1


def write(result: harness.Result) -> None:
    """Put a result's table between its two comments in docs/benchmarks.md."""
    start, end = f"<!-- {result.bench} -->\n", f"<!-- /{result.bench} -->"
    text = DOCS.read_text(encoding="utf-8")
    block = f"{start}{harness.markdown(result)}\n{end}"
    DOCS.write_text(
        re.sub(re.escape(start) + ".*?" + re.escape(end), lambda _: block, text, flags=re.S), encoding="utf-8"
    )


if __name__ == "__main__":
    sys.exit(main())
