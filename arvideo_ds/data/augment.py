"""Augmentation for fine-tuning, by timm and torchvision; equal for all frames of a clip.

Those libraries draw from global generators; `seeded` makes their draws a function of a number.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from arvideo_ds.config.schema import DataSettings
from arvideo_ds.errors import UserError
from arvideo_ds.models.cubes import PIXEL_MEAN, PIXEL_STD

# RandAugment's largest shift as a share of the shorter side (timm's default).
_SHIFT = 0.45
_COLOUR = 255


@contextmanager
def seeded(number: int) -> Iterator[None]:
    """Within, Python's, NumPy's and torch's CPU generators are seeded by `number` (63 bits)."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


class Augment:
    """Colour jitter, RandAugment and random erasing of a clip: `data.hsv_jitter`,
    `data.randaugment`, `data.erase`.

    RandAugment works on the cropped clip, which has fewer pixels; VideoMAE's code augments the
    whole frame. Errors: `UserError` for a configuration that timm does not know.
    """

    def __init__(self, data: DataSettings) -> None:
        self._hsv_jitter = data.hsv_jitter
        self._randaugment = None if data.randaugment is None else _randaugment(data)
        # On a canvas of zeros, since it must not see that pixels are bytes.
        self._erase = v2.RandomErasing(data.erase, value="random") if data.erase else None

    def __call__(self, clip: Tensor, number: int) -> Tensor:
        """Clip F h w 3 (uint8) -> the same, augmented; `number` decides all draws."""
        if self._hsv_jitter is not None:
            clip = jitter_hsv(clip, self._hsv_jitter, np.random.default_rng(number))
        if self._randaugment is not None:
            images = []
            for frame in clip:
                with seeded(number):  # the same draws for every frame
                    images.append(np.array(self._randaugment(Image.fromarray(frame.numpy()))))
            clip = torch.from_numpy(np.stack(images))
        return clip if self._erase is None else _erased(clip, self._erase, number)


def _erased(clip: Tensor, erase: v2.Transform, number: int) -> Tensor:
    """A box of every frame becomes noise with ImageNet's mean and deviation."""
    frames, height, width, _ = clip.shape
    with seeded(number):
        noise = erase(torch.zeros(3 * frames, height, width))
    noise = noise.unflatten(0, (frames, 3)).permute(0, 2, 3, 1)
    pixels = noise * torch.tensor(PIXEL_STD) + torch.tensor(PIXEL_MEAN)
    erased = (_COLOUR * pixels).round().clamp(0, _COLOUR).to(torch.uint8)
    return torch.where(noise == 0, clip, erased)


def jitter_hsv(
    clip: Tensor, largest: tuple[float, float, float], generator: np.random.Generator
) -> Tensor:
    """Clip F h w 3 (uint8) with hue, saturation and value shifted equally in all pixels.

    largest: shifts in degrees and in shares of 1; each shift is uniform over the steps (1/256 of
    the circle, 1/255) within it. Hue wraps round, the others are clipped. Source: AlphAction's
    ColorJitter, as in VideoMAE's action detection.
    """
    most = np.round(np.array(largest) * (256 / 360, 255, 255)).astype(int)
    hue, saturation, value = generator.integers(-most, most + 1)
    # All frames as one picture.
    picture = Image.fromarray(clip.reshape(-1, *clip.shape[2:]).numpy()).convert("HSV")
    channels = np.array(picture).astype(np.int16)
    channels[..., 0] = (channels[..., 0] + hue) % 256
    channels[..., 1:] = (channels[..., 1:] + (saturation, value)).clip(0, 255)
    shifted = Image.frombytes("HSV", picture.size, channels.astype(np.uint8).tobytes())
    return torch.from_numpy(np.array(shifted.convert("RGB"))).reshape(clip.shape)


def _randaugment(data: DataSettings) -> Callable[[Image.Image], Image.Image]:
    # Here, since it imports all of timm's models, which decoding processes do not need.
    from timm.data.auto_augment import rand_augment_transform

    mean = tuple(round(_COLOUR * value) for value in PIXEL_MEAN)
    options = {"translate_const": int(_SHIFT * min(data.size)), "img_mean": mean}
    try:
        return rand_augment_transform(data.randaugment, options)
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(
            f"data.randaugment={data.randaugment!r} is not valid for timm's RandAugment "
            f"({type(error).__name__}: {error}). An example: rand-m7-n4-mstd0.5-inc1."
        ) from None
