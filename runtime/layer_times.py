"""How long each layer of each network took: what a backend reports, and the profile that is written of it."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple, TypeAlias

from svd_trt.engine.spec import NetworkName

__all__ = ["Layer", "LayerTimes", "add_layer_time", "layers_by_time", "summarize_layers"]

LayerTimes: TypeAlias = dict[NetworkName, dict[str, list[float]]]
"""Milliseconds of every call, by network and layer."""


class Layer(NamedTuple):
    """The calls of one layer; times in milliseconds.

    Attributes:
        network: the network that has the layer.
        name: as the backend reports it. TensorRT's names say which operations it fused.
        calls: how often the layer ran.
        milliseconds: of all calls.
        median: of one call; the first call may be slower.
    """

    network: NetworkName
    name: str
    calls: int
    milliseconds: float
    median: float


def add_layer_time(times: LayerTimes, network: NetworkName, layer: str, milliseconds: float) -> None:
    """Add one call of a layer."""
    times.setdefault(network, {}).setdefault(layer, []).append(milliseconds)


def layers_by_time(times: LayerTimes) -> list[Layer]:
    """All layers of all networks; the one that took longest comes first."""
    layers = [
        Layer(network, name, len(calls), sum(calls), statistics.median(calls))
        for network, by_name in times.items()
        for name, calls in by_name.items()
    ]
    return sorted(layers, key=lambda layer: -layer.milliseconds)


def summarize_layers(times: LayerTimes) -> dict[str, Any]:
    """Plain data by network: ``milliseconds``, and ``layers`` with name, calls, milliseconds and median, slowest first.

    The network that took longest comes first.
    """
    networks: dict[str, Any] = {}
    for network in sorted(times, key=lambda name: -sum(map(sum, times[name].values()))):
        layers = layers_by_time({network: times[network]})
        networks[network] = {
            "milliseconds": round(sum(layer.milliseconds for layer in layers), 4),
            "layers": [
                {
                    "name": layer.name,
                    "calls": layer.calls,
                    "milliseconds": round(layer.milliseconds, 4),
                    "median": round(layer.median, 4),
                }
                for layer in layers
            ],
        }
    return networks
