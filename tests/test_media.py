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

from mllm_factory import media
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


def sound(kind: str, subtype: str | None = None, seconds: float = 2.0, rate: int = 16000) -> bytes:
    """A stereo recording of noise in a format of soundfile."""
    noise = 0.2 * np.random.default_rng(0).standard_normal((round(rate * seconds), 2))
    stream = BytesIO()
    soundfile.write(stream, noise.astype(np.float32), rate, format=kind, subtype=subtype)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("kind", "subtype"), [("WAV", "FLOAT"), ("FLAC", None), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)]
)
def test_formats_of_recordings(kind: str, subtype: str | None, tmp_path: Path) -> None:
    whole = sound(kind, subtype)
    file = tmp_path / f"a.{kind.lower()}"
    file.write_bytes(whole)
    noise = 0.2 * np.random.default_rng(0).standard_normal((32000, 2)).astype(np.float32)
    for raw in (whole, file):
        wave, rate = load_audio(raw)
        assert wave.shape == (2, 32000) and rate == 16000 and wave.dtype == torch.float32
        power = float(wave.square().mean())
        assert 0.3 < power / float(np.square(noise).mean()) < 1.5  # mp3 and ogg lose the high frequencies of noise
    torch.testing.assert_close(load_audio(sound("WAV", "FLOAT"))[0], torch.from_numpy(noise.T.copy()))


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [
        ("WAV", "PCM_16"),
        ("AIFF", "PCM_16"),
        ("AU", "PCM_16"),
        ("FLAC", None),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", None),
    ],
)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_recordings_are_refused(kind: str, subtype: str | None, share: float, tmp_path: Path) -> None:
    whole = sound(kind, subtype)
    file = tmp_path / f"cut.{kind.lower()}"
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match=rf"cut\.{kind.lower()}: .*(is cut off, only|cannot be decoded)"):
        load_audio(file)


def test_a_wav_from_a_pipe_says_no_length_and_is_whole() -> None:
    data = bytearray(sound("WAV", "PCM_16"))
    for place in (4, data.find(b"data") + 4):
        data[place : place + 4] = b"\xff\xff\xff\xff"
    assert load_audio(bytes(data))[0].shape == (2, 32000)


def test_samples_that_are_no_numbers(tmp_path: Path) -> None:
    for bad in (np.nan, np.inf):
        wave = np.zeros(100, np.float32)
        wave[7] = bad
        soundfile.write(tmp_path / "bad.wav", wave, 8000, subtype="FLOAT")
        with pytest.raises(DataError, match=r"bad\.wav: the recording holds NaN or infinite samples"):
            load_audio(tmp_path / "bad.wav")
        with pytest.raises(DataError, match="NaN or infinite"):
            load_audio((torch.from_numpy(wave), 8000))


def test_rates_and_channels(tmp_path: Path) -> None:
    for rate, channels in ((8000, 1), (96000, 8), (44100, 2)):
        soundfile.write(tmp_path / "a.wav", np.zeros((1, channels), np.float32), rate)  # one sample
        wave, found = load_audio(tmp_path / "a.wav")
        assert (wave.shape, found) == ((channels, 1), rate)


def test_a_recording_that_would_fill_the_memory_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soundfile.write(tmp_path / "long.wav", np.zeros((1000, 8), np.float32), 96000)
    assert load_audio(tmp_path / "long.wav")[0].shape == (8, 1000)
    monkeypatch.setattr(media, "MAX_SAMPLES", 7999)
    with pytest.raises(DataError, match=r"long\.wav: 8000 samples in 8 channel\(s\) are more than 7999; split it"):
        load_audio(tmp_path / "long.wav")


def test_blanks_are_what_the_loaders_take() -> None:
    assert load_image(BLANK["vision"]()).mode == "RGB"
    assert load_audio(BLANK["audio"]())[0].abs().sum() == 0
    assert LOADERS.keys() == BLANK.keys()
