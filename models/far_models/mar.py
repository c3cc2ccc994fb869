"""MAR: FAR's network without the frequency level (official models/mar.py of LTH14/mar)."""

from __future__ import annotations

from far_models.far import FAR, FARConfig

PRESETS: dict[str, FARConfig] = {
    "mar_base": FARConfig(masked=True),
    "mar_large": FARConfig(
        encoder_width=1024, encoder_depth=16, encoder_heads=16, decoder_width=1024, decoder_depth=16, decoder_heads=16,
        head_depth=8, head_width=1280, masked=True,
    ),
    "mar_huge": FARConfig(
        encoder_width=1280, encoder_depth=20, encoder_heads=16, decoder_width=1280, decoder_depth=20, decoder_heads=16,
        head_depth=12, head_width=1536, masked=True,
    ),
}  # fmt: skip


class MAR(FAR):
    """FAR's masked network with a head without level; the encoder always sees the visible tokens alone."""

    def __init__(self, config: FARConfig, dropout: float = 0.0) -> None:
        super().__init__(config, dropout, levels=False)
