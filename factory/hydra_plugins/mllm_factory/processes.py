"""``hydra/launcher=processes``: the jobs of ``-m``, each in a fresh process. Hydra's side of ``mllm_factory.sweep``.

No postponed annotations here: Hydra reads this file without putting it into ``sys.modules``, where dataclasses look them up.
"""

import copy
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

if TYPE_CHECKING:
    from mllm_factory.sweep import Job, Options, Result

log = logging.getLogger(__name__)


@dataclass
class ProcessesConf:
    """Options of the launcher; on the command line ``sweep.jobs=2`` stands for ``hydra.launcher.jobs=2``."""

    _target_: str = "hydra_plugins.mllm_factory.processes.ProcessesLauncher"
    backend: str = "threads"  # threads, joblib, submitit or ray
    jobs: int | None = None  # at a time; null: as many as `threads` fit the cores, or one
    processes: int | None = None  # that train one job together, started by torchrun; null: one
    threads: int | None = None  # of each process; null: the cores divided by all processes at a time
    devices: list[Any] | None = None  # values of CUDA_VISIBLE_DEVICES that jobs take in turn, such as ["0,1", "2,3"]
    resume: bool = False  # skip the jobs of hydra.sweep.dir that are done, continue and repeat the others
    options: dict[str, Any] = field(default_factory=dict)  # of the back end, such as {cluster: slurm, partition: gpu}


ConfigStore.instance().store(group="hydra/launcher", name="processes", node=ProcessesConf, provider="mllm_factory")


def unwrapped(values: Any) -> dict[str, Any]:
    """A mapping of Hydra's as plain values, nested ones included: libraries do not know OmegaConf's."""
    return dict(OmegaConf.to_container(values, resolve=True) if OmegaConf.is_config(values) else values)  # type: ignore[arg-type]


class ProcessesLauncher(Launcher):
    """Runs the jobs of a sweep with ``mllm_factory.sweep``. Options: ``ProcessesConf``."""

    def __init__(
        self,
        backend: str,
        jobs: int | None,
        processes: int | None,
        threads: int | None,
        devices: Sequence[Any] | None,
        resume: bool,
        options: dict[str, Any],
    ) -> None:
        named = OmegaConf.to_container(devices, resolve=True) if OmegaConf.is_config(devices) else devices
        self.given: dict[str, Any] = {"backend": backend, "jobs": jobs, "processes": processes, "threads": threads}
        self.given |= {"devices": named, "options": unwrapped(options)}
        self.resume = resume
        self.config: DictConfig = OmegaConf.create()
        self.context: HydraContext | None = None
        self.started = False

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take Hydra's context.

        Raises:
            ConfigError: an option that cannot be, or a folder that holds another sweep.
        """
        from mllm_factory import sweep
        from mllm_factory.errors import ConfigError, Problem
        from mllm_factory.sweep_command import swept

        self.config, self.context = config, hydra_context
        self.options().check()
        if self.options().size > 1 and swept().verb != "train":
            message = f"every process would {swept().verb} everything; leave it out"
            raise ConfigError(Problem(message, "sweep.processes"))
        if not self.resume:
            sweep.refuse_used_folder(Path(config.hydra.sweep.dir).absolute())

    def options(self) -> "Options":
        """How jobs are run."""
        from mllm_factory import sweep

        return sweep.Options(**self.given)

    def start(self) -> Callable[[str], None]:
        """Set up Hydra's log, as launchers do; what prints a line."""
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        return log.info

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a batch of jobs.

        Raises:
            ConfigError: the jobs or the folder do not fit; nothing was started then.
        """
        from mllm_factory import sweep
        from mllm_factory.cli import show
        from mllm_factory.sweep_command import swept

        tell = self.start()
        folder = Path(self.config.hydra.sweep.dir).absolute()
        planned = [self.plan(initial_job_idx + i, list(job), folder) for i, job in enumerate(job_overrides)]
        results = sweep.run(folder, [job for job, _ in planned], self.options(), swept(), tell)
        returns = [_return(job, config, end) for (job, config), end in zip(planned, results, strict=True)]
        for error in sweep.failures(folder, [job for job, _ in planned], results):
            show(error)
        return returns

    def plan(self, number: int, overrides: list[str], folder: Path) -> tuple["Job", DictConfig]:
        """A job with its folder, command and tree, and its whole config.

        Raises:
            RuntimeError: called before ``setup``.
        """
        from mllm_factory import sweep
        from mllm_factory.config import plain
        from mllm_factory.stages import whole
        from mllm_factory.sweep_command import command, hydra_overrides, swept

        if self.context is None:
            raise RuntimeError("launch was called before setup")
        config = self.context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
            config.hydra.runtime.output_dir = config.output_dir = "output_dir"  # no part of what a job is
        before = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(config)
        try:
            own = folder / str(config.hydra.sweep.subdir)
            tree = plain(config, config.hydra.runtime.choices)
        finally:
            HydraConfig.instance().cfg = before
        of_hydra = hydra_overrides(list(self.config.hydra.overrides.hydra), number, own)
        tree = whole(tree, overrides) if swept().verb == "train" else tree
        size = self.options().size
        argv = command(swept(), [*overrides, *of_hydra], size)
        return sweep.Job(number, own, list(filter_overrides(overrides)), argv, tree, swept().verb, size), config


def _return(job: "Job", config: DictConfig, end: "Result") -> JobReturn:
    """A job's end as sweepers take it: a value, or a failure that is raised when the value is asked for."""
    from mllm_factory.errors import UserError

    found = JobReturn()
    found.overrides, found.task_name = list(job.overrides), config.hydra.job.name
    found.hydra_cfg = OmegaConf.create({"hydra": copy.deepcopy(config.hydra)})
    found.cfg, found.working_dir = OmegaConf.create(dict(job.tree)), os.getcwd()
    found.status = JobStatus.COMPLETED if end.status == "done" else JobStatus.FAILED
    if end.status == "done":
        found.return_value = end.value
    else:
        error = UserError(f"job {job.number} {end.status}: {end.cause}")
        error.shown = True
        found.return_value = error
    return found
