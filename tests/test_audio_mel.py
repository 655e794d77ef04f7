"""mel_conv against its formula: spectrogram, convolutions, positions; and its refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank

from mllm_factory import ConfigError, Encoder, build

NODE = {"name": "mel_conv", "rate": 16000, "seconds": 1.0, "mels": 40, "dim": 12, "stride": 7}


def encoder(**options: Any) -> Any:
    torch.manual_seed(0)
    return build(Encoder, {**NODE, **options}).eval()


def by_hand(wave: np.ndarray, frame: int) -> np.ndarray:
    """One frame's log-mel, sample by sample: 400 of 512 samples under a Hann window, centred on frame * 160."""
    padded = np.concatenate([np.zeros(256), wave, np.zeros(256)])
    window = np.zeros(512)
    window[56:456] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    power = np.abs(np.fft.rfft(padded[frame * 160 : frame * 160 + 512] * window)) ** 2
    filters = mel_filter_bank(257, 40, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    return (np.log10(np.maximum(filters.T @ power, 1e-10)) + 4) / 4


def test_the_spectrogram_is_its_formula() -> None:
    wave = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.3
    items = encoder().transform((torch.from_numpy(wave)[None], 16000))
    assert items.shape == (1, 40, 100)
    for frame in (0, 1, 50, 99):
        np.testing.assert_allclose(items[0, :, frame], by_hand(wave, frame), atol=2e-4)


def test_silence_is_a_number_and_level_is_kept() -> None:
    transform = encoder().transform
    assert (transform((torch.zeros(1, 1), 8000)) == -1.5).all()
    wave = torch.randn(1, 16000) * 0.1
    louder = transform((wave * 10, 16000)) - transform((wave, 16000))
    torch.testing.assert_close(louder, torch.full_like(louder, 0.5), atol=1e-3, rtol=0)  # log10(100) / 4


def test_tokens_are_their_formula() -> None:
    part = encoder()
    mel = torch.randn(2, 40, 100)
    h = torch.nn.functional.gelu(torch.nn.functional.conv1d(mel, part.conv1.weight, part.conv1.bias, padding=1))
    h = torch.cat([h, torch.zeros(2, 12, 5)], 2)  # 15 tokens of 7 frames
    assert (part.num_tokens, part.dim) == (15, 12)
    for token in (0, 7, 14):
        z = torch.einsum("nct,dct->nd", h[:, :, 7 * token : 7 * token + 7], part.conv2.weight) + part.conv2.bias
        found = torch.nn.functional.layer_norm(torch.nn.functional.gelu(z), (12,))
        expected = torch.nn.functional.layer_norm(found + part.positions[token], (12,))
        torch.testing.assert_close(part(mel)[:, token], expected, atol=1e-5, rtol=1e-5)


def test_a_recording_of_any_kind_gives_items() -> None:
    part = encoder()
    for wave, rate, items in (
        (torch.randn(8, 96000), 96000, 1),
        (torch.randn(1, 8001), 8000, 2),
        (torch.randn(2, 44100 * 3), 44100, 3),
    ):
        assert part(part.transform((wave, rate))).shape == (items, 15, 12)
    with torch.device("meta"):
        assert encoder().transform((torch.zeros(1, 10, device="cpu"), 16000)).device.type == "cpu"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mels": 400}, "mels: 400 are too many"),
        ({"mels": 0}, "mels: 0 bands"),
        ({"dim": 0}, "dim: 0 is no width"),
        ({"stride": 101}, "stride: 101 is not within the window's 100 frames"),
        ({"stride": 0}, "stride: 0"),
        ({"blocks": -1}, "blocks: -1 are none"),
        ({"seconds": 0.001}, "seconds: 0.001 s hold no frame"),
        ({"rate": -1}, "rate: -1"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        encoder(**options)
    assert "\n" not in str(caught.value)


def test_blocks_reach_two_tokens_further_each() -> None:
    """And a block is z + gelu(conv_5(norm(z))), spelled out at one token."""
    for blocks in (0, 1, 2):
        part = encoder(blocks=blocks)
        items = torch.randn(1, 40, 100, generator=torch.Generator().manual_seed(1))
        changed = items.clone()
        changed[..., 7 * 7 + 3] += 1.0  # within token 7, and no neighbour's convolution over frames
        with torch.no_grad():
            moved = (part(changed) != part(items)).any(2)[0].nonzero()[:, 0].tolist()
        assert moved == list(range(7 - 2 * blocks, 7 + 2 * blocks + 1))
    (block,) = encoder(blocks=1).blocks
    z = torch.randn(1, 9, 12)
    normed = torch.nn.functional.layer_norm(z, (12,))[0]
    summed = sum(block.conv.weight[:, :, i] @ normed[4 + i - 2] for i in range(5)) + block.conv.bias
    torch.testing.assert_close(block(z)[0, 4], z[0, 4] + torch.nn.functional.gelu(summed))
