"""The two denoisers of a bundle with shallow steps: one that keeps features of its deep levels, and one without them.

Ma et al. 2023 (DeepCache, arXiv:2312.00858): what the deep levels of a UNet put out changes little from one step to the
next, so a step may take it from an earlier step and run the top level alone. The cut is below the top level in the down
path, and before the upsampler that leads back to it in the up path. After the upsampler, the kept tensor would be four
times as large, and a shallow step would save a fiftieth of its arithmetic.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from svd_trt.export.denoiser import Denoiser, block_runner, run_down, run_head, run_up

__all__ = ["KeepingDenoiser", "ShallowDenoiser"]


class KeepingDenoiser(Denoiser):
    """`Denoiser` that also puts out what shallow steps take."""

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        self.upsampler = _take_upsampler(unet)

    def predict(
        self,
        sample: Tensor,
        timestep: Tensor,
        embeds: Tensor,
        added_time_ids: Tensor,
        deep_features: Tensor | None,  # noqa: ARG002  (of the shallow denoiser)
    ) -> tuple[Tensor, ...]:
        """See `Denoiser.predict`."""
        unet = self.unet
        run = block_runner(unet, sample, timestep, embeds, added_time_ids)
        hidden, skips = run_down(unet, run, sample)
        hidden = run(unet.mid_block, hidden)
        *deep, top = unet.up_blocks
        for block in deep:
            hidden, skips = run_up(run, block, hidden, skips)
        features = hidden
        hidden = self.upsampler(hidden, tuple(skips[-1].shape[2:]))
        hidden, _ = run_up(run, top, hidden, skips)
        return run_head(unet, hidden, sample), features


class ShallowDenoiser(Denoiser):
    """A step with the top level of the UNet alone. The features of the other levels are an input."""

    def __init__(self, unet: Any) -> None:
        """Take over ``unet``. Its other levels are removed, so that no rewrite spends time on them."""
        super().__init__(unet)
        self.upsampler = _take_upsampler(unet)
        unet.down_blocks = unet.down_blocks[:1]
        unet.down_blocks[0].downsamplers = None
        unet.mid_block = None
        unet.up_blocks = unet.up_blocks[-1:]

    def predict(
        self,
        sample: Tensor,
        timestep: Tensor,
        embeds: Tensor,
        added_time_ids: Tensor,
        deep_features: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """See `Denoiser.predict`."""
        assert deep_features is not None
        unet = self.unet
        run = block_runner(unet, sample, timestep, embeds, added_time_ids)
        _, skips = run_down(unet, run, sample)
        hidden = self.upsampler(deep_features.flatten(0, 2), tuple(skips[-1].shape[2:]))
        hidden, _ = run_up(run, unet.up_blocks[0], hidden, skips)
        return (run_head(unet, hidden, sample),)


def _take_upsampler(unet: Any) -> Any:
    """Move the upsampler to the top level out of the block before it."""
    block = unet.up_blocks[-2]
    (upsampler,) = block.upsamplers
    block.upsamplers = None
    return upsampler
