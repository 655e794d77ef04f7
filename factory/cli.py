"""The command ``mllm-factory``: verbs, help, and errors as one line each. What a verb needs is imported when it is called."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from mllm_factory.errors import ConfigError, UserError, hint

INTERRUPTED = 130


class Verb(NamedTuple):
    """A verb's module and function, its arguments and what it does."""

    module: str
    function: str
    arguments: str
    summary: str


VERBS = {
    "train": Verb("launch", "train", "[overrides] [-m]", "train a model, evaluate it, write a report"),
    "evaluate": Verb(
        "launch", "evaluate", "[checkpoint=F] [overrides] [-m]", "evaluate a checkpoint or a composed model"
    ),
    "imbalance": Verb(
        "launch", "imbalance", "checkpoint=F [overrides] [-m]", "measure whether a model looks and listens"
    ),
    "check": Verb(
        "doctor",
        "check",
        "[checkpoint=F] [overrides] [--json] [--processes N] [--machine flops=3e14,...]",
        "compose, validate and count, without weights",
    ),
    "list": Verb("catalog", "list_", "[group|kind] [--components] [--json]", "presets and registered components"),
    "describe": Verb(
        "catalog", "describe", "<group|kind> <name> [--json]", "one preset or component, option by option"
    ),
    "env": Verb("doctor", "env", "[--json]", "versions and hardware, for a bug report"),
    "report": Verb(
        "report",
        "report",
        "<folder> [<folder> ...] [--columns a,b] [--output DIR] [--json]",
        "compare the runs of a sweep",
    ),
    "export": Verb(
        "export", "export", "checkpoint=F [merge=true] [output=F]", "write a trained model as a folder of its own"
    ),
    "completion": Verb("completion", "completion", "bash|zsh|fish", "print a shell's completion script"),
}

EXAMPLES = """\
  mllm-factory train                                      the default: easy-VQA with a small decoder
  mllm-factory train backbone=smollm2_135m tuning=lora    swap parts by name
  mllm-factory train -m projector.depth=1,2,3             one job for each value
  mllm-factory check tuning=lora tuning.backbone.rank=4   what would be built and trained
  mllm-factory evaluate checkpoint=outputs/mllm/<run>     a finished run again"""

CONFIG_FLAGS = """\
  group=preset, group.key=value   overrides; 'mllm-factory list' shows groups and presets
  --config-dir, -cd DIR           a folder of your own presets
  --config-name, -cn NAME         another primary config; --config-path, -cp DIR: where it is
"""
RUN_FLAGS = """\
  --multirun, -m                  one job for each combination of values: key=1,2,3
  --cfg job [--resolve]           print the tree instead of running; --package, -p KEY: a part of it
  --info, --hydra-help            more about how it is composed
"""
REPORT_FLAGS = """\
  --columns A,B                   keys of report.json; default: each metric's main value and the costs
  --main KEY                      the metric that ranks; default: the first column with a better way
  --up A,B, --down A,B            keys of which more, or less, is better, where their names do not say so
  --by A,B                        keys of the config that name the configurations; default: those that vary
  --output DIR                    default: <folder>/report, or ./report of several folders
  --any                           compare runs that were judged on different data
  --json                          print JSON; files are written only with --output
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, 2 for a user's mistake, 130 after Ctrl-C.
    """
    gc.disable()  # start-up allocates much and frees little; the verbs that build a model turn it on again
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # where a user's own classes are found
    try:
        code = _dispatch(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # here, where a closed pipe can still be met quietly
        return code
    except UserError as error:
        show(error)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        gc.freeze()  # nothing is left to collect at exit


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(usage())
        return 0
    if argv[0] in ("--version", "-V"):
        from mllm_factory.doctor import version

        print(f"mllm-factory {version('mllm-factory')}")
        return 0
    verb = VERBS.get(argv[0])
    if verb is None:
        raise UserError(f"there is no verb '{argv[0]}'{hint(argv[0], VERBS)}")
    if "--help" in argv or "-h" in argv:
        print(verb_usage(argv[0]))
        return 0
    run: Callable[[list[str]], int] = getattr(import_module(f"mllm_factory.{verb.module}"), verb.function)
    return run(argv[1:])


def usage() -> str:
    """The help of the command."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:{width}}  {verb.summary}" for name, verb in VERBS.items())
    return (
        "mllm-factory composes, trains and evaluates multimodal LLMs from one YAML tree.\n\n"
        f"usage: mllm-factory <verb> [arguments]\n\n{verbs}\n\nexamples:\n{EXAMPLES}\n\n"
        "'mllm-factory <verb> --help' tells more about a verb."
    )


def verb_usage(name: str) -> str:
    """The help of one verb."""
    verb = VERBS[name]
    doctor = CONFIG_FLAGS if name == "check" else ""
    flags = {"launch": CONFIG_FLAGS + RUN_FLAGS, "doctor": doctor, "report": REPORT_FLAGS}.get(verb.module, "")
    text = f"usage: mllm-factory {name} {verb.arguments}\n\n{verb.summary[0].upper()}{verb.summary[1:]}."
    return f"{text}\n\n{flags}".rstrip()


def show(error: UserError, prefix: str = "") -> None:
    """Print an error on stderr, each of its problems as one line."""
    problems = error.problems if isinstance(error, ConfigError) else [error]
    for problem in problems:
        print(f"error: {prefix}{' '.join(str(problem).split())}", file=sys.stderr)
