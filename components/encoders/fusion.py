"""Several encoders of one modality as one: interleaved (mixture of features, arXiv 2401.06209), side by side, or in a row."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import isqrt, prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm_factory import DataError, Encoder, register


@register("fusion")
class Fusion(Encoder):
    """Every encoder sees the whole item; their tokens become one sequence. Has no weight besides the encoders'.

    With encoders e = 0..E-1 and token t of e written x_e[t]:

    - ``interleave``: x_0[0], x_1[0], ..., x_0[1], x_1[1], ...: E k tokens. The projector ``mof_mlp`` gives each its own adapter.
    - ``channel``: k tokens, token t is concat(x_0[t], ..., x_{E-1}[t]): the widths add up.
    - ``sequence``: all of x_0, then all of x_1, ...: the token counts add up.

    Where the first two need equal counts k, the others are resized to the first's: pictures as square grids, bilinearly;
    recordings along time, linearly. Where tokens of different widths share a sequence, the narrower end in zeros: a projector's
    weights never see them, and a frozen fusion holds nothing random.

    One item is one vector: the encoders' items, flattened, one behind the other.

    Args:
        encoders: the encoders by a name of your choice; their order is the order of the tokens.
        mode: ``interleave``, ``channel`` or ``sequence``.
        resize: bring unequal token counts to the first's; False: they are an error. ``sequence`` needs neither.

    Raises:
        ValueError: fewer than two encoders, a name that cannot be used, different modalities, token counts that cannot be
            brought to one, or transforms that make different numbers of items.
    """

    def __init__(
        self,
        encoders: dict[str, Encoder],
        mode: Literal["interleave", "channel", "sequence"] = "interleave",
        resize: bool = True,
    ) -> None:
        super().__init__()
        _require_family(encoders)
        self.mode = mode
        self.modality = next(iter(encoders.values())).modality
        self.transform = Packed({name: encoder.transform for name, encoder in encoders.items()})
        self.shapes = self.transform.shapes(_sample(self.modality))
        self.encoders = nn.ModuleDict(encoders)
        counts = {name: encoder.num_tokens for name, encoder in encoders.items()}
        if mode != "sequence":
            _require_one_count(counts, self.modality, resize)
        widths, first = [encoder.dim for encoder in encoders.values()], next(iter(counts.values()))
        self.dim = sum(widths) if mode == "channel" else max(widths)
        self.count = None if mode == "sequence" else first
        self.num_tokens = {"interleave": len(counts) * first, "channel": first, "sequence": sum(counts.values())}[mode]

    def forward(self, items: Tensor) -> Tensor:
        """[n, total item size] -> [n, num_tokens, dim]"""
        packed = items.split([prod(shape) for shape in self.shapes], dim=1)
        features = [
            encoder(part.unflatten(1, shape).contiguous())
            for encoder, part, shape in zip(self.encoders.values(), packed, self.shapes, strict=True)
        ]
        if self.count is not None:
            features = [resized(x, self.count, self.modality) for x in features]
        if self.mode == "channel":
            return torch.cat(features, dim=2)
        features = [F.pad(x, (0, self.dim - x.shape[2])) for x in features]
        if self.mode == "sequence":
            return torch.cat(features, dim=1)
        return torch.stack(features, dim=2).flatten(1, 2)


class Packed:
    """A raw item through every encoder's transform, as flat vectors one behind the other.

    Args:
        transforms: of the encoders, by name.
    """

    def __init__(self, transforms: Mapping[str, Callable[[Any], Tensor]]) -> None:
        self.transforms = dict(transforms)

    def __call__(self, raw: Any) -> Tensor:
        """One raw item -> [m, total item size]

        Raises:
            DataError: the transforms make different numbers of items of it.
        """
        parts = {name: transform(raw).flatten(1) for name, transform in self.transforms.items()}
        counts = {name: len(part) for name, part in parts.items()}
        if len(set(counts.values())) > 1:
            raise DataError(_different("items of one picture or recording", counts) + "; give them one layout")
        return torch.cat(list(parts.values()), dim=1)

    def shapes(self, raw: Any) -> list[tuple[int, ...]]:
        """The item shape of each encoder, found with a raw item.

        Raises:
            ValueError: the transforms do not make one kind of number.
        """
        with torch.no_grad(), torch.device("cpu"):
            self(raw)
            items = {name: transform(raw) for name, transform in self.transforms.items()}
        types = {name: item.dtype for name, item in items.items()}
        if len(set(types.values())) > 1:
            raise ValueError(f"encoders: {_different('items of a type', types)}; let every transform give float32")
        return [tuple(item.shape[1:]) for item in items.values()]


def resized(features: Tensor, count: int, modality: str) -> Tensor:
    """[n, t, d] -> [n, count, d]: as a square grid, bilinearly (vision), or along time, linearly (audio)."""
    t = features.shape[1]
    if t == count:
        return features
    maps = features.transpose(1, 2)  # [n, d, t]
    if modality == "vision":
        grid = maps.unflatten(2, (isqrt(t), isqrt(t)))
        maps = F.interpolate(grid, (isqrt(count), isqrt(count)), mode="bilinear", align_corners=False).flatten(2)
    else:
        maps = F.interpolate(maps, count, mode="linear", align_corners=False)
    return maps.transpose(1, 2)


def _sample(modality: str) -> Any:
    """A raw item that is not blank and not square."""
    if modality == "vision":
        from PIL import Image

        return Image.radial_gradient("L").resize((96, 64)).convert("RGB")
    return torch.linspace(-0.5, 0.5, 16000)[None], 16000


def _require_family(encoders: Mapping[str, Encoder]) -> None:
    for name in encoders:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*", name) or hasattr(nn.ModuleDict, name):
            raise ValueError(f"encoders: '{name}' cannot name an encoder; take another word of letters, digits and _")
    if len(encoders) < 2:
        raise ValueError(
            f"encoders: {len(encoders)} given, but a fusion needs two or more; use a single one as the part itself"
        )
    modalities = {name: encoder.modality for name, encoder in encoders.items()}
    if len(set(modalities.values())) > 1:
        raise ValueError(f"encoders: {_different('modalities', modalities)}; a fusion is of one")


def _require_one_count(counts: Mapping[str, int], modality: str, resize: bool) -> None:
    """The counts are equal, or can be made so."""
    first, *_ = counts.values()
    if set(counts.values()) == {first}:
        return
    if not resize:
        raise ValueError(f"resize: {_different('token counts', counts)}; set resize: true or mode: sequence")
    for name, count in counts.items():
        if modality == "vision" and isqrt(count) ** 2 != count:
            raise ValueError(
                f"encoders: the {count} tokens of {name} are no square grid, so the counts ({_listed(counts)}) cannot be made "
                "equal; set its class and register tokens off (prefix_tokens: false, select: patch), or mode: sequence"
            )


def _different(what: str, values: Mapping[str, Any]) -> str:
    return f"the encoders have different {what} ({_listed(values)})"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in values.items())
