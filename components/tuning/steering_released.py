"""Maps saved by the code released with LLaVA Steering and by pyreft: a ``intkey_*.bin`` file for each layer."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from mllm_factory import Backbone, ConfigError, read_weights
from mllm_factory.components.tuning.steering import LowRankMap
from mllm_factory.components.tuning.steering_apply import steerings

_NAME = re.compile(r"intkey_layer\.(\d+)\.comp\.(block_output|block_input)\..*\.bin")
_KEYS = {"weight": "weight", "bias": "bias", "rotate_layer": "base"}
"""Their names for W [r, D], b [r] and R [D, r], and ours."""


def load_intkey(file: Path, change: LowRankMap) -> None:
    """Fill a map from one file; nothing but tensors is unpickled.

    R is made orthonormal again where the map keeps it so, which changes it by the rounding of the file's dtype.

    Raises:
        ConfigError: damaged, or of another form, rank or width.
    """
    saved = read_weights(file)
    shapes = {key: list(value.shape) for key, value in saved.items()}
    ours = dict(change.named_parameters())
    wanted = {key: list(ours[name].shape) for key, name in _KEYS.items() if name in ours}
    if shapes != wanted or len(wanted) != len(ours):
        raise ConfigError(
            f"{file} holds {shapes} but the map needs {wanted}; set the rank and the form it was trained with"
        )
    with torch.no_grad():
        for key, name in _KEYS.items():
            ours[name].copy_(saved[key])


def load_released(folder: Path, backbone: Backbone) -> list[int]:
    """Fill the maps of a backbone's only steering strategy from a folder of such files.

    Returns:
        Numbers of the layers.

    Raises:
        ConfigError: nothing or several things steer the backbone, the files are of other layers or of another placement,
            or one of them does not fit.
    """
    found = steerings(backbone)
    if len(found) != 1:
        raise ConfigError(f"{folder}: the backbone has {len(found)} steering strategies, and the files belong to one")
    steering = found[0][1]
    files = {int(match[1]): file for file in sorted(folder.glob("*.bin")) if (match := _NAME.fullmatch(file.name))}
    if sorted(files) != steering.chosen:
        raise ConfigError(
            f"{folder} has maps of the layers {sorted(files)} but {steering.chosen} are steered; set layers to those"
        )
    placements = {_NAME.fullmatch(file.name)[2] for file in files.values()}  # type: ignore[index]
    if placements != {steering.options.placement}:
        raise ConfigError(f"{folder} has maps for {', '.join(sorted(placements))}; set placement to that")
    if steering.options.share:
        raise ConfigError(f"{folder} has a map for each layer; set share: false")
    for layer, file in files.items():
        load_intkey(file, steering.at(layer))
    return sorted(files)
