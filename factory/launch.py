"""``train``, ``evaluate`` and ``imbalance``: check everything first, then hand over to Hydra, which makes folders, sweeps and jobs."""

from __future__ import annotations

import argparse
import errno
import gc
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from mllm_factory import presets, runs, stages, sweep_command
from mllm_factory.cli import show
from mllm_factory.config import VERSION_BASE, Composed, Composer, plain
from mllm_factory.errors import ConfigError, Problem, UserError
from mllm_factory.flags import Parser, config_flags, hydra_flags, shown
from mllm_factory.overrides import expand, is_choice, origin, parse, quoted
from mllm_factory.stored import PRIMARY, store
from mllm_factory.sweep_space import one_by_one

MOST_CHECKED = 256
"""Combinations of a sweep that are checked before the first job starts."""

_QUIET = ["hydra.output_subdir=null", "hydra/job_logging=disabled", "hydra/hydra_logging=disabled", "hydra.run.dir=."]
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}
_origin: list[Callable[[str], str]] = []


def train(argv: Sequence[str]) -> int:
    """The verb ``train``."""
    flags = _sweeping(hydra_flags(config_flags(Parser())).read(argv), "train")
    composer = Composer(flags.config_name or "train", _dirs(flags), flags.config_path, keep=flags.multirun)
    return _start(_train_job, "train", composer, flags)


def evaluate(argv: Sequence[str]) -> int:
    """The verb ``evaluate``: with ``checkpoint=F`` that checkpoint's config is the tree."""
    flags = _sweeping(hydra_flags(config_flags(Parser())).read(argv), "evaluate")
    checkpoints, rest = split_checkpoint(flags.overrides)
    if not checkpoints:
        composer = Composer(flags.config_name or "evaluate", _dirs(flags), flags.config_path, keep=flags.multirun)
        return _start(_evaluate_job, "evaluate", composer, flags)
    if len(checkpoints) > 1 and not flags.multirun:
        raise ConfigError(Problem("several checkpoints; add -m to evaluate one after the other", "checkpoint"))
    flags.overrides = rest
    flags.multirun = flags.multirun and any(override.is_sweep_override() for override in parse(rest)[0])
    if flags.sweep_resume and not flags.multirun:
        raise ConfigError(Problem("nothing is swept here; leave it out", "sweep.resume"))
    if flags.multirun and not any(text.startswith("hydra/launcher=") for text in rest):
        flags.overrides = ["hydra/launcher=processes", *rest]  # a checkpoint's config says nothing about that
    codes = []
    for i, folder in enumerate(checkpoints):
        flags.fixed = [f"checkpoint={os.path.abspath(folder)}"]
        composer, problems, trusted = of_checkpoint(folder, flags, f"_{i}" if len(checkpoints) > 1 else "")
        codes.append(_start(_evaluate_job, "evaluate", composer, flags, problems, registered_only=not trusted))
    return max(codes)


def imbalance(argv: Sequence[str]) -> int:
    """The verb ``imbalance``: ``evaluate`` with ``metrics=imbalance`` unless other metrics are chosen."""
    return evaluate(argv if any(text.startswith("metrics=") for text in argv) else ["metrics=imbalance", *argv])


def _dirs(flags: argparse.Namespace) -> list[str]:
    return [flags.config_dir] if flags.config_dir else []


# ---------------------------------------------------------------- sweeps


def _sweeping(flags: argparse.Namespace, verb: str) -> argparse.Namespace:
    """Flags with ``sweep.<option>`` read; ``sweep.resume=<folder>`` alone takes the overrides from that sweep's folder."""
    flags.overrides, flags.sweep_resume = sweep_command.split(flags.overrides, flags.multirun)
    flags.fixed, flags.given = [], list(flags.overrides)
    if flags.sweep_resume not in (None, "auto") and all(
        text.lstrip("+").startswith(("hydra.", "hydra/")) for text in flags.overrides
    ):
        call = sweep_command.stored(Path(flags.sweep_resume), verb)
        before = hydra_flags(config_flags(Parser())).read([*call.flags, "-m", *call.fixed, *call.overrides])
        flags.overrides = [*before.overrides, *(text for text in flags.overrides if text not in before.overrides)]
        for name in ("config_path", "config_name", "config_dir"):
            setattr(flags, name, getattr(flags, name) or getattr(before, name))
    return flags


def _call(flags: argparse.Namespace, verb: str) -> sweep_command.Call:
    """The command line as the jobs of a sweep repeat it, whatever folder they are in."""
    given = []
    for flag in ("config_path", "config_name", "config_dir"):
        value = getattr(flags, flag)
        path = value and flag != "config_name" and "://" not in value
        given += [f"--{flag.replace('_', '-')}", os.path.abspath(value) if path else value] if value else []
    own = split_checkpoint(flags.given)[1] if flags.fixed else flags.given
    return sweep_command.Call(verb, given, flags.fixed, own)


def _resumed(flags: argparse.Namespace, parsed: Sequence[Override], composed: Composed) -> list[str]:
    """Hydra's overrides that continue a sweep."""
    if not flags.sweep_resume:
        return []
    own = [str(override.value()) for override in parsed if override.key_or_group == "hydra.sweep.dir"]
    if flags.sweep_resume != "auto":
        return sweep_command.resumed(Path(flags.sweep_resume).absolute())
    folder = Path(own[-1]) if own else sweep_command.newest((composed.tree or {})["output_dir"])
    return sweep_command.resumed(folder.absolute())


# ---------------------------------------------------------------- checkpoints


def split_checkpoint(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The folders of ``checkpoint=a,b``, and the overrides without it. Folders are taken as written, not as Hydra's grammar."""
    marks = ("checkpoint=", "+checkpoint=", "++checkpoint=")
    given = [text.partition("=")[2] for text in overrides if text.startswith(marks)]
    rest = [text for text in overrides if not text.startswith(marks)]
    last = given[-1].strip("'\"") if given else ""
    if last in ("", "null"):
        return [], rest
    return [last] if Path(last).exists() else [folder for folder in last.split(",") if folder], rest


def of_checkpoint(folder: str, flags: argparse.Namespace, label: str = "") -> tuple[Composer, list[Problem], bool]:
    """A composer on a checkpoint's config, what stands against it, and whether it may name classes outside the registry.

    Raises:
        CheckpointError: there is no usable checkpoint.
    """
    if flags.config_name or flags.config_path:
        raise UserError("a checkpoint brings its own config; leave out --config-name and --config-path")
    parsed, _ = parse(flags.overrides)
    roots = [root for place in (presets.BUILT_IN, *_dirs(flags)) if (root := presets.folder(place)) is not None]
    chosen = [override for override in parsed if is_choice(override, roots) and not override.is_hydra_override()]
    found = store(folder, chosen, label)
    fixed = {problem.origin for problem in found.problems}
    flags.overrides = [text for text in flags.overrides if origin(text) not in fixed]
    trusts = [override.value() for override in parsed if override.key_or_group == "trust_components"]
    composer = Composer(PRIMARY, _dirs(flags), stored={PRIMARY: found.folder / "config.yaml"}, keep=flags.multirun)
    return composer, found.problems, bool(trusts) and trusts[-1] is True


# ---------------------------------------------------------------- checks before the start


def _start(
    task: Callable[[DictConfig], Any],
    verb: str,
    composer: Composer,
    flags: argparse.Namespace,
    problems: Sequence[Problem] = (),
    registered_only: bool = False,
) -> int:
    """Check, then run."""
    parsed, unread = parse(flags.overrides)
    printing = shown(flags)
    if flags.multirun and not printing:
        _refuse_bad_sweep(parsed, composer)
        composed = _check_sweep(parsed, composer, [*problems, *unread], registered_only, verb == "evaluate")
    else:
        composed = composer.compose(flags.overrides)
        wrong = composed.problems
        if not printing:
            wrong = stages.problems_of(composer, flags.overrides, composed, registered_only, verb == "evaluate")
        _refuse([*problems, *wrong])
    handed = [*composer.handed(parsed), *_run_overrides(parsed, composed, verb, flags.multirun)]
    handed += _resumed(flags, parsed, composed)
    sweep_command.sweep_by(_call(flags, verb))
    stages.compose_by(composer)
    _origin[:] = [] if flags.multirun else [composed.origin]
    argv = [*printing, *(["--multirun"] if flags.multirun and not printing else []), *(["--run"] if flags.run else [])]
    argv += ["--config-dir", os.path.abspath(flags.config_dir)] if flags.config_dir else []
    return _hand_over(task, composer, [*argv, *handed])


def _refuse(problems: Sequence[Problem]) -> None:
    """Stop on any problem; under torchrun only the first process speaks, as all have the same to say."""
    if problems and int(os.environ.get("RANK", "0")) > 0:
        raise SystemExit(2)
    if problems:
        raise ConfigError(dict.fromkeys(problems))


def _refuse_bad_sweep(parsed: Sequence[Override], composer: Composer) -> None:
    problems = []
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problems.append(Problem("-m cannot run under torchrun; sweep.processes starts it for each job"))
    roots, _, _ = composer.roots(parsed)
    for override in parsed:
        if override.is_choice_sweep() and is_choice(override, roots) and None in list(override.sweep_iterator()):
            message = "null cannot be one of several presets; run that job on its own"
            problems.append(Problem(message, override.key_or_group, origin(override)))
        if override.key_or_group == "resume" and override.value() is not None:
            problems.append(Problem("continues one run, so it does not go with -m", "resume", origin(override)))
    _refuse(problems)


def _check_sweep(
    parsed: Sequence[Override], composer: Composer, problems: list[Problem], registered_only: bool, evaluates: bool
) -> Composed:
    """Check every combination that can be listed; the one without the sweep decides how Hydra sweeps."""
    fixed = composer.compose([str(override.input_line) for override in parsed if not override.is_sweep_override()])
    if fixed.tree is None:
        _refuse([*problems, *fixed.problems])
        return fixed
    swept, unread = parse(f"{key}={value}" for key, value in (fixed.sweep or {}).items())
    problems += unread
    if fixed.choices.get("hydra/sweeper") == "basic":
        combinations = expand([*swept, *parsed], MOST_CHECKED)
    else:  # values that a sweeper is yet to combine
        combinations = one_by_one([*swept, *parsed])[:MOST_CHECKED]
    for combination in combinations:
        composed = composer.compose(combination)
        problems += stages.problems_of(composer, combination, composed, registered_only, evaluates)
    _refuse(problems)
    return fixed


def _run_overrides(parsed: Sequence[Override], composed: Composed, verb: str, multirun: bool) -> list[str]:
    """What the run needs beside the user's overrides: a name for its log, its folder when it continues, no files elsewhere."""
    given = {override.key_or_group for override in parsed}
    extra = [] if "hydra.job.name" in given else [f"hydra.job.name={verb}"]
    resume = (composed.tree or {}).get("resume")
    if verb == "train" and resume and multirun:
        _refuse([Problem("continues one run, so it does not go with -m", "resume", composed.origin("resume"))])
    elif verb == "train" and resume:
        folder = runs.find_run(resume, composed.tree or {})
        extra += [f"{key}={quoted(str(folder))}" for key in ("output_dir", "hydra.run.dir")] if folder else []
    return extra + (_QUIET if int(os.environ.get("RANK", "0")) > 0 else [])


# ---------------------------------------------------------------- Hydra


def _hand_over(task: Callable[[DictConfig], Any], composer: Composer, argv: Sequence[str]) -> int:
    os.environ.setdefault(
        "HYDRA_FULL_ERROR", "1"
    )  # errors reach us as exceptions instead of Hydra's own print and exit
    place = composer.place if "://" in composer.place else os.path.abspath(composer.place)
    sys.argv[1:] = argv
    gc.enable()
    try:
        hydra.main(version_base=VERSION_BASE, config_path=place, config_name=composer.name)(task)()
    except UserError as error:
        if not error.shown:
            raise
        return 2
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(str(error).strip().splitlines()[0]) from error
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        folder = error.filename or "the run's folder"
        raise UserError(
            f"{folder}: {error.strerror}; free space or choose another output_dir, or hydra.sweep.dir with -m"
        ) from error
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _train_job(cfg: DictConfig) -> float | None:
    from mllm_factory import run, staged

    return _job(staged.train if cfg.get("stages") else run.train, cfg)


def _evaluate_job(cfg: DictConfig) -> float | None:
    from mllm_factory import run

    return _job(run.evaluate, cfg)


def _job(run: Callable[[dict[str, Any]], float | None], cfg: DictConfig) -> float | None:
    """One job. Its errors are printed here, where its number is known; the other jobs of a sweep still run."""
    job = HydraConfig.get()
    sweeping = job.mode == RunMode.MULTIRUN
    try:
        tree = plain(cfg, job.runtime.choices)
        if int(os.environ.get("RANK", "0")) == 0:
            tree["output_dir"] = job.runtime.output_dir
        return run(stages.whole(tree, job.overrides.task))
    except UserError as error:
        show(located(error), f"job {job.job.num}: " if sweeping else "")
        if not sweeping:
            raise SystemExit(2) from None
        error.shown = True
        raise


def located(error: UserError) -> UserError:
    """The error with the origin of each problem's key, where that is known."""
    if not isinstance(error, ConfigError) or not _origin:
        return error
    return ConfigError(Problem(p.message, p.key, p.origin or _origin[0](p.key)) for p in error.problems)
