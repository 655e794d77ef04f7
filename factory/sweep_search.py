"""A search: trials that Optuna asks for, each a job of a sweep, as many at a time as the sweep has room for.

<sweep>/
  study.journal              Optuna's journal: every trial, its values, its state
  optimization_results.yaml  the best trial, or those of the Pareto front
  0/                         the job of a trial; its number is the trial's attribute `job`

A trial that asks for what another has done takes over its result. After ``kill -9`` trials that were running are failed and asked
again with the same values, in the same folder, from its newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mllm_factory import files, sweep, sweep_job
from mllm_factory.errors import UserError
from mllm_factory.sweep_backends import Options, Pool
from mllm_factory.sweep_command import Call, store
from mllm_factory.sweep_jobs import Job, Result, lines_of, prepare, reported, result
from mllm_factory.sweep_space import Space, described
from mllm_factory.sweep_study import SearchOptions, distributions, open_study

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

RESULTS = "optimization_results.yaml"
LOOK_SECONDS = 1.0
"""How often the pruner looks at what running trials wrote."""

Plan = Callable[[int, Sequence[str]], Job]


@dataclass
class Running:
    """A job at work for a trial, the trials that ask for the same, and what was read of its metrics.jsonl."""

    job: Job
    trial: Trial
    copies: list[Trial] = field(default_factory=list)
    offset: int = 0
    step: int = -1


@dataclass
class Search:
    """Search a space.

    Attributes:
        folder: of the sweep.
        space: what the swept keys may be.
        base: the tree without the swept keys, which with the space is what a search is.
        options: of the search; ``pool``: of the sweep.
        plan: makes the job of a number and its ``key=value`` words.
        call: the command that searches.
        tell: prints a line.
    """

    folder: Path
    space: Space
    base: Mapping[str, Any]
    options: SearchOptions
    pool: Options
    plan: Plan
    call: Call
    tell: Callable[[str], None]

    def run(self) -> Study:
        """Ask, run and tell until enough trials have ended.

        Raises:
            ConfigError: the folder holds another search, or no report has an objective.
            UserError: too many trials failed.
            KeyboardInterrupt: after the running jobs were ended.
        """
        self.options.check()
        self.pool.check()
        self.aims = self.options.aims(self.base)
        self.watch = dict(self.options.watch) or dict(list(self.aims.items())[:1])
        self.running: dict[int, Running] = {}
        self.failed = 0
        with sweep.driving(self.folder):
            facts = {"space": described(self.space), "objectives": self.aims, "config": self.base}
            self.study, self.asked = open_study(self.folder, self.options, self.aims, facts), distributions(self.space)
            store(self.folder, self.call)
            self._take_up()
            with Pool(self.pool, self.folder) as pool:
                self._search(pool)
            self._write()
        return self.study

    def _search(self, pool: Pool) -> None:
        while True:
            while pool.running < self.pool.width and self._wanted():
                self._ask(pool)
            if not self.running:
                return
            ended = pool.next(LOOK_SECONDS if self.options.pruner else None)
            if ended is not None:
                run = self.running.pop(ended.number)
                self._ended(run, result(run.job, ended.code, ended.lost))
            elif self.options.pruner:
                self._prune()

    # ------------------------------------------------------------ what is there already

    def _take_up(self) -> None:
        """Trials that a former search left: running and failed ones are asked again, and jobs that no trial knows are told."""
        from optuna.trial import TrialState

        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
            self.study.tell(trial.number, state=TrialState.FAIL)
        trials = self.study.get_trials()
        again = {trial.user_attrs.get("again") for trial in trials}
        for trial in trials:
            if (
                trial.state == TrialState.FAIL
                and trial.number not in again
                and trial.params.keys() == self.space.keys()
            ):
                attributes = {"again": trial.number, **_part(trial.user_attrs, "job")}
                self.study.enqueue_trial(trial.params, user_attrs=attributes)
        known = {trial.user_attrs.get("job") for trial in trials}
        numbers = [
            int(path.parent.name) for path in self.folder.glob(f"*/{sweep_job.RECORD}") if path.parent.name.isdigit()
        ]
        self.number = 1 + max([*numbers, *(n for n in known if n is not None)], default=-1)
        for number in sorted(set(numbers) - known):
            self._adopt(self.folder / str(number), number)
        if done := self._count():
            self.tell(f"{done} of {self.options.trials} trials are done already")

    def _adopt(self, folder: Path, number: int) -> None:
        """Add a job that is done to the study: what its journal knew of it was lost."""
        from optuna.trial import create_trial

        record = sweep_job.read(folder)
        words = dict(text.split("=", 1) for text in record.get("overrides", []) if "=" in text)
        params = {key: values.read(words.get(key, "")) for key, values in self.space.items()}
        values = reported(folder, list(self.aims)) if record.get("status") == "done" else None
        if values is not None and None not in params.values():
            seen = dict(self._watched(lines_of(folder)[0])) if self.options.pruner else {}
            known = create_trial(
                params=params,
                distributions=self.asked,
                values=values,
                intermediate_values=seen,
                user_attrs={"job": number},
            )
            self.study.add_trial(known)

    def _count(self) -> int:
        """Trials with a value, and pruned ones."""
        return len(self._finished())

    def _finished(self) -> list[FrozenTrial]:
        from optuna.trial import TrialState

        return list(self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))

    def _wanted(self) -> bool:
        at_work = sum(1 + len(run.copies) for run in self.running.values())
        return self._count() + at_work < self.options.trials

    # ------------------------------------------------------------ one trial

    def _ask(self, pool: Pool) -> None:
        """Start the job of a new trial, unless another one does or did the same."""
        trial = self.study.ask(self.asked)
        twin = next((run for run in self.running.values() if run.trial.params == trial.params), None)
        if twin is not None:
            twin.copies.append(trial)
            return
        done = next((other for other in self._finished() if other.params == trial.params), None)
        if done is not None:
            trial.set_user_attr("same_as", done.number)
            self._tell(trial, done.state.name, done.values)
            return
        number = trial.user_attrs.get("job")
        if number is None:
            number, self.number = self.number, self.number + 1
            trial.set_user_attr("job", number)
        job = self.plan(number, [f"{key}={value}" for key, value in trial.params.items()])
        sweep.refuse_other_sweep([job])
        run = Running(job, trial)
        if prepare(job):
            self.running[number] = run
            pool.submit(number, job.folder)
        else:
            self._ended(run, result(job, 0))

    def _ended(self, run: Running, end: Result) -> None:
        """Tell what became of a job to its trials.

        Raises:
            UserError: too many have failed.
        """
        values = reported(run.job.folder, list(self.aims)) if end.status == "done" else None
        if self.options.pruner:
            self._report(run)
        if end.status == "done" and values is None:
            end = Result("failed", None, f"{' or '.join(self.aims)} is no number")
        state = {"done": "COMPLETE", "pruned": "PRUNED"}.get(end.status, "FAIL")
        for trial in (run.trial, *run.copies):
            self._tell(trial, state, values)
        numbers = " ".join(f"{key} {value:.4g}" for key, value in zip(self.aims, values or (), strict=False))
        given = " ".join(f"{key}={value}" for key, value in run.trial.params.items())
        self.tell(
            f"job {run.job.number} {end.status} ({self._count()}/{self.options.trials}) {given}: {numbers or end.cause}"
        )
        self.failed += state == "FAIL"
        if self.failed > self.options.failures:
            way = f"mend the cause and continue with sweep.resume={self.folder}, or raise search.failures"
            raise UserError(f"{self.failed} trials failed, the last one: {end.cause}; {way}")

    def _tell(self, trial: Trial, state: str, values: Sequence[float] | None) -> None:
        from optuna.trial import TrialState

        self.study.tell(trial, values if state == "COMPLETE" else None, state=TrialState[state])

    # ------------------------------------------------------------ pruning

    def _prune(self) -> None:
        """End the running jobs that the pruner gives up after what they wrote since the last look."""
        for run in self.running.values():
            if self._report(run):
                (run.job.folder / sweep_job.END).write_text(f"pruned at step {run.step}", encoding="utf-8")

    def _report(self, run: Running) -> bool:
        """Show the pruner what a job wrote since the last look; whether it gives the job up."""
        lines, run.offset = lines_of(run.job.folder, run.offset)
        gives_up = False
        for step, value in self._watched(lines):
            if step > run.step:
                run.step = step
                run.trial.report(value, step)
                gives_up = gives_up or run.trial.should_prune()
        return gives_up

    def _watched(self, lines: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, float]]:
        """Steps and values of the watched key, turned so that they are better the way the objective is."""
        (key, way), aim = next(iter(self.watch.items())), next(iter(self.aims.values()))
        for line in lines:
            value, step = line.get(key), line.get("step")
            if isinstance(value, int | float) and isinstance(step, int):
                yield step, value if way == aim else -value

    # ------------------------------------------------------------ the end

    def _write(self) -> None:
        """``optimization_results.yaml``, with the keys that Hydra's Optuna sweeper writes."""
        best = self.study.best_trials
        found: dict[str, Any] = {"name": "optuna"}
        if len(self.aims) > 1:
            found["solutions"] = [
                {"params": t.params, "values": list(t.values), **_part(t.user_attrs, "job")} for t in best
            ]
        elif best:
            top = self.study.best_trial
            found |= {
                "best_evaluated_params": top.params,
                "best_evaluated_result": top.value,
                **_part(top.user_attrs, "job"),
            }
        files.write(self.folder / RESULTS, yaml.safe_dump(found, sort_keys=False))
        for trial in best[:10]:
            values = " ".join(f"{key} {value:.4g}" for key, value in zip(self.aims, trial.values, strict=True))
            given = " ".join(f"{key}={value}" for key, value in trial.params.items())
            self.tell(f"best: {given}: {values} (job {trial.user_attrs.get('job', '-')})")


def _part(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {key: values[key]} if key in values else {}
