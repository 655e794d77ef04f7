"""Samples with what their answers looked at: tokens' shares against eager maps, places by projector, and the report's figures."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attention_toys import brute_rows, maps
from browser import BROWSER, show
from counterfactual_toys import MEL, Both, run_with
from matplotlib.figure import Figure
from PIL import Image
from report_runs import CHOICES, costs, tree_of, write_run
from toys import tree

from mllm_factory import MODALITIES, ConfigError, Message, Metric, MultimodalModel, Sample, build, cli, recorder
from mllm_factory.assemble import build_collator, build_model
from mllm_factory.components.metrics.attention_shown import places_of
from mllm_factory.data import Collator
from mllm_factory.report import make
from mllm_factory.report_samples import sample_plans

PATCH = {"name": "patch", "image_size": 16, "patch_size": 4, "dim": 8}


def made(projector: Any, audio: Any = None, **vision: Any) -> tuple[MultimodalModel, Collator]:
    node = tree(vision={**PATCH, **vision}, projector=projector, audio=audio)
    if audio:
        node["tuning"]["audio"] = {"name": "frozen"}
        node["audio_projector"] = {"name": "mlp"}
    model = build_model(node).eval()
    return model, build_collator(node, model)


@pytest.mark.parametrize(
    ("projector", "kind", "side"),
    [
        ({"name": "mlp", "depth": 1}, "grid", 4),
        ({"name": "pixel_shuffle", "factor": 2}, "grid", 2),
        ({"name": "pool", "layout": "grid", "stride": 2}, "grid", 2),
        ({"name": "c_abstractor", "num_tokens": 9, "hidden_dim": 8}, "grid", 3),
        ({"name": "pool", "layout": "sequence", "stride": 4}, "tokens", 0),
        ({"name": "pixel_shuffle", "factor": 2, "grid": [2, 8]}, "tokens", 0),
        ({"name": "resampler", "num_tokens": 16, "heads": 2}, "tokens", 0),  # as many as there are cells
    ],
    ids=lambda v: v["name"] if isinstance(v, dict) else None,
)
def test_a_grid_is_one_where_places_are_kept(projector: dict[str, Any], kind: str, side: int) -> None:
    model, _ = made(projector)
    found = places_of(model, "vision")
    assert (found.kind, found.side, bool(found.why)) == (kind, side, kind == "tokens")


def test_frames_are_in_time_unless_they_are_cells() -> None:
    model, _ = made({"name": "mlp"}, MEL)
    assert places_of(model, "audio").kind == "time"
    model.encoders["audio"].add_module("spectral", torch.nn.Conv2d(1, 1, 1))
    assert "time and frequency" in places_of(model, "audio").why


def shown(model: MultimodalModel, collator: Collator, samples: list[Sample], **options: Any) -> Any:
    found = build(Metric, {"name": "attention", "shown": 2, **options}, "metrics.m")
    run_with(found, model, collator, samples, 4)
    return found


def test_shares_of_tokens_are_those_of_the_eager_maps() -> None:
    model, collator = made({"name": "mlp"}, MEL)
    samples = [Both(8)[i] for i in (0, 1, 5)]
    found = shown(model, collator, samples)
    chosen = [s for s in samples if s.id in {item["sample"] for item in found.items}]
    assert len(chosen) == 2
    for sample in chosen:
        batch = collator([sample])
        A = maps(model, batch)[:, 0]  # [L, H, T, T]
        per_key = A[:, :, brute_rows(batch, 0)].mean((1, 2))  # [L, T]
        for name, code in MODALITIES.items():
            places = [t for t, c in enumerate(batch.modality[0].tolist()) if c == code]
            rows = [r for r in found.tokens if r["sample"] == sample.id and r["modality"] == name]
            assert [r["token"] for r in rows] == list(range(len(places)))
            torch.testing.assert_close(
                torch.tensor([r["layer_01"] for r in rows]), per_key[1, places], rtol=0, atol=1e-5
            )
            record = next(r for r in found.records if r["id"] == sample.id)
            share = sum(record[f"attention_share/{name}"]) / 2
            assert sum(r["mean"] for r in rows) == pytest.approx(share, abs=1e-5)


def test_what_is_told_of_an_item() -> None:
    model, collator = made({"name": "mlp"}, MEL)
    samples = [Both(8)[i] for i in (0, 1, 5)]
    found = shown(model, collator, samples)
    of = {sample.id: sample for sample in samples}
    for item in found.items:
        sample = of[item["sample"]]
        assert item["reference"] == sample.reference
        asked = sample.messages[0].text.replace("<image>", "").replace("<audio>", "").strip()
        assert item["question"] == asked
        head, _, data = item["picture"].partition(",")
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
        assert head == "data:image/png;base64"
        if item["modality"] == "vision":
            expected = np.asarray(sample.media["vision"][0].resize((16, 16)))
            assert np.abs(image.astype(int) - expected).max() <= 1  # normalising is undone
            assert (item["layout"], item["side"]) == ("grid", 4)
        else:
            assert image.shape[:2] == (20, 50)
            assert (item["layout"], item["seconds"]) == ("time", 0.5)
    with torch.no_grad():
        batch = collator([of[found.items[0]["sample"]]])
        likeliest = model(batch, logits=True).logits.argmax(-1).tolist()
    assert found.items[0]["answer"] == model.backbone.tokenizer.decode(likeliest, skip_special_tokens=True).strip()


def test_nothing_is_kept_unless_asked_for() -> None:
    model, collator = made({"name": "mlp"})
    found = build(Metric, {"name": "attention"}, "metrics.m")
    run_with(found, model, collator, [Sample("t", (Message("user", "a"), Message("assistant", "b")))] * 2, 2)
    assert found.tables() == {"shown": [], "shown_tokens": []}


def test_a_number_below_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="shown: -1 samples cannot be shown"):
        build(Metric, {"name": "attention", "shown": -1}, "metrics.m")


# ---------------------------------------------------------------- in a report


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that show the same two samples; one of them keeps no places."""
    folder = tmp_path_factory.mktemp("shown") / "runs"
    for i, projector in enumerate(({"name": "mlp"}, {"name": "resampler", "num_tokens": 16, "heads": 2})):
        model, collator = made(projector, MEL)
        found = shown(model, collator, [Both(8)[n] for n in (0, 1, 5)])
        name = str(projector["name"])
        write_run(
            folder / str(i), [f"projector={name}"], tree_of(projector=projector),
            {"exact_match": 0.5, **costs(10.0)}, [2.0, 1.0], {**CHOICES, "projector": name},
        )  # fmt: skip
        recorder.tables(folder / str(i), {"attention": found.tables()})
    return folder


def test_a_map_lies_over_the_picture(runs: Path) -> None:
    plans = list(sample_plans(make([str(runs / "0")]).groups))
    assert len(plans) == 4  # two samples, a picture and a sound each
    figure = Figure()
    plans[0].draw(figure)
    rows = [r for r in _table(runs / "0" / "tables" / "attention_shown_tokens.csv") if r["modality"] == "vision"][:16]
    values = np.array([float(r["mean"]) for r in rows]).reshape(4, 4)
    picture, heat = (axes.images[-1] for axes in figure.axes[:2])
    np.testing.assert_allclose(heat.get_array(), values)
    assert picture.get_extent() == heat.get_extent()
    assert figure.axes[1].images[0].get_array().shape == (16, 16)  # the picture in grey below


def _table(path: Path) -> list[dict[str, str]]:
    import csv

    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_bars_are_over_seconds_or_over_tokens(runs: Path) -> None:
    groups = make([str(runs)]).groups
    by = {plan.title: plan for plan in sample_plans(groups)}
    sound = next(plan for title, plan in by.items() if title.endswith("audio"))
    figure = Figure()
    sound.draw(figure)
    assert figure.axes[-1].get_xlabel() == "seconds"
    bars = figure.axes[1].patches
    assert len(bars) == 8 and bars[-1].get_x() == pytest.approx(7 * 0.5 / 8)
    seen = next(plan for title, plan in by.items() if title.endswith("vision"))
    figure = Figure()
    seen.draw(figure)  # one of the two runs has no grid
    assert figure.axes[-1].get_xlabel() == "token"
    assert "the projector mixes the encoder's tokens" in seen.caption
    assert seen.caption.startswith("Question: which? ")


@pytest.mark.skipif(BROWSER is None, reason="no headless browser is installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(runs: Path, width: int, tmp_path: Path) -> None:
    assert cli.main(["report", str(runs), "--output", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    seen = show(page, width, tmp_path)
    assert (seen.scroll, seen.client) == (width, width)
    assert seen.images == seen.loaded == len(list((tmp_path / "report" / "figures").glob("*.svg"))) == 7
    assert seen.console == ""
    assert "<h2>Samples</h2>" in page and "No place in it is known" in page


def test_damaged_tables_show_nothing_and_end_nothing(runs: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(runs / "0", tmp_path / "run")
    file = tmp_path / "run" / "tables" / "attention_shown.csv"
    file.write_text(file.read_text().replace("data:image/png;base64,iVBOR", "data:image/png;base64,!!"))
    plans = list(sample_plans(make([str(tmp_path / "run")]).groups))
    figure = Figure()
    plans[0].draw(figure)
    assert [len(axes.images) for axes in figure.axes[:2]] == [0, 1]  # no picture, but the map
    (tmp_path / "run" / "tables" / "attention_shown_tokens.csv").unlink()
    assert list(sample_plans(make([str(tmp_path / "run")]).groups)) == []
