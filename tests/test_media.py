"""Decoding of pictures and recordings: odd kinds work, damaged ones are refused by name."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image, ImageFile

from mllm_factory.errors import DataError
from mllm_factory.media import BLANK, LOADERS, load_audio, load_image


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixel(raw: object, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    image = load_image(raw)
    assert image.mode == "RGB"
    return image.getpixel(at)


def near(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= 3


RED = Image.new("RGB", (8, 6), (200, 30, 40))


def test_path_bytes_and_picture_are_the_same(tmp_path: Path) -> None:
    RED.save(tmp_path / "a.png")
    for raw in (tmp_path / "a.png", str(tmp_path / "a.png"), encoded(RED), RED):
        assert load_image(raw).tobytes() == RED.tobytes()


def test_colour_kinds() -> None:
    palette = RED.quantize(4)
    assert near(pixel(encoded(palette)), (200, 30, 40))
    assert near(pixel(encoded(palette, "GIF")), (200, 30, 40))
    assert pixel(encoded(Image.new("L", (4, 4), 77))) == (77, 77, 77)
    assert pixel(encoded(Image.new("1", (4, 4), 1))) == (255, 255, 255)
    assert near(pixel(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")), (254, 0, 0))
    assert near(pixel(Image.new("CMYK", (8, 8), (0, 255, 255, 0))), (255, 0, 0))


def test_transparent_parts_lie_over_white() -> None:
    assert pixel(encoded(Image.new("RGBA", (4, 4), (10, 20, 30, 255)))) == (10, 20, 30)
    assert pixel(encoded(Image.new("RGBA", (4, 4), (10, 20, 30, 0)))) == (255, 255, 255)
    half = round(0.5 * 10 + 0.5 * 255)
    assert near(pixel(encoded(Image.new("LA", (4, 4), (10, 128)))), (half, half, half))
    palette = RED.quantize(2)
    assert pixel(encoded(palette, transparency=palette.getpixel((0, 0)))) == (255, 255, 255)


def test_sixteen_bits_keep_their_order() -> None:
    ramp = np.array([[0, 256, 32768, 65535]], np.uint16)
    image = load_image(encoded(Image.fromarray(ramp)))
    assert [image.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]
    assert pixel(Image.fromarray(ramp.astype(np.int32)), (2, 0)) == (128, 128, 128)


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (16, 8), (255, 255, 255))
    image.paste((255, 0, 0), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: show it rotated by 90 degrees clockwise
    shown = load_image(encoded(image, "JPEG", exif=exif, quality=95))
    assert shown.size == (8, 16)
    assert near(shown.getpixel((4, 2)), (254, 0, 0))
    assert near(shown.getpixel((4, 13)), (255, 255, 255))


@pytest.mark.parametrize("size", [(1, 1), (20000, 2), (2, 20000)])
def test_extreme_sizes(size: tuple[int, int]) -> None:
    assert load_image(encoded(Image.new("RGB", size, (1, 2, 3)))).size == size


def test_truncated_pictures_are_refused(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        data = encoded(noise, kind)
        for share in (0.05, 0.5, 0.9):
            file = tmp_path / f"cut.{kind.lower()}"
            file.write_bytes(data[: int(len(data) * share)])
            with pytest.raises(DataError, match=rf"cut\.{kind.lower()}: .*(cannot be decoded|not a picture)"):
                load_image(file)
    with pytest.raises(DataError, match="a decoded picture: the picture cannot be decoded"):
        load_image(Image.open(BytesIO(encoded(noise)[:3000])))  # PIL reads the pixels late
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_unusable_pictures(tmp_path: Path) -> None:
    (tmp_path / "zero.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    for raw, reason in [
        (tmp_path / "none.png", "none.png: no such file"),
        (tmp_path / "zero.png", "zero.png: the file is empty"),
        (tmp_path / "text.png", "text.png: not a picture"),
        (tmp_path, "is a folder"),
        (b"", "has no bytes"),
        (b"nonsense", "a picture of 8 bytes: not a picture"),
        (7, "got int"),
        (Image.new("F", (2, 2), 0.5), "floating-point"),
    ]:
        with pytest.raises(DataError, match=reason) as caught:
            load_image(raw)
        assert "\n" not in str(caught.value)


def test_a_decompression_bomb_is_an_error_not_a_warning() -> None:
    def chunk(tag: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    for side in (12000, 30000):  # PIL warns about the first and refuses the second
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        with pytest.raises(DataError, match=r"more than \d+ pixels"):
            load_image(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


# ---------------------------------------------------------------- recordings


def test_recordings(tmp_path: Path) -> None:
    time = np.arange(800) / 8000
    stereo = np.stack([np.sin(440 * time), np.cos(220 * time)], 1).astype(np.float32) * 0.5
    for file in ("a.wav", "a.flac"):
        soundfile.write(tmp_path / file, stereo, 8000)
        for raw in (tmp_path / file, str(tmp_path / file), (tmp_path / file).read_bytes()):
            wave, rate = load_audio(raw)
            assert rate == 8000
            assert wave.dtype == torch.float32
            torch.testing.assert_close(wave, torch.from_numpy(stereo.T), atol=1e-4, rtol=0)


def test_decoded_recordings() -> None:
    wave, rate = load_audio((torch.ones(5, dtype=torch.float64), 16000))
    assert (wave.shape, wave.dtype, rate) == ((1, 5), torch.float32, 16000)
    assert load_audio((np.zeros((2, 5), np.float32), 8000))[0].shape == (2, 5)


def test_unusable_recordings(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "empty.wav", np.zeros((0, 1), np.float32), 8000)
    (tmp_path / "zero.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("not a recording")
    for raw, reason in [
        (tmp_path / "none.wav", "no such file"),
        (tmp_path / "zero.wav", "the file is empty"),
        (tmp_path / "text.wav", "text.wav: the recording cannot be decoded"),
        (tmp_path / "empty.wav", "has no samples"),
        (tmp_path, "is a folder"),
        ((torch.zeros(4), 0), "pair"),
        ((torch.zeros(4, dtype=torch.int16), 8000), "floating-point array"),
        ((torch.zeros(1, 2, 3), 8000), "floating-point array"),
        (3.5, "got float"),
    ]:
        with pytest.raises(DataError, match=reason) as caught:
            load_audio(raw)
        assert "\n" not in str(caught.value)


def test_blanks_are_what_the_loaders_take() -> None:
    assert load_image(BLANK["vision"]()).mode == "RGB"
    assert load_audio(BLANK["audio"]())[0].abs().sum() == 0
    assert LOADERS.keys() == BLANK.keys()
