"""Predicted labels of any video file, from its central clip."""

from __future__ import annotations

import io
from pathlib import Path

import av
import torch
from torch import Tensor

from arvideo_ds.config.schema import DataSettings
from arvideo_ds.data.sampling import view_frames
from arvideo_ds.data.transforms import cut, view_crop
from arvideo_ds.decoding.decoders import (
    DecodeError,
    choose_decoder,
    count_frames,
    decode,
    read_frame_rate,
)
from arvideo_ds.decoding.video import RejectedError, TranscodeSettings, open_video, transcode
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.scores import best_combinations
from arvideo_ds.models.classifier import Classifier
from arvideo_ds.shards.manifest import ClassNames, by_set


def central_clip(path: Path, data: DataSettings) -> Tensor:
    """The clip T H W 3, uint8, of a test with one view.

    Errors: `UserError` for a file that is missing or does not decode.
    """
    decoder = choose_decoder(data.decoder)
    try:
        video = _upright(path.read_bytes())
        num_frames = count_frames(decoder, video)
        stride = data.stride_at(read_frame_rate(video))
        indices = view_frames(num_frames, data.frames, stride, data.sampling)
        frames = decode(decoder, video, indices)
    except OSError as error:  # PyAV's too
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from None
    except (DecodeError, RejectedError, av.FFmpegError, StopIteration, IndexError) as error:
        # PyAV's last argument is the file's name, which is empty for bytes.
        why = getattr(error, "strerror", None) or " ".join(map(str, error.args[-1:]))
        why = why or "it has no frame"
        raise UserError(f"{path} does not decode as a video ({why}).") from None
    crop = view_crop(frames.shape[1], frames.shape[2], data.size, short_side=data.test_short_side)
    return cut(frames, crop, data.size, flip=False)


@torch.no_grad()
def top_labels(
    model: Classifier, labels: ClassNames, clip: Tensor, count: int
) -> list[tuple[str, float]]:
    """The most probable labels of a clip T H W 3 with their probabilities, best first.

    With several label sets: combinations, such as "put cup" of a verb and a noun, with the product
    of their probabilities.
    """
    device = next(model.parameters()).device
    sets = list(by_set(labels).values())
    logits = model(clip[None].to(device)).float().split([len(names) for names in sets], dim=1)
    scores, classes = best_combinations([of_set.softmax(1) for of_set in logits], count)
    return [
        (" ".join(names[i] for names, i in zip(sets, combination, strict=True)), score)
        for combination, score in zip(classes[0].tolist(), scores[0].tolist(), strict=True)
    ]


def _upright(video: bytes) -> bytes:
    """The video rotated and with square pixels, as in shards; most are already."""
    with open_video(io.BytesIO(video)) as container:
        stream = container.streams.video[0]
        frame = next(container.decode(stream))
        if not frame.rotation and stream.sample_aspect_ratio in (None, 0, 1):
            return video
    return transcode(io.BytesIO(video), TranscodeSettings(short_side=0))[0]
