"""Windows of recordings: any rate, channels and length; what cannot be used is refused by name."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
import torchaudio

from mllm_factory import DataError
from mllm_factory.components.encoders import sound
from mllm_factory.components.encoders.sound import Windows


def tone(rate: int, seconds: float, hertz: float = 440.0) -> torch.Tensor:
    time = torch.arange(round(rate * seconds), dtype=torch.float64) / rate
    return torch.sin(2 * math.pi * hertz * time).float()[None]


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
def test_a_tone_of_any_rate_is_the_same_tone(rate: int) -> None:
    items = Windows(16000, 1.0)((tone(rate, 1.0), rate))
    assert items.shape == (1, 16000)
    inner = slice(800, -800)  # the ends know nothing of what would come before and behind
    torch.testing.assert_close(items[0, inner], tone(16000, 1.0)[0, inner], atol=2e-2, rtol=0)


@pytest.mark.parametrize(("rate", "to"), [(44100, 16000), (8000, 16000), (96000, 16000), (22050, 48000), (16000, 8000)])
@pytest.mark.parametrize("time", [1, 7, 4999, 60001])
def test_blocks_are_what_one_pass_gives(rate: int, to: int, time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sound, "BLOCK", 5000)
    wave = torch.randn(time, generator=torch.Generator().manual_seed(0))
    whole = torchaudio.functional.resample(wave, rate, to)
    assert len(whole) == math.ceil(time * to / rate)
    torch.testing.assert_close(sound._resampled(wave, rate, to), whole, atol=1e-5, rtol=0)


def test_channels_are_averaged() -> None:
    channels = torch.stack([torch.full((1600,), float(i)) for i in range(8)])
    assert torch.equal(Windows(16000, 0.1)((channels, 16000)), torch.full((1, 1600), 3.5))


def test_a_longer_recording_is_several_windows_and_the_last_is_filled_with_silence() -> None:
    wave = torch.arange(1.0, 26.0)[None]
    items = Windows(10, 1.0)((wave, 10))
    assert torch.equal(items.flatten()[:25], wave[0])
    assert items.shape == (3, 10)
    assert (items[2, 5:] == 0).all()
    assert [len(chunk) for chunk in Windows(10, 1.0).chunks((wave, 10))] == [10, 10, 5]
    assert Windows(10, 1.0)((wave[:, :20], 10)).shape == (2, 10)  # no window of nothing


def test_zeros_and_a_single_sample() -> None:
    assert (Windows(16000, 1.0)((torch.zeros(2, 500), 44100)) == 0).all()
    one = Windows(16000, 1.0)((torch.ones(1, 1), 48000))
    assert one.shape == (1, 16000)
    assert one.isfinite().all()


def test_too_many_windows_are_refused_and_never_cut() -> None:
    windows = Windows(16000, 30.0, max_windows=2)
    assert windows((torch.zeros(1, 60 * 16000), 16000)).shape == (2, 480000)
    with pytest.raises(DataError, match=r"lasts 60\.1 s, 3 windows of 30 s, but max_windows is 2; split"):
        windows((torch.zeros(1, 60 * 16000 + 1600), 16000))
    with pytest.raises(DataError, match=r"lasts 7200\.0 s, 240 windows of 30 s"):
        windows((torch.zeros(1, 1).expand(1, 7200 * 44100), 44100))  # before any work: this takes no time


def test_two_hours() -> None:
    wave = torch.zeros(1, 7200 * 8000)
    wave[0, -1] = 1.0
    items = Windows(8000, 30.0)((wave, 8000))
    assert items.shape == (240, 240000)
    assert items.sum() == items[-1, -1] == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_samples_that_are_no_numbers(bad: float) -> None:
    wave = torch.zeros(2, 100)
    wave[1, 50] = bad
    with pytest.raises(DataError, match="NaN or infinite"):
        Windows(16000, 1.0)((wave, 16000))


def test_a_rate_without_a_small_ratio() -> None:
    with pytest.raises(DataError, match="16001 Hz .* have no small ratio"):
        Windows(16000, 1.0)((torch.zeros(1, 16001), 16001))
    assert Windows(16000, 1.0)((torch.zeros(1, 44056), 44056)).shape == (1, 16000)  # a real one, of old video


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seconds": 0.0}, "seconds: 0 s"),
        ({"seconds": -1.0}, "seconds: -1 s"),
        ({"seconds": math.inf}, "seconds: inf s"),
        ({"max_windows": 0}, "max_windows: 0"),
        ({"rate": 0}, "rate: 0"),
    ],
)
def test_bad_options(options: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Windows(**{"rate": 16000, "seconds": 1.0, **options})


def test_it_travels() -> None:
    windows = Windows(16000, 0.5)
    recording = torch.randn(2, 30000), 44100
    assert torch.equal(pickle.loads(pickle.dumps(windows))(recording), windows(recording))  # noqa: S301
