"""Who may import whom, and what library code never does."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENGINE = sorted((ROOT / "factory").glob("*.py"))
PARTS = sorted((ROOT / "components").rglob("*.py"))
LAYERS = [  # a module imports from layers before its own, and from its own
    {"errors", "types", "schema", "randomness", "silence"},
    {"packs", "files", "tokens", "interfaces", "sweep_job", "plan", "ending", "torchrun"},
    {"registry", "runs", "media", "pretrained", "template"},
    {"model", "data", "cached_items", "packing", "loader", "distributed", "presets", "identity", "weightless", "meter"},
    {"checkpoint", "features", "trainer", "recorder"},
    {"assemble", "evaluator", "follower", "estimate"},
    {"run", "llava", "native"},
    {
        "report_runs",
        "report_groups",
        "report_columns",
        "report_figures",
        "report_samples",
        "report_tables",
        "report_page",
        "report_output",
    },
    {"checks", "flags", "overrides", "merge", "origins", "stored", "config"},
    {"stages", "staged"},
    {
        "sweep_backends",
        "sweep_slurm",
        "sweep_command",
        "sweep_jobs",
        "sweep",
        "sweep_space",
        "sweep_study",
        "sweep_search",
    },
    {
        "cli",
        "completion",
        "catalog",
        "doctor",
        "provenance",
        "export",
        "launch",
        "report",
        "testing",
        "testing_model",
        "__main__",
    },
]
TORCH_FREE = [
    "stages",
    "sweep",
    "sweep_backends",
    "sweep_search",
    "errors",
    "schema",
    "registry",
    "packs",
    "presets",
    "checks",
    "config",
    "cli",
    "catalog",
    "flags",
    "launch",
    "merge",
    "origins",
    "overrides",
    "stored",
    "doctor",
    "completion",
    "runs",
    "report",
    "report_figures",
]
HEAVY = {"open_clip", "peft", "timm", "torchaudio", "transformers", "easy_vqa", "gguf", "torchvision"}


def imports(file: Path, lazy: bool = True) -> Iterator[tuple[str, list[str]]]:
    """(module, names) of every import; with ``lazy`` False only of those that run when the module is imported."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hidden and not lazy:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", [alias.name for alias in node.names]


def engine_modules(file: Path) -> set[str]:
    known = {f.stem for f in ENGINE}
    used = set()
    for module, names in imports(file, lazy=False):
        if module.startswith("mllm_factory."):
            used.add(module.split(".")[1])
        elif module == "mllm_factory":
            used |= known.intersection(names)
    return used


def test_every_module_of_the_engine_has_its_layer() -> None:
    assert {f.stem for f in ENGINE} - {"__init__"} == set().union(*LAYERS)


@pytest.mark.parametrize("file", [f for f in ENGINE if f.stem != "__init__"], ids=lambda f: f.stem)
def test_imports_point_to_lower_layers(file: Path) -> None:
    level = next(i for i, layer in enumerate(LAYERS) if file.stem in layer)
    allowed = set().union(*LAYERS[: level + 1])
    assert engine_modules(file) <= allowed


@pytest.mark.parametrize("file", ENGINE, ids=lambda f: f.stem)
def test_the_engine_never_imports_components(file: Path) -> None:
    assert not [module for module, _ in imports(file) if module.startswith("mllm_factory.components")]


def test_components_see_only_the_public_names_and_their_own_family() -> None:
    assert len(PARTS) > 15
    for file in PARTS:
        family = file.parent.name
        for module, _ in imports(file):
            own = module == "mllm_factory.components" or module.startswith(f"mllm_factory.components.{family}")
            assert not module.startswith("mllm_factory.") or own, f"{file}: {module}"


def test_model_libraries_are_imported_where_they_are_used() -> None:
    for file in [*ENGINE, *PARTS]:
        for module, _ in imports(file, lazy=False):
            assert module.split(".")[0] not in HEAVY, f"{file}: {module}"


def test_library_code_has_no_assert_and_runs_no_text() -> None:
    for file in [*ENGINE, *PARTS]:
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
        called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert not called & {"eval", "exec"}, file
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.Assert)], file
        assert not [module for module, _ in imports(file) if module.split(".")[0] == "pickle"], file
        assert "_target_" not in text, file


def test_names_of_components_are_never_branched_on() -> None:
    from mllm_factory.registry import index

    known = {name for table in index().values() for name in table}
    assert len(known) > 10
    for file in ENGINE:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                constants = {
                    c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)
                }
                assert not constants & known, f"{file}:{node.lineno}"


@pytest.mark.parametrize("module", TORCH_FREE)
def test_modules_of_the_quick_verbs_do_not_import_torch(module: str) -> None:
    code = f"import sys, mllm_factory.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
