"""The experiments with learning balance: their arithmetic by hand, and runs that are never taken for others."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import commit_runs

    return commit_runs


def written(folder: Path, losses: list[float], distances: list[tuple[float, float] | None]) -> Path:
    """A finished run's files; a distance stays in the lines until the next one."""
    folder.mkdir(parents=True)
    lines: list[dict[str, float]] = []
    for step, (loss, pair) in enumerate(zip(losses, distances, strict=True), 1):
        kept = {key: value for key, value in (lines[-1] if lines else {}).items() if key.startswith("balance")}
        new = {} if pair is None else {"balance/d/llm": pair[0], "balance/d/encoder": pair[1]}
        lines.append({"step": step, "loss": loss, **kept, **new})
    lines.insert(1, {"step": 1, "eval/exact_match": 0.1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "report.json").write_text(json.dumps({"exact_match": 0.75}))
    return folder


def test_the_numbers_of_a_run(shared: Any, tmp_path: Path) -> None:
    losses = [4.0] * 10 + [2.0] * 10 + [1.0] * 20
    pairs: list[tuple[float, float] | None] = [None] * 40
    pairs[3], pairs[7], pairs[11], pairs[15] = (0.1, 0.1), (1.0, 0.1), (0.0, 0.1), (0.1, 0.001)  # log10: 0, 1, none, 2
    found = shared.numbers(written(tmp_path / "run", losses, pairs))
    assert found["mean"] == pytest.approx(2.0)
    assert found["final"] == pytest.approx((10 * 2 + 20 * 1) / 30)
    assert found["accuracy"] == 0.75
    assert (found["median"], found["deviation"]) == (pytest.approx(1.0), pytest.approx(1.0))
    assert [step for step, _ in shared.kappas(shared.lines_of(tmp_path / "run"))] == [4, 8, 16]
    bare = shared.numbers(written(tmp_path / "bare", losses, [None] * 40))
    assert math.isnan(bare["median"]) and math.isnan(bare["deviation"])
    rows = shared.row([{"mean": 1.0, "final": 2.0}, {"mean": 3.0, "final": 2.0}])
    (mean, spread) = shared.row([{"median": math.nan}, {"median": 1.0}])["median"]
    assert math.isnan(mean) and math.isnan(spread)
    assert rows == {"mean": (2.0, pytest.approx(math.sqrt(2))), "final": (2.0, 0.0)}


def test_what_a_folder_holds_is_not_trained_again_and_never_taken_for_another_run(shared: Any, tmp_path: Path) -> None:
    smoke = ["experiment=smoke", "trainer.max_steps=2", "data.train.limit=8", "metrics=null"]
    folder = shared.trained(tmp_path / "run", *smoke)
    report = folder / "report.json"
    before = report.stat().st_mtime_ns
    assert shared.trained(folder, *smoke) == folder
    assert report.stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match="holds a run with another trainer; choose another folder"):
        shared.trained(folder, *smoke, "trainer.clip=2")
    report.unlink()  # as after a crash
    shared.trained(folder, *smoke, "trainer.clip=2")
    assert report.exists()


def test_curves_of_two_tasks_in_one_figure(shared: Any, tmp_path: Path) -> None:
    import commit_tasks

    pairs: list[tuple[float, float] | None] = [(1.0 + i, 1.0) if i % 4 == 0 else None for i in range(40)]
    runs = [written(tmp_path / str(seed), [4.0 - seed] * 40, pairs) for seed in range(2)]
    assert commit_tasks.losses(runs[1]) == [(10, 3.0), (20, 3.0), (30, 3.0), (40, 3.0)]
    assert commit_tasks.measured(runs[0])[:2] == [(1, pytest.approx(1.0)), (5, pytest.approx(5.0))]
    commit_tasks.draw({"one": {"a": runs, "b": runs[:1]}, "other": {"a": runs, "b": runs}}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_claim_holds_on_the_right_side_of_its_rows_only(shared: Any) -> None:
    import commit_tiny

    def rows(**changed: float) -> dict[str, Any]:
        final = {"constant 1:1": 0.1, "LLM up 10:1": 1.0, "encoder up 1:10": 0.2, "CLR from 10:1": 0.5, **changed}
        spread = {"constant 1:1": 0.2, "CLR 1:1": 0.1, "CLR 1:1, KL, N = L": 5.0, **changed}
        names = {*final, *spread}
        return {
            name: {"final": (final.get(name, 0.0), 0.0), "deviation": (spread.get(name, 0.0), 0.0)} for name in names
        }

    assert list(commit_tiny.claims(rows()).values()) == [True] * 5
    assert list(commit_tiny.claims(rows(**{"CLR from 10:1": 1.1})).values()) == [True, True, False, True, True]
    assert list(commit_tiny.claims(rows(**{"CLR 1:1, KL, N = L": 0.3})).values()) == [True, True, True, True, False]
    assert commit_tiny.claims({"CLR 1:1": rows()["CLR 1:1"]}) == {}


@pytest.mark.slow
def test_what_is_claimed_of_commit_tiny_holds(tmp_path: Path) -> None:
    """Coordination (C2) on five seeds, of which it fails on one; unbalanced rates (C1) and the spread of kappa (C4) on two."""
    rows = {}
    for only, seeds in (
        (["LLM up 10:1", "CLR from 10:1"], "01234"),
        (["constant 1:1", "LLM up 10:1", "encoder up 1:10", "CLR 1:1", "CLR 1:1, KL, N = L"], "01"),
    ):
        command = [sys.executable, str(SCRIPTS / "commit_tiny.py"), str(tmp_path), "--json"]
        done = subprocess.run(
            [*command, "--only", *only, "--seeds", *seeds], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "holds" in done.stderr and "NOT" not in done.stderr
        rows |= json.loads(done.stdout)["commit_tiny"]
    final = {name: row["final"][0] for name, row in rows.items()}
    assert final["LLM up 10:1"] > 1.5 and final["CLR from 10:1"] < 1.0  # chance is 1.66
    assert final["constant 1:1"] < 0.05
    assert rows["CLR 1:1, KL, N = L"]["deviation"][0] > 4
