"""grad_rel_norm of each part against its definition, and how a report draws the balance over the steps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from report_runs import costs, tree_of, write_run
from toys import Colours, tree

from mllm_factory import report_figures, run
from mllm_factory.assemble import build_collator, build_model
from mllm_factory.components.schedules.balance import partition
from mllm_factory.components.schedules.norms import norms
from mllm_factory.report import make

PARTS = {"projector": ["projector"], "backbone": ["backbone"]}


def test_it_is_the_gradient_over_the_weights_of_a_part() -> None:
    node = tree()
    model = build_model(node)
    source = Colours(4)
    model(build_collator(node, model)([source[i] for i in range(4)])).loss_sum.backward()
    found = norms(partition(model, PARTS))
    for name, part in (("projector", model.projectors), ("backbone", model.backbone)):
        g, theta = (
            torch.cat([x.flatten() for x in xs]) for xs in ([p.grad for p in part.parameters()], part.parameters())
        )
        assert found[f"grad_rel_norm/{name}"] == pytest.approx(float(g.norm() / theta.detach().norm()), rel=1e-5)
    for p in model.projectors.parameters():
        p.data.zero_()
    assert math.isnan(norms(partition(model, PARTS))["grad_rel_norm/projector"])


def test_a_watched_run_logs_it_and_learns_the_same(tmp_path: Path) -> None:
    watched = {"name": "commit", "act": False, "lr": 1e-2, "warmup": 0.2, "measure_every": 1, "components": PARTS}
    run.train(tree(tmp_path / "watched", schedule=watched, metrics=None))
    run.train(tree(tmp_path / "plain", metrics=None))
    lines, plain = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("watched", "plain")
    )
    assert [line["loss"] for line in lines] == [line["loss"] for line in plain]
    for line in lines:
        for part in PARTS:
            ratio = line[f"balance/grad_norm/{part}"] / line[f"balance/weight_norm/{part}"]
            assert line[f"balance/grad_rel_norm/{part}"] == pytest.approx(ratio)
            assert ratio > 0
        assert line["balance/kappa"] > 0


def test_a_report_draws_them_on_logarithmic_axes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [], tree_of(), {"exact_match": 0.5, **costs(1)})
    keys = ["balance/kappa", "balance/grad_rel_norm/llm"]
    lines = [{"step": i, "loss": 1.0, keys[0]: 2.0 * i, keys[1]: 0.1 / i, "balance/d/llm": 1.0} for i in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = make([str(folder)])
    plans = {p.title: p for p in report_figures._plans(made.groups, list(made.columns), made.main, 1)}
    assert [t for t in plans if "over training" in t] == [f"{k} over training" for k in ("loss", *keys)]
    for key in keys:
        figure = Figure()
        plans[f"{key} over training"].draw(figure)
        assert figure.axes[0].get_yscale() == "log"
        assert list(figure.axes[0].lines[0].get_ydata()) == [line[key] for line in lines]
    assert "not across parts" in plans[f"{keys[1]} over training"].caption
