"""The benchmarks run, agree on what both sides compute, and report in one shape. How fast anything is, is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks import harness

    return harness


def bench(name: str) -> dict[str, Any]:
    """The JSON of a benchmark with its smallest settings; nothing else may be on stdout."""
    command = [sys.executable, str(SCRIPTS / "bench.py"), name, "--small", "--runs", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def check_shape(found: dict[str, Any], name: str, cases: set[str]) -> None:
    assert set(found) == {"bench", "against", "machine", "ok", "checks", "facts", "rows"}
    assert found["bench"] == name
    assert found["ok"] is True
    assert found["checks"]
    assert all(found["checks"].values())
    assert {"cores", "load", "python", "torch", "transformers", "hydra-core"} <= set(found["machine"])
    assert {row["case"] for row in found["rows"]} == cases
    for row in found["rows"]:
        for side in ("ours", "other", "ratio"):
            assert 0 < row[side]["low"] <= row[side]["median"] <= row[side]["high"]
        assert (row["met"] is None) == (row["mark"] is None)
    assert any(row["mark"] is not None for row in found["rows"])


def test_ratios_are_of_pairs_in_the_direction_of_the_mark(harness: Any) -> None:
    row = harness.compare("case", "ms", [2.0, 3.0, 8.0], [4.0, 4.0, 4.0], "<=", 0.8)
    assert row.ratio == harness.Spread(0.75, 0.5, 2.0)
    assert row.met is True
    row = harness.compare("case", "ms", [2.0, 3.0, 8.0], [4.0, 4.0, 4.0], ">=", 1.5)
    assert row.ratio == harness.Spread(4 / 3, 0.5, 2.0)
    assert row.met is False
    assert harness.compare("case", "ms", [1.0], [1.0]).met is None


def test_checks_decide_and_marks_do_not(harness: Any) -> None:
    missed = harness.compare("case", "ms", [9.0], [1.0], "<=", 1.0)
    assert harness.Result("b", "other", [missed], {"same": True}).ok is True
    assert harness.Result("b", "other", [missed], {"same": True, "loss": False}).ok is False


def test_tables_of_the_page_can_be_replaced(harness: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import bench as script

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- compose -->\nold\n<!-- /compose -->\nafter <!-- step -->\nkept\n<!-- /step -->\n")
    monkeypatch.setattr(script, "DOCS", page)
    script.write(harness.Result("compose", "x", [harness.compare("one", "CPU ms", [3.0], [2.0], "<=", 1.3)]))
    text = page.read_text()
    assert "old" not in text
    assert "kept" in text
    assert text.startswith("before\n")
    assert "after" in text
    assert "| one, CPU ms | 3.0 (3.0-3.0) | 2.0 (2.0-2.0) | 1.500 (1.500-1.500) | at most 1.3 | no |" in text
    marks = [f"<!-- {name} -->" for name in script.BENCHES] + [f"<!-- /{name} -->" for name in script.BENCHES]
    docs = (ROOT / "docs" / "benchmarks.md").read_text()
    assert all(docs.count(mark) == 1 for mark in marks)


def test_an_unknown_benchmark_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "bench.py"), "stepp"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "invalid choice: 'stepp'" in done.stderr


def take_memory(turns: Any, megabytes: int) -> None:
    turns.begin()
    while True:
        taken = bytearray(b"x") * (megabytes * 10**6)
        del taken
        turns.step(rounds=1)


def test_memory_is_that_of_the_side_alone(harness: Any) -> None:
    from benchmarks.sides import Side

    ballast = bytearray(b"y") * (400 * 10**6)  # must not count in the child
    del ballast
    side = Side(take_memory, 100)
    found = side.turn(3)
    side.close()
    assert found["rounds"] == 3
    assert found["extra"] == pytest.approx(100e6, rel=0.1)
    assert side.process.exitcode == 0


@pytest.mark.slow
def test_overhead_has_equal_losses() -> None:
    found = bench("overhead")
    check_shape(found, "overhead", {"0.3M step", "0.3M forward"})
    assert 250_000 < found["facts"]["0.3M trainable"] < 350_000
    assert found["facts"]["0.3M loss"]["difference"] <= 1e-6


@pytest.mark.slow
def test_step_has_equal_losses_and_measures_memory() -> None:
    found = bench("step")
    cases = {f"{mode} trained{lengths}" for mode in ("everything", "projector") for lengths in ("", ", equal lengths")}
    check_shape(found, "step", cases)
    units = {row["unit"] for row in found["rows"]}
    assert units == {"ms a step", "CPU ms a step", "useful tokens/s", "MB above idle"}
    for mode in ("everything", "projector"):
        same = found["facts"][f"{mode}: same weights and batch"]
        assert same["ours loss"] == pytest.approx(same["other loss"], rel=1e-5)
        assert same["ours gradient norm"] == pytest.approx(same["other gradient norm"], rel=1e-5)


@pytest.mark.slow
def test_compose_gives_the_same_tree() -> None:
    check_shape(bench("compose"), "compose", {"again in one process", "first in a process"})


@pytest.mark.slow
def test_check_counts_without_weights() -> None:
    """The process of a check holds little more than the libraries that it imports."""
    found = bench("check")
    check_shape(found, "check", {"smoke"})
    (memory,) = [row for row in found["rows"] if row["unit"] == "MB"]
    assert memory["mark"] == 1500.0
    assert memory["ratio"]["median"] < 1.5


@pytest.mark.slow
def test_startup_never_imports_torch() -> None:
    check_shape(bench("startup"), "startup", {"--help", "list", "completion", "config error"})


@pytest.mark.slow
def test_tuning_has_equal_losses() -> None:
    assert bench("tuning")["ok"]


@pytest.mark.slow
def test_attention_statistics_are_exact() -> None:
    assert bench("attention")["ok"]


@pytest.mark.slow
def test_commit_is_measured() -> None:
    check_shape(
        bench("commit"), "commit", {"monitor, every step", "monitor, every 10th step", "regulariser, every step"}
    )
