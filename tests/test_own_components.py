"""Classes of one's own, end to end: by path, by preset, and as an installed pack. The files are those of ``docs/examples``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
COMMAND = str(Path(sys.executable).parent / "mllm-factory")
SHORT = ["experiment=smoke", "trainer.max_steps=2", "data.eval.limit=4", "metrics=[exact_match]", "output_dir=run"]


def call(folder: Path, *arguments: str, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command line in a folder, optionally with packages from another one."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "250"}
    env["PYTHONPATH"] = str(site) if site else ""
    return subprocess.run(
        [COMMAND, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=1800, check=False
    )


def trained(folder: Path, *arguments: str, site: Path | None = None) -> dict[str, list[int]]:
    """Train; the shapes of the projector's tensors in the last checkpoint."""
    done = call(folder, "train", *SHORT, *arguments, site=site)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "run" / "report.json").read_text())
    assert report["train/steps"] == 2
    assert report["samples"] == 4
    with safe_open(folder / "run/checkpoints/step_000002/model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith("projectors.vision.")]  # noqa: SIM118 - no mapping
        return {name.removeprefix("projectors.vision."): file.get_slice(name).get_shape() for name in names}


def gated(width: int) -> dict[str, list[int]]:
    """What the tensors of ``Gated`` look like between the smoke setting's encoder (64 wide) and backbone (32 wide)."""
    return {"up.weight": [2 * width, 64], "up.bias": [2 * width], "down.weight": [32, width], "down.bias": [32]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder with a module and presets of their own."""
    shutil.copy(EXAMPLES / "my_parts.py", tmp_path)
    shutil.copytree(EXAMPLES / "my_conf", tmp_path / "my_conf")
    return tmp_path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example pack, built and installed into a folder of its own."""
    source, target = tmp_path_factory.mktemp("source") / "pack", tmp_path_factory.mktemp("site")
    shutil.copytree(EXAMPLES / "pack", source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    options = ["--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*pip, *options, str(source)], check=True, timeout=300)
    return target


@pytest.mark.slow
def test_a_class_in_the_current_folder_trains_and_is_trusted_only_on_request(folder: Path) -> None:
    own = ["projector=null", "+projector.name=my_parts:Gated", "+projector.width=24"]
    assert trained(folder, *own) == gated(24)
    saved = yaml.safe_load((folder / "run/checkpoints/step_000002/config.yaml").read_text())
    assert saved["projector"] == {"name": "my_parts:Gated", "width": 24}

    (folder / "my_parts.py").rename(folder / "my_parts.kept")
    (folder / "my_parts.py").write_text("raise SystemExit('imported without being trusted')\n")
    refused = call(folder, "evaluate", "checkpoint=run")
    assert refused.returncode == 2
    assert "my_parts:Gated" in refused.stderr
    assert "trust_components=true" in refused.stderr
    assert "imported without being trusted" not in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1

    (folder / "my_parts.kept").replace(folder / "my_parts.py")
    allowed = call(folder, "evaluate", "checkpoint=run", "trust_components=true", "output_dir=again")
    assert allowed.returncode == 0, allowed.stderr
    before, after = (json.loads((folder / name / "report.json").read_text()) for name in ("run", "again"))
    assert after["exact_match"] == before["exact_match"]
    assert after["samples"] == before["samples"]


@pytest.mark.slow
def test_a_preset_in_a_folder_of_ones_own_trains(folder: Path) -> None:
    assert trained(folder, "--config-dir", "my_conf", "projector=gated", "projector.width=8") == gated(8)


@pytest.mark.slow
def test_an_installed_pack_trains_and_its_checkpoint_needs_no_trust(tmp_path: Path, site: Path) -> None:
    search = "hydra.searchpath=[pkg://gated_pack.conf]"
    assert trained(tmp_path, search, "projector=gated", site=site) == gated(64)
    again = call(tmp_path, "evaluate", "checkpoint=run", "output_dir=again", site=site)
    assert again.returncode == 0, again.stderr

    without = call(tmp_path, "evaluate", "checkpoint=run")
    assert without.returncode == 2
    assert "no Projector is named 'gated'" in without.stderr


@pytest.mark.slow
def test_a_pack_is_listed_and_described_like_a_built_in_part(tmp_path: Path, site: Path) -> None:
    listed = call(tmp_path, "list", "--components", "--json", site=site)
    assert {"mlp", "gated"} <= set(json.loads(listed.stdout)["components"]["Projector"])
    described = call(tmp_path, "describe", "Projector", "gated", site=site)
    assert described.returncode == 0, described.stderr
    assert "width" in described.stdout


@pytest.mark.slow
def test_one_class_of_each_kind_trains_together(folder: Path) -> None:
    from PIL import Image

    colours = ["red", "green", "blue", "black"]
    for number, colour in enumerate(colours):
        Image.new("RGB", (32, 32), colour).save(folder / f"{number}.png")
    rows = [f"{number}.png\twhat colour?\t{colour}" for number, colour in enumerate(colours)]
    (folder / "table.tsv").write_text("\n".join(["picture\tquestion\tanswer", *rows]) + "\n")
    done = call(folder, "train", "--config-dir", "my_conf", "experiment=all_mine", "output_dir=run")
    assert done.returncode == 0, done.stderr

    report = json.loads((folder / "run" / "report.json").read_text())
    assert 0 <= report["answer_length"] <= 8
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr/backbone"] for line in lines] == [2e-3 * (1 - step / 4) for step in range(4)]
    with safe_open(folder / "run/checkpoints/step_000004/model.safetensors", "pt") as file:
        backbone = [name for name in file.keys() if name.startswith("backbone.")]  # noqa: SIM118 - no mapping
    assert backbone
    assert all("norm" in name or "lora_" in name for name in backbone)
    assert any("norm" in name for name in backbone)
    assert any("lora_" in name for name in backbone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["+projector.name=my_parts:Gatde"], "has no class 'Gatde'; did you mean 'Gated'?"),
        (["+projector.name=my_prats:Gated"], "no module named 'my_prats'"),
        (["+projector.name=my_parts:AnswerLength"], "is not a subclass of mllm_factory.Projector"),
        (["+projector.name=my_parts:Gated", "+projector.widht=3"], "has no option 'widht'; did you mean 'width'?"),
        (["+projector.name=my_parts:Gated", "+projector.width=wide"], "expected a whole number, got 'wide'"),
        (
            ["+projector.name=my_parts:Gated", "+projector.in_dim=3"],
            "'in_dim' of my_parts:Gated follows from the other",
        ),
        (["+projector.name=my_parts:Gated", "+projector.width=0"], "width: 0 is no width; use 1 or more"),
    ],
)
def test_a_mistake_with_ones_own_class_is_one_line(folder: Path, arguments: list[str], told: str) -> None:
    done = call(folder, "check", "experiment=smoke", "projector=null", *arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
