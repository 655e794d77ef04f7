"""Raw media to what encoders take: pictures to PIL images in RGB, recordings to float waveforms.

Whatever cannot be decoded in full is an error that names the file and the reason; nothing is repaired or replaced silently.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mllm_factory.errors import DataError, one_line

Waveform = tuple[Tensor, int]
"""A recording: float32 [channels, time] and its sample rate in Hz."""

MAX_SAMPLES = 2**29
"""Samples of all channels that a recording may have: 2 GiB once decoded, 9 hours of one channel at 16 kHz."""

_DECLARED = re.compile(r"(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)")
_UNKNOWN_SIZE = 0x7FFFF000  # larger counts of bytes stand in files that were written to a pipe
_OGG_PAGE = 65307  # bytes of the longest Ogg page


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
        raise DataError(f"{name}: the picture cannot be decoded ({one_line(error)}); replace or remove it") from error


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
        raw: a path, encoded bytes (whatever soundfile reads: wav, flac, ogg, mp3), or a ``(waveform, rate)`` pair with a
            floating-point [time] or [channels, time] array.

    Raises:
        DataError: missing, empty, damaged, truncated, no recording, over MAX_SAMPLES, not finite, or a pair of another
            form.
    """
    if isinstance(raw, tuple | list):
        return _pair(raw)
    import soundfile

    try:
        with soundfile.SoundFile(_stream(raw)) as file:
            _check_length(file)
            samples, rate = file.read(dtype="float32", always_2d=True), int(file.samplerate)
            _check_whole(file, len(samples), raw)
    except DataError as error:
        raise DataError(f"{_name(raw, 'recording')}: {error}") from error
    except Exception as error:  # soundfile raises several unrelated types
        name = _name(raw, "recording")
        raise DataError(f"{name}: the recording cannot be decoded ({one_line(error)}); replace or remove it") from error
    if not len(samples):
        raise DataError(f"{_name(raw, 'recording')}: the recording has no samples; replace or remove it")
    if not np.isfinite(samples).all():
        raise DataError(f"{_name(raw, 'recording')}: the recording holds NaN or infinite samples; replace or remove it")
    return torch.from_numpy(np.ascontiguousarray(samples.T)), rate


def _check_length(file: Any) -> None:
    """Refuse what would not fit into memory, before it is decoded."""
    samples = file.frames * file.channels
    if samples > MAX_SAMPLES:
        raise DataError(
            f"{samples} samples in {file.channels} channel(s) are more than {MAX_SAMPLES}; split it, or store it with fewer "
            "channels or a lower rate"
        )


def _check_whole(file: Any, read: int, raw: Any) -> None:
    """Refuse a recording whose end is missing; the decoders would give the rest without a word."""
    chunk = _DECLARED.search(file.extra_info)
    lacking = int(chunk[1]) - int(chunk[2]) > 8 if chunk and int(chunk[1]) < _UNKNOWN_SIZE else False
    lacking = lacking or file.frames - read > file.samplerate // 10  # mp3: its header counts frames, near enough
    if lacking or (file.format == "OGG" and not _ogg_ends(raw)):
        raise DataError(
            f"the recording is cut off, only {read / file.samplerate:.2f} s are there; replace or remove it"
        )


def _ogg_ends(raw: str | Path | bytes) -> bool:
    """Whether the last page of an Ogg stream is marked as its end, and whole (RFC 3533, section 6)."""
    if isinstance(raw, bytes):
        tail = raw[-_OGG_PAGE:]
    else:
        with Path(raw).open("rb") as stream:
            stream.seek(-min(_OGG_PAGE, Path(raw).stat().st_size), 2)
            tail = stream.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    if len(page) < 27 or not page[5] & 4:
        return False
    segments = page[27 : 27 + page[26]]
    return len(page) >= 27 + page[26] + sum(segments)


def _pair(raw: Any) -> Waveform:
    if len(raw) != 2 or not isinstance(raw[1], int) or raw[1] <= 0:
        raise DataError("a decoded recording is a (waveform, sample rate in Hz) pair")
    wave = torch.as_tensor(raw[0])
    if not wave.is_floating_point() or wave.ndim not in (1, 2) or not wave.numel():
        raise DataError(
            f"a waveform is a floating-point array [time] or [channels, time], got {wave.dtype} {list(wave.shape)}"
        )
    wave = wave.float().reshape(-1, wave.shape[-1])
    if not wave.isfinite().all():
        raise DataError("a decoded recording holds NaN or infinite samples; replace or remove it")
    return wave, raw[1]


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
