"""Raw media to what encoders take: pictures to PIL images in RGB, recordings to float waveforms.

Whatever cannot be decoded in full is an error that names the file and the reason; nothing is repaired or replaced silently.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mllm_factory.errors import DataError

Waveform = tuple[Tensor, int]
"""A recording: float32 [channels, time] and its sample rate in Hz."""


def load_image(raw: Any) -> Image.Image:
    """A picture in RGB, turned upright by its EXIF orientation; transparent parts are laid over white.

    Args:
        raw: a path, encoded bytes, or a PIL image.

    Raises:
        DataError: missing, empty, truncated, no picture, of a kind without a defined range, or over PIL's pixel limit.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # PIL only warns up to twice its limit
            if isinstance(raw, Image.Image):  # it may still be unread
                return _rgb(raw)
            with Image.open(_stream(raw)) as image:
                return _rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{_name(raw, 'picture')}: more than {Image.MAX_IMAGE_PIXELS} pixels; scale it down first"
        ) from error
    except Exception as error:  # PIL's decoders raise whatever a damaged file makes them raise
        name = _name(raw, "picture")
        if isinstance(error, Image.UnidentifiedImageError):
            raise DataError(f"{name}: not a picture that PIL can read; replace or remove it") from error
        if isinstance(error, DataError):
            raise DataError(f"{name}: {error}") from error
        raise DataError(f"{name}: the picture cannot be decoded ({_line(error)}); replace or remove it") from error


def _rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)  # always a copy
    if image.mode == "F":
        raise DataError(
            "pixels are floating-point numbers without a defined range; save the picture with 8 bits a channel"
        )
    if image.mode.startswith("I"):  # 16 bits a pixel; PIL's own conversion would clip them at 255
        image = Image.fromarray((np.asarray(image).astype(np.int32) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def load_audio(raw: Any) -> Waveform:
    """A recording as float32 [channels, time] in [-1, 1], with its sample rate in Hz.

    Args:
        raw: a path, encoded bytes, or a ``(waveform, rate)`` pair with a floating-point [time] or [channels, time] array.

    Raises:
        DataError: missing, empty, damaged, no recording, or a pair of another form.
    """
    if isinstance(raw, tuple | list):
        return _pair(raw)
    import soundfile

    try:
        samples, rate = soundfile.read(_stream(raw), dtype="float32", always_2d=True)
    except Exception as error:  # soundfile raises several unrelated types
        name = _name(raw, "recording")
        raise DataError(f"{name}: the recording cannot be decoded ({_line(error)}); replace or remove it") from error
    if not len(samples):
        raise DataError(f"{_name(raw, 'recording')}: the recording has no samples; replace or remove it")
    return torch.from_numpy(samples.T.copy()), int(rate)


def _pair(raw: Any) -> Waveform:
    if len(raw) != 2 or not isinstance(raw[1], int) or raw[1] <= 0:
        raise DataError("a decoded recording is a (waveform, sample rate in Hz) pair")
    wave = torch.as_tensor(raw[0])
    if not wave.is_floating_point() or wave.ndim not in (1, 2) or not wave.numel():
        raise DataError(
            f"a waveform is a floating-point array [time] or [channels, time], got {wave.dtype} {list(wave.shape)}"
        )
    return wave.float().reshape(-1, wave.shape[-1]), raw[1]


def _name(raw: Any, what: str) -> str:
    """What to call it in messages, once it could not be read; raises where the reason is plain."""
    if isinstance(raw, bytes):
        if not raw:
            raise DataError(f"the {what} has no bytes; replace or remove it")
        return f"a {what} of {len(raw)} bytes"
    if isinstance(raw, Image.Image):
        return str(getattr(raw, "filename", "") or "a decoded picture")
    if not isinstance(raw, str | Path):
        raise DataError(f"a {what} is a path, bytes or a decoded {what}, got {type(raw).__name__}")
    path = Path(raw)
    if not path.exists():
        raise DataError(f"{raw}: no such file; check the path and the folder that it starts from")
    if path.is_dir():
        raise DataError(f"{raw}: is a folder, not a {what}")
    if path.stat().st_size == 0:
        raise DataError(f"{raw}: the file is empty; replace or remove it")
    return str(raw)


def _stream(raw: str | Path | bytes) -> Any:
    return BytesIO(raw) if isinstance(raw, bytes) else str(raw)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def blank_image() -> Image.Image:
    """A small grey picture: tells the shape of an encoder's items where a batch has none."""
    return Image.new("RGB", (64, 64), (128, 128, 128))


def blank_audio() -> Waveform:
    """A second of silence."""
    return torch.zeros(1, 16000), 16000


LOADERS: dict[str, Callable[[Any], Any]] = {"vision": load_image, "audio": load_audio}
"""Per modality, raw item -> what ``Encoder.transform`` takes."""

BLANK: dict[str, Callable[[], Any]] = {"vision": blank_image, "audio": blank_audio}
"""Per modality, an item that carries nothing."""
