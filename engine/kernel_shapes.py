"""Unknown axes of a kernel's tensors, as expressions over the sizes of a run.

In a profile that is a range the builder writes -1 for axes that depend on the sizes, and it reshapes and transposes
tensors as it likes. But it names the ONNX nodes that were fused into each kernel, and it knows the axes of their
outputs as expressions. So an output's unknown axes follow from the layer's output that it can be a view of, and an
input's from the kernel that wrote the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from svd_trt.engine.builder_log import LoggedKernel, LoggedLayer, LoggedTensor
from svd_trt.engine.kernel_kinds import is_attention
from svd_trt.engine.size_expressions import Product, product_of
from svd_trt.engine.spec import NetworkSpec
from svd_trt.errors import ArgumentError

__all__ = ["AxisResolver", "known_axes"]

_ONE = Product(1)

# Any points do at which different expressions have different values. The last one has odd sizes.
_POINTS = tuple(
    {
        "batch": batch,
        "pictures": batch,
        "branches": branches,
        "frames": frames,
        "chunk": frames,
        "height": 8 * height,
        "width": 8 * width,
    }
    for batch, branches, frames, height, width in ((5, 3, 7, 44, 52), (7, 5, 11, 36, 68), (3, 2, 13, 33, 27))
)


class AxisResolver:
    """Finds the unknown axes of the kernels of one profile, which it must see in the order in which they run."""

    def __init__(self, spec: NetworkSpec, layers: Mapping[str, list[LoggedLayer]]) -> None:
        self._layers = {name: [layer for layer in found if _understood(layer)] for name, found in layers.items()}
        self._totals: dict[str, Product] = {t.name: _of_axes(map(str, t.shape)) for t in spec.inputs}

    def resolve(self, kernel: LoggedKernel) -> tuple[list[Product | None], list[Product | None]]:
        """The product of the unknown axes of each input and output: 1 if all are known, None if it cannot be found."""
        inputs = [self._of_input(tensor, kernel) for tensor in kernel.inputs]
        found: dict[LoggedTensor, Product] = {}
        # Statistics such as [rows, 1] say less than [rows, channels], whose rows they share, so they come last.
        for tensor in sorted(kernel.outputs, key=known_axes, reverse=True):
            rest = self._of_output(tensor, kernel, inputs, found)
            if rest is not None:
                found[tensor] = rest
                # A kernel can write its part of a concatenation.
                part = _part_seen(tensor)
                whole = rest.times(Product(known_axes(tensor) * part.denominator, part.numerator))
                self._totals[tensor.name] = whole
        return inputs, [found.get(tensor) for tensor in kernel.outputs]

    def _of_input(self, tensor: LoggedTensor, kernel: LoggedKernel) -> Product | None:
        if -1 not in tensor.dims:
            return _ONE
        part = self._of_layer_input(tensor, kernel)
        if part is not None:
            return part
        total = self._totals.get(tensor.name)
        if total is None:
            return None
        return _whole(total.times(_part_seen(tensor)).over(known_axes(tensor)))

    def _of_layer_input(self, tensor: LoggedTensor, kernel: LoggedKernel) -> Product | None:
        """What an input of attention or a convolution can be by the layer's own inputs.

        Queries, keys and values are parts of one tensor, and a convolution can read a part of a larger picture. The
        strides that would tell are unknown.
        """
        if is_attention(kernel.name):
            layers = self._fused(kernel, "MATRIX_MULTIPLY")
        else:
            layers = self._fused(kernel, "CONVOLUTION") if kernel.type == "correlation" else []
        shapes = (axes for layer in layers for axes in layer.inputs)
        return _largest(rest for axes in shapes for rest in _views(tensor.dims, axes, reduced=False))

    def _of_output(
        self,
        tensor: LoggedTensor,
        kernel: LoggedKernel,
        inputs: Sequence[Product | None],
        found: Mapping[LoggedTensor, Product],
    ) -> Product | None:
        if -1 not in tensor.dims:
            return _ONE
        for other, rest in found.items():
            if _differ_by_reduction(tensor, other):
                return rest
        shapes = [axes for layer in self._fused(kernel) for axes in layer.outputs]
        if not kernel.inputs and len(tensor.dims) == 1 and shapes:
            # It clears the counters of a normalisation that follows: one for each instance and channel.
            return _of_axes(shapes[0][:2])
        ways = (
            self._of_joined_products(tensor, kernel),
            _largest(rest for axes in shapes for rest in _views(tensor.dims, axes, reduced=False)),
            _largest(rest for axes in shapes for rest in _views(tensor.dims, axes, reduced=True)),
            _largest(_whole(_of_axes(axes).over(known_axes(tensor))) for axes in shapes),
            # Padded channels: no layer has such a shape, but the input has the same axes.
            _largest(rest for t, rest in zip(kernel.inputs, inputs, strict=True) if _same_places(t, tensor)),
            # A kernel without layers moves data: its output has as many elements as its input.
            _largest(
                _whole(rest.times(Product(known_axes(source))).over(known_axes(tensor)))
                for source, rest in zip(kernel.inputs, inputs, strict=True)
                if rest is not None
            ),
        )
        return next((rest for rest in ways if rest is not None), None)

    def operations(self, kernel: LoggedKernel, outputs: Sequence[Product | None]) -> Product | None:
        """Floating-point operations of the products and convolutions in a kernel, two for a multiply-add.

        ``outputs`` are the unknown axes that `resolve` found. None if the log does not tell.
        """
        if kernel.type == "correlation":
            return _of_convolution(kernel, self._fused(kernel, "CONVOLUTION"), outputs)
        if kernel.type == "deconv":
            return _of_upsampling(kernel, outputs)
        products = [layer for layer in self._fused(kernel, "MATRIX_MULTIPLY") if layer.outputs and any(layer.inputs)]
        return _sum([_of_axes(["2", *layer.outputs[0], layer.inputs[0][-1]]) for layer in products])

    def _of_joined_products(self, tensor: LoggedTensor, kernel: LoggedKernel) -> Product | None:
        """The rest of an output that holds the results of several matrix products with the same left side."""
        joined = [_of_axes(axes) for layer in self._fused(kernel, "MATRIX_MULTIPLY") for axes in layer.outputs]
        if kernel.type != "gemm" or len(joined) < 2 or len({(p.factors, p.denominator) for p in joined}) > 1:
            return None
        total = msgspec.structs.replace(joined[0], numerator=sum(p.numerator for p in joined))
        return _whole(total.over(known_axes(tensor)))

    def _fused(self, kernel: LoggedKernel, layer_type: str = "") -> list[LoggedLayer]:
        """The layers of the network that are part of the kernel, of one type if that is given."""
        layers = (layer for name in kernel.layers for layer in self._layers.get(name, ()))
        return [layer for layer in layers if layer_type in ("", layer.type)]


def _understood(layer: LoggedLayer) -> bool:
    """True if all axes of a layer can be computed; TensorRT can have symbols and operators of its own."""
    try:
        return all(_of_axes(axes).values(_POINTS) is not None for axes in layer.inputs + layer.outputs)
    except ArgumentError:
        return False


def known_axes(tensor: LoggedTensor) -> int:
    """The product of the axes that the log has as numbers."""
    return math.prod(axis for axis in tensor.dims if axis != -1)


def _of_axes(axes: Iterable[str]) -> Product:
    result = _ONE
    for axis in axes:
        result = result.times(product_of(axis))
    return result


def _sum(products: Sequence[Product]) -> Product | None:
    if not products:
        return None
    if len({(p.factors, p.denominator) for p in products}) == 1:
        return msgspec.structs.replace(products[0], numerator=sum(p.numerator for p in products))
    return Product(1, 1, (f"(+ {' '.join(p.text for p in products)})",))


def _of_convolution(
    kernel: LoggedKernel, layers: Sequence[LoggedLayer], outputs: Sequence[Product | None]
) -> Product | None:
    """Each value of the output takes as many multiply-adds as a filter ``[C', C, kernel]`` has weights."""
    filters = max(kernel.constants, key=known_axes, default=None)
    if filters is None or len(filters.dims) < 3 or not outputs or outputs[0] is None:
        return None
    # The builder pads few channels to a multiple of 4 or 8; the layer's input has the real number.
    channels = [int(axes[1]) for layer in layers for axes in layer.inputs[:1] if axes[1:2] and axes[1].isdigit()]
    each = min([filters.dims[1], *channels]) * math.prod(filters.dims[2:])
    return outputs[0].times(Product(2 * known_axes(kernel.outputs[0]) * each))


def _of_upsampling(kernel: LoggedKernel, outputs: Sequence[Product | None]) -> Product | None:
    """A transposed convolution of stride two: each output value takes a quarter of a filter ``[C, C', 4, 4]``."""
    filters = max(kernel.constants, key=known_axes, default=None)
    if filters is None or len(filters.dims) != 4 or not outputs or outputs[0] is None:
        return None
    each = filters.dims[0] * math.prod(filters.dims[2:]) // 4
    return outputs[0].times(Product(2 * known_axes(kernel.outputs[0]) * each))


def _whole(product: Product) -> Product | None:
    return product if product.values(_POINTS) is not None else None


def _largest(products: Iterable[Product | None]) -> Product | None:
    """The candidate with the largest value: a kernel writes its result, and its operands may be smaller."""
    found = [(values, product) for product in products if product is not None and (values := product.values(_POINTS))]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _differ_by_reduction(tensor: LoggedTensor, other: LoggedTensor) -> bool:
    """True if ``tensor`` is ``other`` with known axes reduced to 1, as the statistics of a normalisation are."""
    return len(tensor.dims) == len(other.dims) and all(
        a == b or (a == 1 and b != -1) for a, b in zip(tensor.dims, other.dims, strict=True)
    )


def _same_places(tensor: LoggedTensor, other: LoggedTensor) -> bool:
    """True if the same axes of both are unknown."""
    return [axis == -1 for axis in tensor.dims] == [axis == -1 for axis in other.dims]


def _part_seen(tensor: LoggedTensor) -> Product:
    """The part of the whole tensor that a view of some of its channels shows.

    The stride of the innermost unknown axis tells how long the rows are in memory; the view's known axes inside of it,
    how much of a row it reads. Without a known stride the view is taken to be of the whole tensor.
    """
    if len(tensor.strides) != len(tensor.dims):
        return _ONE
    pairs = list(zip(tensor.dims, tensor.strides, strict=True))
    pitch = min((stride for axis, stride in pairs if axis == -1 and stride > 0), default=0)
    if not pitch:
        return _ONE
    inside = math.prod(axis for axis, stride in pairs if axis > 0 and 0 < stride < pitch)
    return Product(inside, 1).over(pitch) if inside < pitch else _ONE


def _views(dims: Sequence[int], axes: Sequence[str], *, reduced: bool) -> Iterator[Product]:
    """What the unknown ``dims`` can be if a tensor of ``axes`` is seen with neighbouring axes merged.

    With ``reduced``, a dimension of 1 can be any axes, over which the kernel took a sum or a mean.
    """
    if not dims:
        if not axes:
            yield _ONE
        return
    for count in range(len(axes) + 1):
        group = _of_axes(axes[:count])
        dim = dims[0]
        if dim == -1:
            if group.factors:  # else the builder would have written the number
                for rest in _views(dims[1:], axes[count:], reduced=reduced):
                    yield group.times(rest)
        elif group == Product(dim) or (reduced and dim == 1):
            yield from _views(dims[1:], axes[count:], reduced=reduced)
