"""How one network is exported: besides weights and code, all that its graph depends on."""

from __future__ import annotations

import msgspec

from svd_trt.engine.manifest import GraphEntry, Operators, Precision, precision_of
from svd_trt.engine.spec import DEEP_FEATURES, SHALLOW, NetworkName, NetworkSpec

__all__ = ["REWRITTEN", "Recipe", "make_recipe"]

REWRITTEN: tuple[NetworkName, ...] = ("denoiser", SHALLOW, "vae_decoder")
"""Networks that `svd_trt.export.rewrites` apply to; the encoders run once a video and have none of their layers."""


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """The exporter gets nothing else, so that equal recipes for equal weights give equal graphs.

    What a network ignores has the same value in all its recipes: a bundle in fp16 and one in fp32 share the VAE's
    encoder, and different ranges of frames share all graphs.
    """

    spec: NetworkSpec
    """Without its ranges: a symbolic axis takes every size."""
    precision: Precision
    """That this network computes in."""
    rewrites: bool
    ff_chunks: int
    operators: Operators
    doubling: bool
    """Each level of the denoiser is exactly half as large as the one above, at all sizes it will run at."""
    fp32_statistics: bool
    smallest_latent: int
    """Least height and width of symbolic latents, or of kept features; 2 if they are not symbolic."""

    @property
    def network(self) -> NetworkName:
        """The network's name."""
        return self.spec.name

    @property
    def keeps_features(self) -> bool:
        """The network puts out what shallow steps take."""
        return any(tensor.name == DEEP_FEATURES for tensor in self.spec.outputs)


def make_recipe(spec: NetworkSpec, precision: Precision, graph: GraphEntry, upsamplers: int) -> Recipe:
    """The recipe of the network ``spec`` in a bundle of ``precision`` whose networks are written as ``graph`` says.

    ``upsamplers`` is how often the UNet halves its input.
    """
    name = spec.name
    own = precision_of(name, precision)
    rewritten = graph.rewrites and name in REWRITTEN
    sides = [axis for tensor in spec.tensors for axis in tensor.shape if str(axis).startswith(("height", "width"))]
    return Recipe(
        spec=msgspec.structs.replace(spec, ranges={}),
        precision=own,
        rewrites=rewritten,
        ff_chunks=graph.ff_chunks if name in ("denoiser", SHALLOW) else 1,
        operators=graph.operators if rewritten else "onnx",
        # The shallow denoiser has one upsampler. A bundle with it takes sizes alone for which that doubles exactly.
        doubling=rewritten and (name == SHALLOW or (name == "denoiser" and _halves(spec, upsamplers))),
        fp32_statistics=graph.rewrites and own == "fp16",
        smallest_latent=2**upsamplers + 1 if sides and name != SHALLOW else 2,
    )


def _halves(spec: NetworkSpec, times: int) -> bool:
    """True if height and width of the latents are fixed and can be halved ``times`` times."""
    height, width = spec.tensor("latents").shape[-2:]
    return all(isinstance(axis, int) and axis % 2**times == 0 for axis in (height, width))
