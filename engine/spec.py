"""Tensor names, shapes, types and ranges of the networks, written down only here.

The export takes the names of ONNX inputs from here, the engine builder its optimisation profiles and the runtime the
shapes of its buffers. The manifest stores the specifications, so that a host in another language can read them.

An axis is an integer or a `Symbol`: the value of ``frames``, or of ``height`` divided by 8 (all sizes are in pixels;
latents are smaller by the VAE's factor). An axis whose range is a single value is written as that integer, because the
graph gets smaller and the engine faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import msgspec

from svd_trt.errors import ArgumentError

__all__ = [
    "COEFFICIENTS",
    "DEEP_FEATURES",
    "LARGEST_COUNT",
    "LARGEST_SIDE",
    "LARGEST_STEPS",
    "NETWORKS",
    "SHALLOW",
    "SYMBOLS",
    "Axis",
    "KeptFeatures",
    "ModelInfo",
    "NetworkName",
    "NetworkSpec",
    "Range",
    "Ranges",
    "Symbol",
    "TensorSpec",
    "network_specs",
]

LARGEST_COUNT = 1024
"""The most frames, decode chunk or batch that a bundle can be built for."""

LARGEST_STEPS = 1000
"""The most denoising steps of one run."""

LARGEST_SIDE = 4096
"""The largest height or width, in pixels, that a bundle can be built for."""

DType: TypeAlias = Literal["float32", "float16", "uint8"]
NetworkName: TypeAlias = Literal["image_encoder", "vae_encoder", "denoiser", "shallow_denoiser", "vae_decoder"]

NETWORKS: tuple[NetworkName, ...] = ("image_encoder", "vae_encoder", "denoiser", "vae_decoder")
"""The networks that every bundle has."""

SHALLOW: NetworkName = "shallow_denoiser"
"""The denoiser without its deep levels, in bundles that were built with ``--shallow-steps``."""

DEEP_FEATURES = "deep_features"
"""What the denoiser puts out and the shallow denoiser takes, in those bundles."""

SYMBOLS: dict[str, str] = {
    "batch": "videos denoised together",
    "pictures": "pictures encoded together",
    "branches": "guidance branches: 2 is unconditional and conditional, 1 is conditional alone",
    "frames": "frames of one video",
    "chunk": "frames decoded together",
    "height": "frame height in pixels",
    "width": "frame width in pixels",
}

COEFFICIENTS: tuple[str, ...] = (
    "c_in",
    "c_noise",
    "c_skip",
    "c_out",
    "latents_weight",
    "denoised_weight",
    "previous_denoised_weight",
)
"""Order of the denoiser's ``coefficients``: the preconditioning of Karras et al. 2022 (arXiv:2206.00364, table 1),
then the weights of a linear multistep update. A sampler is a table of these, made on the host."""


class Range(msgspec.Struct, frozen=True, order=False):
    """Smallest, optimal and largest value of a symbol: an optimisation profile's kMIN, kOPT and kMAX."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ArgumentError(f"a range must satisfy 1 <= MIN <= OPT <= MAX, and {self} does not")

    def __str__(self) -> str:
        return str(self.min) if self.fixed else f"{self.min}:{self.opt}:{self.max}"

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int) and self.min <= value <= self.max

    def clamp(self, value: int) -> int:
        """The value in the range that is closest to ``value``."""
        return min(max(value, self.min), self.max)

    def require(self, value: int, name: str, option: str) -> None:
        """Check that ``value`` is in the range that a bundle was built for.

        Args:
            value: from the caller.
            name: the caller's name for the value, for the message.
            option: the option of ``svd-trt build`` that sets the range, for the message.

        Raises:
            ArgumentError: the value is outside the range.
        """
        if value not in self:
            raise ArgumentError(
                f"{name} {value} is outside what this bundle was built for ({self.words}); "
                f"build one with another {option}"
            )

    @property
    def fixed(self) -> bool:
        """True if the range is a single value."""
        return self.min == self.max

    @property
    def words(self) -> str:
        """The range for a sentence: ``2 to 25``, or ``14`` if it is fixed."""
        return str(self.min) if self.fixed else f"{self.min} to {self.max}"

    @classmethod
    def parse(cls, text: str) -> Range:
        """The range in ``"2:14:25"`` or ``"14"``.

        Raises:
            ArgumentError: the text is neither, or the numbers do not increase.
        """
        parts = text.split(":")
        try:
            numbers = [int(part) for part in parts]
        except ValueError:
            numbers = []
        if len(numbers) == 1:
            return cls(numbers[0], numbers[0], numbers[0])
        if len(numbers) == 3:
            return cls(*numbers)
        raise ArgumentError(f"{text!r} is not a range; write one number, or MIN:OPT:MAX such as 2:14:25")


class Ranges(msgspec.Struct, frozen=True):
    """The range of every symbol: the sizes that one bundle can run with."""

    batch: Range
    pictures: Range
    branches: Range
    frames: Range
    chunk: Range
    height: Range
    width: Range

    def of(self, symbol: str) -> Range:
        """The range of ``symbol``, one of `SYMBOLS`."""
        value = getattr(self, symbol)
        assert isinstance(value, Range)
        return value


class ModelInfo(msgspec.Struct, frozen=True):
    """Facts about a checkpoint that the specifications and the runtime need."""

    latent_channels: int
    vae_scale_factor: int
    embed_dim: int
    image_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    num_frames: int
    """Frames that the checkpoint was trained for: 14 for SVD, 25 for SVD-XT."""
    decoder_channels: int
    """Channels of the decoder's largest tensor, which has the height and width of a frame: 256 for SVD."""


class Symbol(msgspec.Struct, frozen=True):
    """An axis that is not fixed: the value of ``symbol``, one of `SYMBOLS`, divided by ``divisor``."""

    symbol: str
    divisor: int = 1

    def __str__(self) -> str:
        return self.symbol if self.divisor == 1 else f"{self.symbol}//{self.divisor}"


Axis: TypeAlias = int | Symbol


class TensorSpec(msgspec.Struct, frozen=True):
    """One input or output of a network."""

    name: str
    dtype: DType
    shape: tuple[Axis, ...]
    meaning: str

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every symbol replaced by its value in ``sizes``."""
        return tuple(_axis_size(axis, sizes) for axis in self.shape)

    @property
    def dynamic(self) -> bool:
        """True if at least one axis is symbolic."""
        return any(isinstance(axis, Symbol) for axis in self.shape)


class KeptFeatures(msgspec.Struct, frozen=True):
    """What a step with all levels of the UNet leaves for shallow steps: the second level's output, at half the size."""

    channels: int
    dtype: DType


class NetworkSpec(msgspec.Struct, frozen=True):
    """One network: its tensors in order and the range of every symbol in them."""

    name: NetworkName
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    ranges: dict[str, Range]

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Inputs, then outputs."""
        return self.inputs + self.outputs

    def tensor(self, name: str) -> TensorSpec:
        """The tensor called ``name``; KeyError if there is none."""
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise KeyError(name)

    def profile(
        self, tensor: TensorSpec, ranges: Mapping[str, Range] | None = None
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Shapes of ``tensor`` at the minimum, optimum and maximum of ``ranges``, by default the network's own."""
        ranges = self.ranges if ranges is None else ranges
        low = {symbol: r.min for symbol, r in ranges.items()}
        best = {symbol: r.opt for symbol, r in ranges.items()}
        high = {symbol: r.max for symbol, r in ranges.items()}
        return tensor.resolve(low), tensor.resolve(best), tensor.resolve(high)

    @property
    def symbols(self) -> tuple[str, ...]:
        """Symbols in the shapes of the tensors, in the order of `SYMBOLS`."""
        used = {axis.symbol for tensor in self.tensors for axis in tensor.shape if isinstance(axis, Symbol)}
        return tuple(symbol for symbol in SYMBOLS if symbol in used)


def network_specs(model: ModelInfo, ranges: Ranges, kept: KeptFeatures | None = None) -> dict[NetworkName, NetworkSpec]:
    """The specifications of a bundle for ``model`` with sizes in ``ranges``.

    With ``kept`` the denoiser puts out features, and there is a shallow denoiser that takes them.
    """
    axes: dict[str, Axis] = {s: ranges.of(s).min if ranges.of(s).fixed else Symbol(s) for s in SYMBOLS}
    pictures, chunk, height, width = (axes[s] for s in ("pictures", "chunk", "height", "width"))
    h, w = (_divided(axis, model.vae_scale_factor) for axis in (height, width))
    c, size = model.latent_channels, model.image_size

    def spec(name: NetworkName, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> NetworkSpec:
        free = NetworkSpec(name, tuple(inputs), tuple(outputs), {})
        return msgspec.structs.replace(free, ranges={s: ranges.of(s) for s in free.symbols})

    inputs, outputs = _denoiser_tensors(model, axes)
    features = [] if kept is None else [_deep_features(model, axes, kept)]
    specs = [
        spec(
            "image_encoder",
            [_tensor("pixels", (pictures, 3, size, size), "the picture as CLIP wants it: resized, normalised")],
            [_tensor("image_embeds", (pictures, 1, model.embed_dim), "CLIP's projected embedding")],
        ),
        spec(
            "vae_encoder",
            [_tensor("image", (pictures, 3, height, width), "the picture in [-1, 1] plus augmentation noise")],
            [_tensor("image_latents", (pictures, c, h, w), "mode of the posterior, not scaled")],
        ),
        spec("denoiser", inputs, outputs + features),
        *([spec(SHALLOW, inputs + features, outputs)] if features else []),
        spec(
            "vae_decoder",
            [
                _tensor(
                    "latents",
                    (chunk, c, h, w),
                    "denoised latents of consecutive frames, scaled as the loop left them",
                )
            ],
            [_tensor("frames", (chunk, height, width, 3), "RGB, ready to encode", "uint8")],
        ),
    ]
    return {s.name: s for s in specs}


def _denoiser_tensors(model: ModelInfo, axes: Mapping[str, Axis]) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of a denoising step."""
    batch, branches, frames = (axes[s] for s in ("batch", "branches", "frames"))
    h, w = (_divided(axes[s], model.vae_scale_factor) for s in ("height", "width"))
    c = model.latent_channels
    video = (batch, frames, c, h, w)
    inputs = [
        _tensor("latents", video, "latents at this step's sigma"),
        _tensor("previous_denoised", video, "denoised latents of the step before; zeros at the first"),
        _tensor("partial_denoised", video, "what other branches gave in passes before this one; else zeros"),
        _tensor(
            "image_latents",
            (branches, batch, c, h, w),
            "condition by channels; zeros unconditionally",
        ),
        _tensor(
            "image_embeds",
            (branches, batch, 1, model.embed_dim),
            "condition by attention; zeros likewise",
        ),
        _tensor("added_time_ids", (batch, 3), "fps - 1, motion_bucket_id, noise_aug_strength"),
        _tensor("guidance", (branches, frames), "weight of each branch's prediction in each frame"),
        _tensor("coefficients", (len(COEFFICIENTS),), ", ".join(COEFFICIENTS)),
    ]
    outputs = [
        _tensor("next_latents", video, "latents at the next sigma"),
        _tensor("denoised", video, "the model's estimate of the clean latents"),
    ]
    return inputs, outputs


def _deep_features(model: ModelInfo, axes: Mapping[str, Axis], kept: KeptFeatures) -> TensorSpec:
    """What a deep step keeps for the shallow steps after it, for each branch of its pass."""
    branches, batch, frames = (axes[s] for s in ("branches", "batch", "frames"))
    h, w = (_divided(axes[s], 2 * model.vae_scale_factor) for s in ("height", "width"))
    shape = (branches, batch, frames, kept.channels, h, w)
    return _tensor(DEEP_FEATURES, shape, "output of the UNet's second level, for shallow steps", kept.dtype)


def _tensor(name: str, shape: tuple[Axis, ...], meaning: str, dtype: DType = "float32") -> TensorSpec:
    return TensorSpec(name, dtype, shape, meaning)


def _divided(axis: Axis, factor: int) -> Axis:
    return axis // factor if isinstance(axis, int) else Symbol(axis.symbol, factor)


def _axis_size(axis: Axis, sizes: Mapping[str, int]) -> int:
    return axis if isinstance(axis, int) else sizes[axis.symbol] // axis.divisor
