"""``hydra/sweeper=search``: Optuna chooses the jobs of ``-m``. Hydra's side of ``mllm_factory.sweep_search``.

No postponed annotations here, as in ``processes``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


@dataclass
class SearchConf:
    """Options of the sweeper; on the command line ``search.trials=50`` stands for ``hydra.sweeper.trials=50``."""

    _target_: str = "hydra_plugins.mllm_factory.search.SearchSweeper"
    params: dict[str, Any] | None = None  # what is searched where a config says it: {key: interval(0,1)}
    trials: int = 20  # that end with a value or are pruned
    objectives: dict[str, str] = field(default_factory=dict)  # keys of report.json: maximize or minimize
    sampler: str = "tpe"  # tpe, random or nsga2
    sampler_options: dict[str, Any] = field(default_factory=dict)  # of Optuna's class
    seed: int = 0  # of the sampler
    pruner: str | None = None  # median, halving or hyperband; null ends no trial before its time
    pruner_options: dict[str, Any] = field(default_factory=dict)  # of Optuna's class
    watch: dict[str, str] = field(default_factory=dict)  # a key of metrics.jsonl for the pruner; empty: the objective
    failures: int = 10  # trials that may fail before the search stops


ConfigStore.instance().store(group="hydra/sweeper", name="search", node=SearchConf, provider="mllm_factory")


class SearchSweeper(Sweeper):
    """Runs a search with ``mllm_factory.sweep_search``. Options: ``SearchConf``."""

    def __init__(
        self,
        params: Mapping[str, Any] | None,
        trials: int,
        objectives: Mapping[str, str],
        sampler: str,
        sampler_options: Mapping[str, Any],
        seed: int,
        pruner: str | None,
        pruner_options: Mapping[str, Any],
        watch: Mapping[str, str],
        failures: int,
    ) -> None:
        from hydra_plugins.mllm_factory.processes import unwrapped

        self.params = unwrapped(params or {})
        self.given: dict[str, Any] = {"trials": trials, "sampler": sampler, "seed": seed, "pruner": pruner}
        self.given |= {"objectives": unwrapped(objectives), "watch": unwrapped(watch), "failures": failures}
        self.given |= {"sampler_options": unwrapped(sampler_options), "pruner_options": unwrapped(pruner_options)}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take Hydra's context and the launcher.

        Raises:
            ConfigError: an option that cannot be, or another launcher than ours.
        """
        from hydra.core.plugins import Plugins
        from hydra_plugins.mllm_factory.processes import ProcessesLauncher

        from mllm_factory.errors import ConfigError, Problem
        from mllm_factory.sweep_study import SearchOptions

        self.options = SearchOptions(**self.given)
        self.options.check()
        self.hydra_context, self.config = hydra_context, config
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        if not isinstance(launcher, ProcessesLauncher):
            message = "a search adds and ends jobs while others run; use hydra/launcher=processes"
            raise ConfigError(Problem(message, "hydra/launcher"))
        self.launcher, self.processes = launcher, launcher

    def sweep(self, arguments: Sequence[str]) -> None:
        """Search.

        Raises:
            ConfigError: there is nothing to search, or the folder holds another search.
            UserError: too many trials failed.
            RuntimeError: called before ``setup``.
        """
        from mllm_factory import sweep_command
        from mllm_factory.sweep_jobs import identity
        from mllm_factory.sweep_search import Search
        from mllm_factory.sweep_space import space_of

        if self.hydra_context is None or self.config is None:
            raise RuntimeError("sweep was called before setup")
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        given = parser.parse_overrides([*(f"{key}={value}" for key, value in self.params.items()), *arguments])
        last = {override.get_key_element(): override for override in given}
        space = space_of(list(last.values()))
        fixed = [str(override.input_line) for override in last.values() if not override.is_sweep_override()]
        folder = Path(self.config.hydra.sweep.dir).absolute()
        base = self.processes.plan(0, fixed, folder)[0].tree
        log, options = self.processes.start(), self.processes.options()
        search = Search(
            folder=folder,
            space=space,
            base=identity(base),
            options=self.options,
            pool=options,
            plan=lambda number, values: self.processes.plan(number, [*fixed, *values], folder)[0],
            call=sweep_command.swept(),
            tell=log,
        )
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "multirun.yaml").exists():
            OmegaConf.save(self.config, folder / "multirun.yaml")
        search.run()
