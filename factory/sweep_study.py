"""Optuna's side of a search: its options, the samplers and pruners by name, and the journal in the sweep's folder.

TPE: J. Bergstra et al., Algorithms for Hyper-Parameter Optimization, NeurIPS 2011; several objectives: Y. Ozaki et al., GECCO 2020.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_factory import files, runs
from mllm_factory.errors import ConfigError, Problem, UserError, hint
from mllm_factory.report_columns import DOWN, UP, direction
from mllm_factory.sweep_job import RECORD
from mllm_factory.sweep_space import Choice, Numbers, Space

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution

JOURNAL, FACTS = "study.journal", "search"
WAYS = ("maximize", "minimize")
SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler", "nsga2": "NSGAIISampler"}
PRUNERS = {"median": "MedianPruner", "halving": "SuccessiveHalvingPruner", "hyperband": "HyperbandPruner"}
"""Our names of Optuna's classes."""


@dataclass
class SearchOptions:
    """What is searched for, and how; the options of ``hydra/sweeper=search``.

    Attributes:
        trials: that end with a value or are pruned.
        objectives: keys of report.json, each to maximize or to minimize; empty: the first metric, the way its name says.
        sampler: tpe, random or nsga2.
        sampler_options: of Optuna's class.
        seed: of the sampler.
        pruner: median, halving or hyperband; None ends no trial before its time.
        pruner_options: of Optuna's class.
        watch: the key of metrics.jsonl that the pruner looks at, and its way; empty: the objective.
        failures: trials that may fail before the search stops.
    """

    trials: int = 20
    objectives: Mapping[str, str] = field(default_factory=dict)
    sampler: str = "tpe"
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    pruner: str | None = None
    pruner_options: Mapping[str, Any] = field(default_factory=dict)
    watch: Mapping[str, str] = field(default_factory=dict)
    failures: int = 10

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigError: everything wrong at once.
        """
        problems = []
        for name, least in (("trials", 1), ("failures", 0), ("seed", 0)):
            if (value := getattr(self, name)) < least:
                problems.append(Problem(f"expected {least} or more, got {value}", f"search.{name}"))
        for name, known in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
            if (word := getattr(self, name)) not in (*known, *([None] if name == "pruner" else [])):
                problems.append(Problem(f"there is no {name} '{word}'{hint(str(word), known)}", f"search.{name}"))
        for name in ("objectives", "watch"):
            for key, way in getattr(self, name).items():
                if way not in WAYS:
                    problems.append(Problem(f"'{way}' is no way{hint(str(way), WAYS)}", f"search.{name}.{key}"))
        if len(self.watch) > 1:
            problems.append(Problem(f"a pruner looks at one key, got {len(self.watch)}", "search.watch"))
        if self.watch and self.pruner is None:
            problems.append(Problem("is for a pruner; choose one, such as search.pruner=median", "search.watch"))
        if self.pruner is not None and len(self.objectives) > 1:
            problems.append(Problem("cannot judge several objectives; leave it out, or choose one", "search.pruner"))
        if problems:
            raise ConfigError(problems)

    def aims(self, tree: Mapping[str, Any]) -> dict[str, str]:
        """The objectives, or the first metric of a tree.

        Raises:
            ConfigError: there is no metric, or its name does not say which way is better.
        """
        if self.objectives:
            return dict(self.objectives)
        first = next(iter(tree.get("metrics") or {}), None)
        ways = {UP: "maximize", DOWN: "minimize"}
        way = ways.get(direction(first)) if first else None
        if first is None or way is None:
            what = f"'{first}' does not say which way is better" if first else "there are no metrics"
            raise ConfigError(Problem(f"{what}; give some, such as {{exact_match: maximize}}", "search.objectives"))
        return {first: way}


# ---------------------------------------------------------------- Optuna's objects


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """A space as Optuna takes it."""
    return {key: _distribution(values) for key, values in space.items()}


def _distribution(values: Choice | Numbers) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(values, Choice):
        return CategoricalDistribution(values.values)
    if values.whole:
        return IntDistribution(int(values.low), int(values.high), log=values.log, step=int(values.step or 1))
    return FloatDistribution(values.low, values.high, log=values.log, step=values.step)


def _made(module: Any, names: Mapping[str, str], name: str, given: Mapping[str, Any], option: str) -> Any:
    """One of Optuna's classes with options.

    Raises:
        ConfigError: an option that it does not have or accept.
    """
    try:
        return getattr(module, names[name])(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(Problem(f"{names[name]}: {files.reason(error)}", f"search.{option}")) from error


def open_study(folder: Path, options: SearchOptions, aims: Mapping[str, str], facts: Mapping[str, Any]) -> Study:
    """The study in a sweep's folder, made where there is none.

    Args:
        folder: of the sweep; its lock is held.
        options: of the search.
        aims: objectives and their ways.
        facts: what the search is; a study of another one is refused.

    Raises:
        ConfigError: the journal is damaged or belongs to another search.
        UserError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError("hydra/sweeper=search needs the package 'optuna'; install mllm-factory[sweep]") from error
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.study import StudyDirection

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file = folder / JOURNAL
    _mend(file)
    try:
        storage = JournalStorage(JournalFileBackend(str(file)))
        before = len(storage.get_all_studies()) and len(storage.get_all_trials(0, deepcopy=False))
        before = max(before, len(list(folder.glob(f"*/{RECORD}"))))  # the same seed would ask the same again
        with warnings.catch_warnings(action="ignore"):
            own = dict(options.sampler_options)
            sampler = _made(
                optuna.samplers, SAMPLERS, options.sampler, {"seed": options.seed + before, **own}, "sampler_options"
            )
            pruner: Any = optuna.pruners.NopPruner()
            if options.pruner is not None:
                pruner = _made(optuna.pruners, PRUNERS, options.pruner, options.pruner_options, "pruner_options")
        study = optuna.create_study(
            storage=storage,
            study_name=FACTS,
            directions=[StudyDirection[way.upper()] for way in aims.values()],
            sampler=sampler,
            pruner=pruner,
            load_if_exists=True,
        )
        known = study.user_attrs.get(FACTS)
    except UserError:
        raise
    except Exception as error:  # Optuna names none for a journal that does not add up
        raise _damaged(file, files.reason(error)) from error
    if known is None:
        study.set_user_attr(FACTS, json.loads(json.dumps(facts, default=str)))
    elif changes := runs.differences(known, json.loads(json.dumps(facts, default=str)), ""):
        message = f"{folder} holds another search: {'; '.join(changes[:5])}; give the overrides of that one"
        raise ConfigError(Problem(message, "sweep.resume"))
    return study


def _mend(file: Path) -> None:
    """Take off what a crash left: a lock, and a last line that was cut. Nobody else writes while the sweep's lock is held.

    Raises:
        ConfigError: another line is damaged.
    """
    file.with_name(f"{file.name}.lock").unlink(missing_ok=True)
    if not file.exists():
        return
    lines = file.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        with file.open("r+b") as open_file:
            open_file.truncate(sum(map(len, lines[:-1])))
        lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line)
        except ValueError as error:
            raise _damaged(file, f"line {number} is no JSON") from error


def _damaged(file: Path, why: str) -> ConfigError:
    way = "move it away, and what is done is read again from the jobs' folders"
    return ConfigError(Problem(f"{file} is damaged: {why}; {way}", "sweep.resume"))
