"""The benchmarks of data and packing run, and both sides agree."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

SCRIPTS = str(Path(__file__).parent.parent / "scripts")


@pytest.mark.slow
def test_they_run_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    from benchmarks import data, packing

    found = packing.run(1, True)
    assert found.ok and {row.unit for row in found.rows} == {"tokens/s", "tokens a CPU second"}
    assert 0.3 < found.facts["padding"] < 0.95
    assert found.facts["unused places of packed rows"] < 0.2
    found = data.run(1, True)
    assert found.ok, found.checks
    assert {row.mark for row in found.rows} == {5.0, 500.0, 2000.0, 0.5}
    assert SCRIPTS in sys.path
