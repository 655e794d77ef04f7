"""Checkpoints: what is in the folder, and that nothing a machine does can spoil what was there before."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from toys import Colours, tree

from mllm_factory import checkpoint, run, runs
from mllm_factory.assemble import build_collator, build_model
from mllm_factory.checkpoint import Writer, fingerprints, initialise, load
from mllm_factory.distributed import World
from mllm_factory.errors import CheckpointError
from mllm_factory.model import trained_tensors

ALONE = World(0, 1, torch.device("cpu"))
FILES = {"README.md", "config.yaml", "manifest.json", "model.safetensors", "trainer.pt"}
LORA = {"name": "lora", "rank": 2, "targets": "all-linear"}


def writer(folder: Path, keep: int | None = 2, **changes: Any) -> tuple[Writer, Any]:
    node = tree(folder, **changes)
    model = build_model(node)
    return Writer(folder, node, fingerprints(model), keep, ALONE), model


def progress(step: int) -> dict[str, Any]:
    return {"step": step, "optimizer": {"w": {"exp_avg": torch.arange(100.0)}}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps, saved every two."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    metrics = {"answer_loss": {"name": "answer_loss"}, "exact_match": {"name": "exact_match", "max_new_tokens": 3}}
    run.train(tree(folder, trainer__max_steps=6, trainer__keep=None, metrics=metrics, tuning__backbone=LORA))
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run to spoil."""
    return shutil.copytree(trained, tmp_path / "copy")


# ---------------------------------------------------------------- contents


def test_a_run_leaves_the_promised_files(trained: Path) -> None:
    assert {p.name for p in trained.iterdir()} >= {"config.yaml", "metrics.jsonl", "report.json", "checkpoints"}
    assert [p.name for p in sorted((trained / "checkpoints").iterdir())] == [
        "step_000002",
        "step_000004",
        "step_000006",
    ]
    step = trained / "checkpoints" / "step_000004"
    assert {p.name for p in step.iterdir()} == FILES
    assert yaml.safe_load((step / "config.yaml").read_text()) == yaml.safe_load((trained / "config.yaml").read_text())
    assert yaml.safe_load((step / "config.yaml").read_text())["trainer"]["max_steps"] == 6
    readme = (step / "README.md").read_text()
    assert "# toy, step 4" in readme and "toys:Patches" in readme and "evaluate checkpoint=" in readme


def test_only_trained_tensors_are_written(trained: Path) -> None:
    saved = load_file(trained / "checkpoints" / "step_000006" / "model.safetensors")
    model = build_model(tree(tuning__backbone=LORA))
    expected = {name for name, p in model.named_parameters() if p.requires_grad}
    assert saved.keys() == expected
    assert {name.partition(".")[0] for name in saved} == {"projectors", "backbone"}
    assert all("lora_" in name for name in saved if name.startswith("backbone"))


def test_saved_tensors_are_those_of_the_model(tmp_path: Path) -> None:
    encoder = {"vision": {"name": "toys:NormedPatches"}, "tuning__vision": {"name": "full"}}
    write, model = writer(tmp_path, **encoder)
    model.encoders["vision"].norm.running_var.mul_(3)
    folder = write.save(model, progress(1))
    model.encoders["vision"].conv.weight.data = model.encoders["vision"].conv.weight.data.to(
        memory_format=torch.channels_last
    )
    other = build_model(tree(**encoder, seed=1))
    assert not torch.equal(other.encoders["vision"].conv.weight, model.encoders["vision"].conv.weight)
    load(folder, other)
    assert all(torch.equal(t, trained_tensors(other)[name]) for name, t in trained_tensors(model).items())
    assert torch.equal(write.save(model, progress(2)) and load_file(folder / "model.safetensors")["encoders.vision.conv.weight"],
                       model.encoders["vision"].conv.weight)  # fmt: skip


def test_equal_weights_give_equal_bytes(tmp_path: Path) -> None:
    a = [writer(tmp_path / name)[0].save(build_model(tree()), progress(1)) for name in "ab"]
    assert (a[0] / "model.safetensors").read_bytes() == (a[1] / "model.safetensors").read_bytes()


def test_the_oldest_are_dropped(tmp_path: Path) -> None:
    write, model = writer(tmp_path, keep=2)
    for step in (1, 2, 3, 999, 1000):
        write.save(model, progress(step))
    assert list(runs.steps(tmp_path)) == [999, 1000]


def test_a_run_continued_from_an_earlier_step_drops_the_later_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write, model = writer(tmp_path, keep=2)
    for step in (2, 4, 6, 3):
        write.save(model, progress(step))
    assert list(runs.steps(tmp_path)) == [3]
    assert "removing step_000004, step_000006: the run was continued from an earlier step" in caplog.text


def test_pickles_are_never_read(copied: Path) -> None:
    step = copied / "checkpoints" / "step_000006"
    torch.save({"step": 1, "code": Path("x")}, step / "trainer.pt")
    with pytest.raises(CheckpointError, match=r"trainer\.pt cannot be read"):
        checkpoint.read_progress(step)


# ---------------------------------------------------------------- damage


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


DAMAGES = [(spoil, name) for spoil in (flip, cut, Path.unlink) for name in sorted(FILES)]


@pytest.mark.parametrize(("spoil", "name"), DAMAGES, ids=lambda value: getattr(value, "__name__", value))
def test_any_damage_is_found(copied: Path, caplog: pytest.LogCaptureFixture, spoil: Any, name: str) -> None:
    newest = copied / "checkpoints" / "step_000006"
    spoil(newest / name)
    assert runs.latest(copied) == copied / "checkpoints" / "step_000004"
    # a manifest with another letter is broken itself, or says something else of any file
    shown = r"[\w.]+" if (spoil, name) == (flip, "manifest.json") else re.escape(name)
    assert re.search(f"skipping the damaged checkpoint .*step_000006: {shown} is", caplog.text)
    assert runs.resolve(copied) == runs.resolve(copied / "checkpoints") == copied / "checkpoints" / "step_000004"
    with pytest.raises(CheckpointError, match=rf"step_000006 is damaged: {shown} is (missing|not as it was written)"):
        runs.resolve(newest)


def test_a_file_that_cannot_be_read_is_damage(copied: Path) -> None:
    step = copied / "checkpoints" / "step_000006"
    (step / "trainer.pt").unlink()
    (step / "trainer.pt").mkdir()
    assert runs.damage(step) is not None
    (step / "manifest.json").write_text("[1, 2]")
    assert runs.damage(step) == "manifest.json is not as it was written"
    (step / "manifest.json").write_text("{}")
    assert runs.damage(step) == "manifest.json is not as it was written"


def test_all_damaged_or_nothing_there_is_said(copied: Path, tmp_path: Path) -> None:
    for step in runs.steps(copied).values():
        cut(step / "model.safetensors")
    assert runs.latest(copied) is None
    for path in (copied, copied / "checkpoints", tmp_path):
        with pytest.raises(CheckpointError, match="holds no usable checkpoint; give a run folder"):
            runs.resolve(path)
    with pytest.raises(CheckpointError, match="there is no checkpoint at .*nowhere"):
        runs.resolve(tmp_path / "nowhere")


# ---------------------------------------------------------------- crashes


def crashes(folder: str) -> None:
    """Save step 1, then over and over step 2, and die at each single operation on the disk; look at what is left."""
    run_folder = Path(folder)
    write, model = writer(run_folder, keep=None)
    write.save(model, progress(1))
    points = 0
    while True:
        child = os.fork()
        if child == 0:
            die_at(points)
            write.save(model, progress(2))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        usable = [step for step, path in runs.steps(run_folder).items() if runs.damage(path) is None]
        found = runs.latest(run_folder)
        print(json.dumps({"point": points, "usable": usable, "latest": found and found.name}), flush=True)
        if os.waitstatus_to_exitcode(status) == 0:
            break
        points += 1


def die_at(number: int) -> None:
    """Let the process kill itself before its n-th operation on the disk from now on."""
    import safetensors.torch

    left = [number]

    def deadly(operation: Any) -> Any:
        def run(*given: Any, **named: Any) -> Any:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return operation(*given, **named)

        return run

    for owner, names in (
        (os, ("fsync",)),
        (Path, ("rename", "mkdir", "write_text")),
        (shutil, ("rmtree",)),
        (torch, ("save",)),
        (safetensors.torch, ("save_file",)),
        (checkpoint, ("save_file",)),
    ):
        for name in names:
            setattr(owner, name, deadly(getattr(owner, name)))


def test_death_at_any_moment_of_a_save_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert jobs.finish(jobs.start(crashes, str(tmp_path / "run"), log=log)) == 0, log.read_text()
    found = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    assert len(found) > 15, "points of death"
    assert all(1 in point["usable"] for point in found), "the former one is never touched"
    first = next(i for i, point in enumerate(found) if 2 in point["usable"])
    assert 8 < first < len(found) - 1, "it appears late, and a later crash happens with it in place"
    for point in found[first:]:
        assert point["latest"] == "step_000002", f"a newer one that was whole is whole again: {point}"
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"step_000001", "step_000002"}, (
        "no leftovers"
    )


def test_leftovers_of_a_crash_are_taken_care_of(copied: Path) -> None:
    checkpoints = copied / "checkpoints"
    (checkpoints / "step_000006").rename(checkpoints / "step_000006.old")  # died between two renames
    shutil.copytree(checkpoints / "step_000004", checkpoints / "step_000008.tmp")
    assert runs.resolve(checkpoints / "step_000006") == checkpoints / "step_000006"
    assert list(runs.steps(copied)) == [2, 4, 6]
    (checkpoints / "step_000006").rename(checkpoints / "step_000006.old")
    assert runs.latest(copied) == checkpoints / "step_000006"


# ---------------------------------------------------------------- disks


def test_a_full_disk_is_one_line_and_the_former_checkpoint_stays(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk; it hits each of the two big files in turn."""
    write, model = writer(tmp_path / "run")
    first = write.save(model, progress(1))
    sizes = {path.name: path.stat().st_size for path in first.iterdir()}
    big = {"step": 2, "optimizer": {"w": {"exp_avg": torch.zeros(sizes["model.safetensors"])}}}
    with limited(sizes["model.safetensors"] // 2), pytest.raises(CheckpointError) as weights:
        write.save(model, progress(2))
    with limited(sizes["model.safetensors"] + 4096), pytest.raises(CheckpointError) as optimizer:
        write.save(model, big)
    for raised in (weights, optimizer):
        text = str(raised.value)
        assert re.search(r"step_000002 cannot be written: (File too large|.*os error 27)", text), text
        assert "earlier ones are untouched; free space or choose another output_dir" in text and "\n" not in text
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000001"]
    assert runs.latest(tmp_path / "run") == first
    assert runs.damage(write.save(model, big)) is None, "and goes on when there is room again"


class limited:
    """No file of this process grows above so many bytes."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> None:
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
        signal.signal(signal.SIGXFSZ, self.handler)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    write, model = writer(tmp_path / "run")
    (tmp_path / "run").write_text("a file")
    with pytest.raises(CheckpointError, match="step_000001 cannot be written: Not a directory; earlier ones"):
        write.save(model, progress(1))


class InterruptedFile(io.BytesIO):
    """Ctrl-C comes while the third piece is written."""

    pieces = 0

    def write(self, data: Any) -> int:
        self.pieces += 1
        if self.pieces == 3:
            raise KeyboardInterrupt
        return super().write(data)


def test_an_interrupt_while_writing_is_no_failure_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch then fails at the end of its file, and says so instead."""
    write, model = writer(tmp_path / "run")
    write.save(model, progress(1))
    original = torch.save
    monkeypatch.setattr(torch, "save", lambda value, file: original(value, InterruptedFile()))
    with pytest.raises(RuntimeError, match="unexpected pos"):
        torch.save({"a": torch.zeros(9)}, None)
    with pytest.raises(KeyboardInterrupt):
        write.save(model, progress(2))
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000001"]


# ---------------------------------------------------------------- reading


def test_a_moved_folder_is_evaluated_from_itself_alone(trained: Path, tmp_path: Path) -> None:
    """The step's folder elsewhere, its run gone: the same scores to the last bit."""
    step = Path(shutil.copytree(trained / "checkpoints" / "step_000006", tmp_path / "mine"))
    (step / "trainer.pt").rename(tmp_path / "away")
    node = checkpoint.read_config(step)
    (tmp_path / "away").rename(step / "trainer.pt")
    value = run.evaluate({**node, "checkpoint": str(step), "output_dir": str(tmp_path / "out")})
    here, there = (json.loads((f / "report.json").read_text()) for f in (tmp_path / "out", trained))
    assert here["answer_loss"] == there["answer_loss"] == value and here["samples"] == 8.0
    assert here["exact_match"] == there["exact_match"]
    untrained = run.evaluate({**node, "checkpoint": None, "output_dir": str(tmp_path / "new")})
    assert untrained != value


def test_loading_does_not_need_the_optimizer(trained: Path, tmp_path: Path) -> None:
    step = Path(shutil.copytree(trained / "checkpoints" / "step_000006", tmp_path / "mine"))
    (step / "trainer.pt").write_bytes(b"")
    load(step, build_model(checkpoint.read_config(step)))


@pytest.fixture
def changed_base(trained: Path) -> tuple[Path, Any]:
    model = build_model(checkpoint.read_config(trained / "checkpoints" / "step_000006"))
    return trained / "checkpoints" / "step_000006", model


def test_other_frozen_weights_are_refused(changed_base: tuple[Path, Any]) -> None:
    step, model = changed_base
    load(step, model)
    model.encoders["vision"].linear.bias.data[0] += 1e-3
    with pytest.raises(
        CheckpointError, match=r"the frozen weights of vision are not those that .* was trained with; restore"
    ):
        load(step, model)
    model.backbone.model.lm_head.weight.data.mul_(2)
    with pytest.raises(CheckpointError, match="backbone and vision are not those"):
        load(step, model)


def test_other_frozen_statistics_are_refused(tmp_path: Path) -> None:
    write, model = writer(tmp_path, vision={"name": "toys:NormedPatches"})
    step = write.save(model, progress(1))
    model.encoders["vision"].norm.running_mean += 1
    with pytest.raises(CheckpointError, match="the frozen weights of vision"):
        load(step, model)


def test_fingerprints_ignore_what_is_trained_and_tied() -> None:
    node = tree()
    node["backbone"]["sizes"]["tie_word_embeddings"] = True
    model = build_model(node)
    before = fingerprints(model)
    for p in trained_tensors(model).values():
        p.data.add_(1)
    assert fingerprints(model) == before and before["vision"] != before["backbone"]
    frozen = build_model({**node, "tuning": {**node["tuning"], "backbone": {"name": "frozen"}}})
    assert fingerprints(frozen)["backbone"] != before["backbone"]


def test_other_tensors_and_shapes_are_counted_and_named(trained: Path) -> None:
    step = trained / "checkpoints" / "step_000006"
    with pytest.raises(CheckpointError) as raised:
        load(step, build_model(tree()))
    text = str(raised.value)
    assert re.search(
        r"does not fit this model: 21 missing in the checkpoint \(backbone.*, \.\.\.\); 28 unknown to the model \(",
        text,
    ), text
    with pytest.raises(CheckpointError, match=r"28 of another shape \(backbone\.model.* \[2, 16\] -> \[3, 16\]"):
        load(step, build_model(tree(tuning__backbone={**LORA, "rank": 3})))


def test_init_from_takes_what_both_have(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From LoRA to all weights: only the projector is shared."""
    step = trained / "checkpoints" / "step_000006"
    model, saved = build_model(tree(seed=5)), load_file(step / "model.safetensors")
    before = {name: p.clone() for name, p in model.named_parameters()}
    taken, of = initialise(step, model)
    assert (taken, of) == (4, len(trained_tensors(model)))
    for name, p in model.named_parameters():
        assert torch.equal(p, saved[name] if name in saved else before[name]), name
    assert "init_from: 28 tensors of the checkpoint are not trained here" in caplog.text
    frozen = {"vision": {"name": "full"}, "projector": {"name": "frozen"}, "backbone": {"name": "frozen"}}
    with pytest.raises(CheckpointError, match="shares no trained tensor with this model: 32 tensors"):
        initialise(step, build_model(tree(tuning=frozen)))


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load(tmp_path, build_model(tree()))


# ---------------------------------------------------------------- finding runs


def test_auto_means_the_newest_run_of_the_name(tmp_path: Path) -> None:
    root = tmp_path / "toy"
    for name in ("2026-01-01_10-00-00", "2026-01-02_10-00-00", "sweep_1"):
        (root / name).mkdir(parents=True)
    for name in ("2026-01-01_10-00-00", "2026-01-02_10-00-00"):
        (root / name / "config.yaml").write_text("{}")
    new = root / "2026-01-03_10-00-00"
    assert runs.find_run("auto", tree(new)) == root / "2026-01-02_10-00-00"
    (new / ".hydra").mkdir(parents=True)
    assert runs.find_run("auto", tree(new)) == root / "2026-01-02_10-00-00"
    (new / "config.yaml").write_text("{}")
    assert runs.find_run("auto", tree(new)) == new
    assert runs.find_run("auto", tree(tmp_path / "elsewhere" / "x")) is None


def test_a_named_run_is_found_from_any_of_its_folders(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (trained, trained / "checkpoints", trained / "checkpoints" / "step_000002"):
        assert checkpoint.find_run(str(path), {}) == trained
    monkeypatch.chdir(trained / "checkpoints")
    assert checkpoint.find_run("step_000004", {}) == trained and checkpoint.find_run(".", {}) == trained
    lone = shutil.copytree(trained / "checkpoints" / "step_000002", tmp_path / "lone")
    with pytest.raises(CheckpointError, match="lies in no run folder .* init_from"):
        checkpoint.find_run(str(lone), {})
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        checkpoint.find_run(str(tmp_path / "no"), {})


def test_configs_that_are_none_are_named(tmp_path: Path) -> None:
    for text in ("- a", "a: [", ""):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.yaml (cannot be read|is no tree)"):
            checkpoint.read_config(tmp_path)
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(CheckpointError, match=r"config\.yaml cannot be read"):
        checkpoint.read_config(tmp_path)


def test_collators_of_a_checkpoint_are_usable(trained: Path) -> None:
    node = checkpoint.read_config(runs.resolve(trained))
    assert len(build_collator(node, build_model(node))([Colours(1)[0]]).ids) == 1
