"""``svd-trt inspect --trtexec``: commands that fit the plan."""

from __future__ import annotations

import shlex
from pathlib import Path

import msgspec
import pytest

from svd_trt import Bundle
from svd_trt.cli.trtexec import trtexec_commands
from svd_trt.engine.manifest import TensorRtEntry
from svd_trt.engine.spec import NETWORKS, NetworkName
from svd_trt.errors import BundleError
from tests.cli.conftest import invoke


@pytest.mark.parametrize("network", NETWORKS)
def test_there_is_a_command_for_each_profile_with_its_best_sizes(network: NetworkName, small_bundle: Path) -> None:
    result = invoke("inspect", small_bundle, "--trtexec", network)
    assert result.returncode == 0, result.stderr
    bundle = Bundle.open(small_bundle)
    entry = bundle.network(network)
    assert entry.plan is not None
    commands = [shlex.split(line) for line in result.stdout.splitlines()]
    assert len(commands) == len(entry.plan.profiles)
    for index, (command, profile) in enumerate(zip(commands, entry.plan.profiles, strict=True)):
        assert command[0] == "tensorrt_rtx"
        options = dict(option.partition("=")[::2] for option in command[1:])
        assert options.pop("--loadEngine") == str(bundle.plan_path(network))
        assert options.pop("--useProfile") == str(index)
        shapes = dict(part.split(":") for part in options.pop("--shapes", "").split(",") if part)
        assert set(shapes) == {tensor.name for tensor in entry.spec.inputs if tensor.dynamic}
        best = {symbol: r.opt for symbol, r in profile.ranges.items()}
        for name, shape in shapes.items():
            assert tuple(map(int, shape.split("x"))) == entry.spec.tensor(name).resolve(best)
        assert set(options) == {"--dumpProfile"}


def test_plain_tensorrt_has_another_tool(small_bundle: Path) -> None:
    bundle = Bundle.open(small_bundle)
    plain = msgspec.structs.replace(bundle.manifest, tensorrt=TensorRtEntry("tensorrt", "10.14.1", "sm90"))
    command = shlex.split(trtexec_commands(Bundle(bundle.path, plain), "denoiser")[0])
    assert command[0] == "trtexec"
    assert {"--useCudaGraph", "--noDataTransfers", "--separateProfileRun", "--dumpProfile"} <= set(command)


def test_a_bundle_without_engines_and_an_unknown_network_are_refused(small_bundle: Path) -> None:
    bundle = Bundle.open(small_bundle)
    without = Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, tensorrt=None))
    with pytest.raises(BundleError, match="has no engines; build with"):
        trtexec_commands(without, "denoiser")
    refused = invoke("inspect", small_bundle, "--trtexec", "unet")
    assert refused.returncode == 2
    assert all(name in refused.stderr for name in NETWORKS)
