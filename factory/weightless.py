"""Building without memory, so that the sizes of any model are known in seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

from mllm_factory.meter import Quick


@contextmanager
def weightless() -> Iterator[None]:
    """Build without memory: the meta device for what is made, the CPU for constants of libraries that are imported meanwhile."""
    finder = _ImportsOnCpu()
    with torch.device("meta"):  # first, because torch imports a part of itself for it
        sys.meta_path.insert(0, finder)
        try:
            with Quick():
                yield
        finally:
            sys.meta_path.remove(finder)


class _ImportsOnCpu(MetaPathFinder):
    """Finds modules as the other finders do, and runs them with the CPU as default device."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            setattr(spec.loader, "exec_module", partial(_run_on_cpu, spec.loader.exec_module))  # noqa: B010
        return spec


def _run_on_cpu(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    with torch.device("cpu"):
        execute(module)
