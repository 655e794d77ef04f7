"""The native export: a checkpoint that holds the whole model, so that nothing is fetched or re-made to use it.

The last strategy of every part is ``full``, so that all weights count as trained and are in ``model.safetensors``; sources
of pretrained weights are left out of ``config.yaml`` wherever the options alone give the same architecture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from mllm_factory import files, identity
from mllm_factory.assemble import Tree
from mllm_factory.checkpoint import META, fingerprints
from mllm_factory.errors import ConfigError
from mllm_factory.interfaces import Backbone, Encoder
from mllm_factory.media import BLANK
from mllm_factory.model import MultimodalModel, state_tensors, trained_tensors
from mllm_factory.registry import build, schema_of
from mllm_factory.types import MODALITIES

TUNED = ("vision", "audio", "projector", "audio_projector", "backbone")
VOLATILE = ("transformers_version", "_name_or_path", "architectures", "dtype", "_attn_implementation_internal")
"""What two configs of one architecture may differ in, besides the numbers of special tokens."""


def write(model: MultimodalModel, tree: Tree, tuned: bool, folder: Path, final: Path, step: int) -> None:
    """Fill ``folder``, which will be renamed to ``final``, with a checkpoint of the whole model.

    Args:
        tuned: the tuning's modules are in the model and stay there.

    Raises:
        ConfigError: weights in whole numbers (quantised) cannot become trained tensors.
    """
    quantised = [name for name, p in model.named_parameters() if not p.is_floating_point()]
    if quantised:
        raise ConfigError(
            f"export: {len(quantised)} tensors are quantised, such as {quantised[0]}; use the checkpoint with the base it was "
            "trained on"
        )
    whole = _whole(model, tree, tuned, folder, final)
    tensors = {name: t.detach().contiguous() for name, t in trained_tensors(model.requires_grad_(True)).items()}
    known = {"step": step, "frozen": fingerprints(model), "sources": identity.sources(tree)}
    facts = json.dumps(known, sort_keys=True)
    save_file(tensors, folder / "model.safetensors", metadata={META: facts})
    (folder / "config.yaml").write_text(yaml.safe_dump(whole, sort_keys=False, allow_unicode=True), encoding="utf-8")
    with (folder / "trainer.pt").open("wb") as file:
        torch.save({"step": step}, file)
    (folder / "README.md").write_text(_readme(whole, len(tensors), step) + origins(tree), encoding="utf-8")
    (folder / "manifest.json").write_text(json.dumps(_manifest(folder), indent=1), encoding="utf-8")
    for path in folder.iterdir():
        if path.is_file():
            files.flush(path)


def _manifest(folder: Path) -> dict[str, Any]:
    """Size and SHA-256 of every file, as in any checkpoint; the tokenizer's folder is not among them."""
    result = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            result[path.name] = {
                "bytes": path.stat().st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
    return result


def _whole(model: MultimodalModel, tree: Tree, tuned: bool, folder: Path, final: Path) -> dict[str, Any]:
    """The tree of the exported model."""
    whole: dict[str, Any] = {**tree, "tuning": _tuning(tree["tuning"], tuned), "resume": None, "init_from": None}
    tokenizer: Any = model.backbone.tokenizer
    takes_one = "tokenizer" in schema_of(type(model.backbone)).params
    copied = takes_one and bool(tokenizer.name_or_path)  # one made in code has no source
    if copied:
        tokenizer.save_pretrained(folder / "tokenizer")
        whole["backbone"] = {**tree["backbone"], "tokenizer": str(folder / "tokenizer")}
    for part, kind in (*((name, Encoder) for name in MODALITIES), ("backbone", Backbone)):
        if tree.get(part) and tree[part].get("pretrained"):
            whole[part] = _without_source(model.parts()[part], whole[part], kind)
    if copied:
        whole["backbone"]["tokenizer"] = str(final / "tokenizer")
    return whole


def _without_source(part: nn.Module, node: dict[str, Any], kind: type) -> dict[str, Any]:
    """The node without ``pretrained``, if it still gives the same part with other weights; else the node itself."""
    candidates = [{**node, "pretrained": None}]
    config = getattr(getattr(part, "model", None), "config", None)
    if (
        {"architecture", "sizes"} <= {*schema_of(type(part)).params}
        and config is not None
        and not node.get("architecture")
    ):
        plain = json.loads(json.dumps(config.to_diff_dict(), default=str))
        sizes = {key: value for key, value in plain.items() if _stable(key) and key != "model_type"}
        candidates.append({**node, "pretrained": None, "architecture": config.model_type, "sizes": sizes})
    for candidate in candidates:
        try:
            with torch.device("meta"):
                other: Any = build(kind, candidate)
        except ConfigError:
            continue
        if _alike(part, other):
            return candidate
    return node


def _alike(part: Any, other: Any) -> bool:
    """Whether two parts differ in the values of their weights only: tensors, config, and what becomes of a medium."""
    wrapped = ".base_layer"  # peft keeps an adapted layer under this name
    shapes = [{name.replace(wrapped, ""): t.shape for name, t in state_tensors(one).items()} for one in (other, part)]
    if not shapes[0].items() <= shapes[1].items():
        return False
    configs = [getattr(getattr(one, "model", None), "config", None) for one in (part, other)]
    facts = [{k: v for k, v in c.to_dict().items() if _stable(k)} for c in configs if c is not None]
    if len(facts) == 2 and facts[0] != facts[1]:
        return False
    if not isinstance(part, Encoder):
        return True
    with torch.device("cpu"):
        items = [one.transform(BLANK[part.modality]()) for one in (part, other)]
    return bool(torch.equal(items[0], items[1]))


def _stable(key: str) -> bool:
    return key not in VOLATILE and not key.endswith("_token_id")


def _tuning(tuning: Mapping[str, Any], tuned: bool) -> dict[str, Any]:
    """The strategies, if they stay, and ``full`` behind them."""
    made = {}
    for part in TUNED:
        nodes = tuning.get(part) or []
        nodes = nodes if isinstance(nodes, list) else [nodes]
        if nodes or part != "audio_projector":
            made[part] = [*(nodes if tuned else []), {"name": "full"}]
    return made


def _readme(tree: Mapping[str, Any], count: int, step: int) -> str:
    nodes = {part: tree[part] for part in ("vision", "audio", "projector", "backbone") if tree.get(part)}
    parts = "\n".join(f"- {part}: `{node['name']}`" for part, node in nodes.items())
    needed = "\n".join(f"- {part}: `{node['pretrained']}`" for part, node in nodes.items() if node.get("pretrained"))
    return (
        f"# {tree['name']}, step {step}, exported\n\n"
        f"A multimodal language model made with mllm-factory.\n\n{parts}\n\n"
        f"`model.safetensors` holds all {count} tensors of the model. "
        + (f"For their architecture these sources are still read:\n\n{needed}\n\n" if needed else "")
        + "The path in `backbone.tokenizer` of `config.yaml`, if it is one, has to follow a moved folder.\n\n"
        "```bash\nmllm-factory evaluate checkpoint=<this folder>\n```\n"
    )


def origins(tree: Tree) -> str:
    """The part of an export's README that says where the weights began, with their licences; empty without such sources."""
    lines = [f"- {identity.shown(key, facts)}" for key, facts in identity.sources(tree).items()]
    return "\n".join(["\nTrained from\n", *lines, ""]) if lines else ""
