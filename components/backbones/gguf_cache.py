"""GGUF files as ordinary transformers folders: de-quantised once, then read from a cache on disk."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_factory import ConfigError, one_line, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("mllm_factory")


def gguf_in(path: Path) -> Path | None:
    """The GGUF file that ``path`` is or that the folder ``path`` holds; None for a folder in transformers' own form.

    Raises:
        ConfigError: the folder holds several.
    """
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    found = sorted(path.glob("*.gguf"))
    if (path / "config.json").exists() or not found:
        return None
    if len(found) > 1:
        raise ConfigError(
            f"{path} holds {len(found)} GGUF files ({', '.join(f.name for f in found)}); give one of them"
        )
    return found[0]


def cache_root() -> Path:
    """Where de-quantised models are kept: ``$MLLM_FACTORY_CACHE``, else ``~/.cache/mllm_factory``."""
    return Path(os.environ.get("MLLM_FACTORY_CACHE") or Path.home() / ".cache" / "mllm_factory").expanduser()


def dequantised(file: Path) -> Path:
    """The folder with ``file`` as float32 safetensors, config and tokenizer; made at the first call.

    Several processes may ask at once: each writes a folder of its own and the first to rename it wins.

    Raises:
        ConfigError: the file is damaged or of an unsupported architecture, or the cache cannot be written.
    """
    root = cache_root() / "gguf"
    folder = root / _sha256(file)
    if (folder / "config.json").exists():
        return folder
    log.warning("de-quantising %s into %s (once)", file.name, folder)
    try:
        root.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".tmp-", dir=root))
    except OSError as error:
        raise ConfigError(_cannot_write(root, error)) from error
    try:
        _write(file, made)
        made.chmod(0o755)
        made.rename(folder)
    except OSError as error:
        if not (folder / "config.json").exists():  # else another process was first
            raise ConfigError(_cannot_write(root, error)) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _write(file: Path, folder: Path) -> None:
    try:
        model, tokenizer = _read(file)
    except Exception as error:
        reason = one_line(error, 300)
        raise ConfigError(f"{file} cannot be read as a GGUF model ({type(error).__name__}: {reason})") from error
    try:
        with quiet():
            tokenizer.save_pretrained(folder)
            model.save_pretrained(folder)
    except Exception as error:  # safetensors reports a full disk as an error of its own
        raise OSError(str(error)) from error


def _read(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model as an ordinary float32 one (a model read from GGUF refuses to be saved), and the tokenizer."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    given = {"gguf_file": file.name}
    unpack = getattr(transformers, "GgufConfig", None)  # releases without it always unpack
    how = {} if unpack is None else {"quantization_config": unpack(dequantize=True)}
    with torch.device("cpu"), quiet():
        config = AutoConfig.from_pretrained(file.parent, **given)  # parsing takes long, so only once for both models
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        packed = AutoModelForCausalLM.from_pretrained(file.parent, config=config, dtype=torch.float32, **given, **how)
        model.load_state_dict(packed.state_dict())
        return model, AutoTokenizer.from_pretrained(file.parent, **given)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _cannot_write(root: Path, error: OSError) -> str:
    return (
        f"the cache {root} cannot be written ({error}); free space there or set MLLM_FACTORY_CACHE to a writable folder"
    )
