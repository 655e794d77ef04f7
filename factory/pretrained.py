"""Where weights come from, and how they get into a module.

A ``pretrained`` option is a hub id, a local folder or file, or ``pkg://python_package`` (weights shipped inside an installed
package). An unreachable hub is an answer within seconds, not a wait for the libraries' own retries.
"""

from __future__ import annotations

import difflib
import threading
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from mllm_factory.errors import ConfigError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".gguf")
"""Endings of files that hold weights."""

BUNDLE = "bundle"
"""The value of ``pretrained`` that stands for what a component's own library offers for download."""

PROBE_SECONDS = 3.0
"""How long a hub may take to answer at all."""


def on_meta() -> bool:
    """True while a model is built without memory (``with torch.device("meta")``): verify sources, read no weights."""
    return torch.get_default_device().type == "meta"


# ---------------------------------------------------------------- where


def locate(pretrained: str) -> Path | str:
    """Find what a ``pretrained`` or ``tokenizer`` option names.

    Returns:
        A folder or file on this machine; or the hub id itself, when the hub answers and may serve it. A hub id whose files
        were downloaded before is a folder when the hub does not answer. On the meta device the hub is not asked.

    Raises:
        ConfigError: no such package, folder or file, or the hub cannot be reached.
    """
    if pretrained.startswith("pkg://"):
        return _in_package(pretrained)
    path = Path(pretrained).expanduser()
    if path.exists():
        return path.resolve()
    if not is_hub_id(pretrained):
        raise ConfigError(f"'{pretrained}' does not exist: looked for {path.absolute()}{_neighbours(path.absolute())}")
    return _on_hub(pretrained)


def is_hub_id(pretrained: str) -> bool:
    """True for what can only mean a repository of the hub: no package, nothing on this machine, no path by its form."""
    if pretrained == BUNDLE:
        return False
    path = Path(pretrained).expanduser()
    path_like = pretrained.startswith((".", "/", "~", "pkg://")) or path.suffix in SUFFIXES
    return bool(pretrained) and not path_like and pretrained.count("/") <= 1 and not path.exists()


def cached(repo: str) -> Path | None:
    """The folder of a hub repository's newest downloaded version, named by its revision; None where there is none."""
    from huggingface_hub import constants

    return _snapshot(Path(constants.HF_HUB_CACHE), repo)


def _in_package(pretrained: str) -> Path:
    dotted, _, inner = pretrained.removeprefix("pkg://").partition("/")
    package, *deeper = dotted.split(".")
    spec = find_spec(package) if package else None  # of the top package only: finding a deeper one would import it
    if spec is None:
        remedy = (
            f"pip install {package.replace('_', '-')}" if package else "write pkg://package or pkg://package/inner/path"
        )
        raise ConfigError(f"'{pretrained}': no installed package '{package}'; {remedy}")
    roots = [Path(root) for root in spec.submodule_search_locations or ()]
    for root in roots:
        path = root.joinpath(*deeper, inner)
        if path.exists():
            return path
    if not roots:
        raise ConfigError(f"'{pretrained}': '{package}' is a single module, not a package that can carry files")
    path = roots[0].joinpath(*deeper, inner)
    raise ConfigError(f"'{pretrained}': the package '{package}' has no '{inner or dotted}'{_neighbours(path)}")


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist either"
    names = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith((".", "__")))
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5) or names[:5]
    return f"; near it: {', '.join(near)}" if near else f"; {path.parent} is empty"


def _on_hub(repo: str) -> Path | str:
    from huggingface_hub import constants

    here = cached(repo)
    if on_meta():  # counting needs no weights, so nobody is asked for them
        return here or repo
    if not constants.HF_HUB_OFFLINE and _reachable(constants.ENDPOINT, int(time.monotonic() // 60)):
        return repo
    if here is not None:
        return here
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
    raise ConfigError(
        f"'{repo}' is no local folder and the hub cannot be asked for it ({why}); download it elsewhere and give the folder, "
        "use pkg://package, or set pretrained: null with an architecture"
    )


def _snapshot(cache: Path, repo: str) -> Path | None:
    """The newest downloaded version of a hub repository, or None."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    main = folder / "refs" / "main"
    if main.is_file():
        named = folder / "snapshots" / main.read_text(encoding="utf-8").strip()
        return named if named.is_dir() else None
    found = sorted(folder.glob("snapshots/*/"), key=lambda entry: entry.stat().st_mtime)
    return found[-1] if found else None


@lru_cache(maxsize=8)
def _reachable(endpoint: str, minute: int) -> bool:
    """Whether anything answers at ``endpoint``; asked again every ``minute``.

    The question runs in a thread that is left behind when it is late: a name lookup has no time limit of its own.
    """
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(_answers(endpoint)), daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS + 0.5)
    return answers == [True]


def _answers(endpoint: str) -> bool:
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    try:
        urlopen(Request(endpoint, method="HEAD"), timeout=PROBE_SECONDS).close()
    except HTTPError:
        return True  # a refusal is an answer
    except (OSError, ValueError):
        return False
    return True


def weights_file(path: Path, suffixes: Sequence[str] = SUFFIXES) -> Path:
    """The single weights file that ``path`` is, or that lies in the folder ``path`` (at its top, else anywhere below).

    Raises:
        ConfigError: there is none, or several.
    """
    if path.is_file():
        if path.suffix in suffixes:
            return path
        raise ConfigError(f"{path} is no weights file: its name must end in {', '.join(suffixes)}")
    for files in (path.glob("*"), path.rglob("*")):
        found = sorted(file for file in files if file.suffix in suffixes and file.is_file())
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(str(file.relative_to(path)) for file in found[:5])
            raise ConfigError(f"{path} holds {len(found)} weights files ({names}); give the path of one of them")
    raise ConfigError(f"{path} holds no weights file ({', '.join(suffixes)})")


# ---------------------------------------------------------------- how


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or torch file by name, on the CPU.

    A torch file may wrap them once, as ``state_dict`` or ``model``; nothing but tensors and plain values is unpickled.

    Raises:
        ConfigError: damaged, or something else than named tensors.
    """
    if path.suffix == ".gguf":
        raise ConfigError(f"{path} is a GGUF file, which only a language model can read; give .safetensors or .pth")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"{path} cannot be read as weights ({type(error).__name__}: {reason}); is it complete?"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not (isinstance(state, Mapping) and state and all(isinstance(value, Tensor) for value in state.values())):
        raise ConfigError(f"{path} does not hold named tensors; save a state_dict")
    return dict(state)


def load_matching(module: nn.Module, weights: Path | Mapping[str, Tensor], match: str = "name") -> None:
    """Fill ``module`` with weights.

    Args:
        module: its every parameter and persistent buffer is filled.
        weights: a file, a folder with a single weights file, or the tensors themselves by name.
        match: ``name``: equal keys. A key may be left over only where the module has no tensor under the key's first
            word, such as a classifier that was cut off. ``order``: the tensors one after the other; shapes must be equal at
            each position, and batch norm's ``num_batches_tracked`` may be missing on either side.

    Raises:
        ConfigError: unknown ``match``, a damaged file, or weights of another architecture; names the first difference.
    """
    pairs = {"name": _by_name, "order": _by_order}
    if match not in pairs:
        raise ConfigError(f"match: '{match}' is neither 'name' nor 'order'")
    source = "the weights"
    if isinstance(weights, Path):
        weights, source = read_weights(weights_file(weights)), str(weights)
    targets = module.state_dict()
    with torch.no_grad():
        for target, value in pairs[match](targets, weights, source):
            target.copy_(value)


def _by_name(targets: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> list[tuple[Tensor, Tensor]]:
    heads = {key.partition(".")[0] for key in targets}
    missing = [key for key in targets if key not in weights and not _optional(key)]
    surplus = [key for key in weights if key not in targets and key.partition(".")[0] in heads and not _optional(key)]
    if missing or surplus:
        raise ConfigError(
            f"{source} does not fit by name: {_some(missing)} missing, {_some(surplus)} unexpected; "
            "check the architecture, or try match: order"
        )
    pairs = [(key, key) for key in targets if key in weights]
    return _checked(pairs, targets, weights, source)


def _by_order(targets: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> list[tuple[Tensor, Tensor]]:
    ours, theirs = list(targets), list(weights)
    if len(ours) != len(theirs):
        ours, theirs = ([key for key in keys if not _optional(key)] for keys in (ours, theirs))
    result = _checked(list(zip(ours, theirs, strict=False)), targets, weights, source)
    if len(ours) != len(theirs):
        raise ConfigError(f"{source} does not fit by order: it has {len(theirs)} tensors, the architecture {len(ours)}")
    return result


def _checked(
    pairs: Sequence[tuple[str, str]], targets: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str
) -> list[tuple[Tensor, Tensor]]:
    for position, (ours, theirs) in enumerate(pairs):
        if targets[ours].shape != weights[theirs].shape:
            raise ConfigError(
                f"{source} does not fit: tensor {position} is '{theirs}' {list(weights[theirs].shape)} there and "
                f"'{ours}' {list(targets[ours].shape)} in the architecture"
            )
    return [(targets[ours], weights[theirs]) for ours, theirs in pairs]


def _optional(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def _some(keys: Sequence[str]) -> str:
    return f"{len(keys)}" + (f" ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else "")
