"""``svd-trt inspect BUNDLE --trtexec NETWORK``: the commands that run a plan in NVIDIA's own benchmark tool."""

from __future__ import annotations

import shlex

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.spec import NetworkName
from svd_trt.errors import BundleError

__all__ = ["trtexec_commands"]

# The options make trtexec do what tensorrt_rtx does anyway: no copies, busy waiting, a graph, a run for the layers.
_TOOLS = {
    "tensorrt": ("trtexec", ["--noDataTransfers", "--useSpinWait", "--useCudaGraph", "--separateProfileRun"]),
    "tensorrt-rtx": ("tensorrt_rtx", []),
}


def trtexec_commands(bundle: Bundle, network: NetworkName) -> list[str]:
    """Make a command for each profile of the network's plan, at the profile's best sizes.

    Raises:
        BundleError: the bundle has no engines.
    """
    entry, plan = bundle.network(network), bundle.plan_path(network)
    if entry.plan is None or plan is None or bundle.manifest.tensorrt is None:
        raise BundleError(f"{bundle.path} has no engines; build with --backend tensorrt or --backend tensorrt-rtx")
    tool, options = _TOOLS[bundle.manifest.tensorrt.name]
    commands = []
    for index, profile in enumerate(entry.plan.profiles):
        shapes = [
            f"{tensor.name}:{'x'.join(map(str, entry.spec.profile(tensor, profile.ranges)[1]))}"
            for tensor in entry.spec.inputs
            if tensor.dynamic
        ]
        arguments = [f"--loadEngine={plan}", f"--useProfile={index}"]
        arguments += [f"--shapes={','.join(shapes)}"] if shapes else []
        commands.append(shlex.join([tool, *arguments, *options, "--dumpProfile"]))
    return commands
