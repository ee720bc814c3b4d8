"""VideoMAE on one page: encode a few tubes of the clip, reconstruct the rest.

    draw       a few places of the picture, visible at all times (tube masking)
    encode     the visible tokens, full attention
    decode     them and a mask token for each hidden one, full attention; in VideoMAE V2 only for
               the hidden tokens that a running cell picks
    loss       squared error on the normalised pixels of these hidden tokens (objective.py)

Source: VideoMAE (arXiv 2203.12602), VideoMAE V2 (arXiv 2303.16727); docs/method.md, Relatives.

B clips, N tokens.
"""

from __future__ import annotations

from torch import Tensor

from arvideo_ds.config.objectives import DecoderSettings, LvmaeSettings, VideomaeSettings
from arvideo_ds.config.sizes import EncoderSpec
from arvideo_ds.models.decoder import JointDecoder
from arvideo_ds.models.objective import Draw, Objective
from arvideo_ds.models.selection import running_cell, tokens_of, tube


class VideoMAE(Objective):
    """Encoder, decoder and loss of VideoMAE and V2."""

    def __init__(
        self,
        settings: VideomaeSettings | LvmaeSettings,
        encoder: EncoderSpec,
        decoder: DecoderSettings,
    ) -> None:
        super().__init__(settings, encoder)
        geometry = encoder.geometry
        self.grid = geometry.grid
        self.counts = settings.counts(geometry, decoder)
        self.visible_places = settings.visible_places(geometry)
        self.decoder_mask = settings.decoder_mask
        shape = settings.decoder_shape(encoder.size, decoder)
        if not self.aligned:
            self.decoder = JointDecoder(encoder, shape, settings.target_values(geometry))

    def draw(self, keys: Tensor, scores: Tensor | None = None) -> Draw:
        seen = tube(keys, self.grid, self.visible_places)
        return Draw(
            encoded=tokens_of(seen, self.counts.encoded),
            targets=tokens_of(self.chosen(~seen, keys, scores), self.counts.predicted),
        )

    def chosen(self, hidden: Tensor, keys: Tensor, scores: Tensor | None) -> Tensor:  # noqa: ARG002
        """The hidden tokens that are reconstructed: B N booleans, as `hidden`."""
        if self.decoder_mask == "running_cell":
            return hidden & running_cell(keys, self.grid)
        return hidden

    def predict(self, cubes: Tensor, draw: Draw) -> Tensor:
        encoded = self.encode(self.encoder, cubes, draw)
        return self.decoder(encoded, draw.encoded, draw.targets)
