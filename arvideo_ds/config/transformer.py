"""What transformer a recipe trains, in the terms that cost and memory are counted in."""

from __future__ import annotations

from dataclasses import dataclass

from arvideo_ds.config.sizes import DecoderShape, Size


@dataclass(frozen=True)
class Transformer:
    """An encoder of a size, by its name in the table of sizes, and what follows it.

    class_attention: one layer of it makes a vector of the encoded tokens, else their mean is taken.
    outputs: numbers that the decoder predicts for each token, else those of the linear head; 0
    where there is none or their number is not known yet. mixes_clips: the clips of a micro-batch
    are mixed in pairs, in fp32.
    """

    size: Size
    name: str
    decoder: DecoderShape | None = None
    class_attention: bool = False
    outputs: int = 0
    mixes_clips: bool = False

    @property
    def masked(self) -> bool:
        """Whether attention is masked by steps."""
        return self.decoder is not None and self.decoder.crosses
