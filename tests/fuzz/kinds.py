"""What is fuzzed: for each kind, a strategy of inputs and the function that is tried with them."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import PIL.ExifTags
import PIL.Image
from hypothesis import strategies as st

from svd_trt.engine import manifest as manifests
from svd_trt.errors import CheckpointError, SvdTrtError
from tests.fuzz.mutations import changed_bytes, changed_json, changed_names, encode

Kind: TypeAlias = Callable[[Path, Path], tuple[st.SearchStrategy[Any], Callable[[Any], object]]]


class WorkStartsError(SvdTrtError):
    """All checks passed, and the work would start now."""


def _start_work(*_: Any, **__: Any) -> Any:
    raise WorkStartsError("the work starts")


def manifests_of(bundle: Path, _checkpoint: Path) -> Any:
    """Manifests with changes, and a checksum that fits, read as ``inspect`` and ``infer`` do."""
    from svd_trt import Bundle
    from svd_trt.engine.memory import compare_plans
    from svd_trt.runtime.pipeline import VideoPipeline

    original = json.loads((bundle / "manifest.json").read_bytes())
    folder = Path("bundle")
    folder.mkdir()
    for path in bundle.iterdir():
        if path.is_dir():
            (folder / path.name).symlink_to(path)
    picture = PIL.Image.new("RGB", (8, 8))

    def attempt(content: bytes) -> None:
        (folder / manifests.MANIFEST_NAME).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        (folder / manifests.CHECKSUM_NAME).write_text(f"{digest}  {manifests.MANIFEST_NAME}\n")
        opened = Bundle.open(folder, verify=False)
        compare_plans(opened.manifest)
        with (
            mock.patch("svd_trt.runtime.pipeline.generate", _start_work),
            VideoPipeline.open(opened, backend="onnxruntime") as pipe,
        ):
            pipe(picture, num_inference_steps=2)

    return changed_json(original), attempt


def safetensors(_bundle: Path, checkpoint: Path) -> Any:
    """Headers of safetensors files, whose length, JSON, shapes and offsets are changed."""
    from svd_trt.export.tensor_files import shapes_of

    content = (checkpoint / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :][:4096]
    few = dict(list(header.items())[:6])
    path = Path("model.safetensors")

    @st.composite
    def strategy(draw: st.DrawFn) -> bytes:
        kind = draw(st.integers(0, 3))
        text = draw(changed_json(few)) if kind else encode(few)
        size = draw(
            st.sampled_from((len(text), 0, 1, 2**32, 2**63, 2**64 - 1, 10**8 + 1)) if kind == 1 else st.just(len(text))
        )
        whole = struct.pack("<Q", size) + text + data
        return whole if kind else draw(changed_bytes(whole))

    def attempt(content: bytes) -> None:
        path.write_bytes(content)
        shapes_of(path)

    return strategy(), attempt


def single_files(_bundle: Path, checkpoint: Path) -> Any:
    """Names and shapes of a single file: lost, renamed, prefixed and changed."""
    from svd_trt.export import random_checkpoint
    from svd_trt.export.checkpoint_kinds import open_checkpoint
    from svd_trt.export.folder import configurations_of as read_configurations
    from svd_trt.export.stability_names import places_of, shapes_in_file

    found = read_configurations(checkpoint)
    empty = functools.cache(lambda component: random_checkpoint.empty_model(component, found[component]))
    shapes: dict[str, Any] = {}
    components: tuple[Any, ...] = ("unet", "vae", "image_encoder")
    for component in components:
        parameters = list(random_checkpoint.parameters_of(empty(component)))
        places = places_of(component, [name for _, _, name in parameters], found)
        for module, name, full in parameters:
            shapes[places[full].name] = shapes_in_file(getattr(module, name).shape, places[full])[0]
    names = st.sampled_from(("svd", "svd_xt", "context", "my-xt-v2", "nextgen", "model"))

    def attempt(value: tuple[str, dict[str, Any], str | None]) -> None:
        stem, table, config = value
        path = Path(f"{stem}.safetensors")
        _write_header(path, table)
        with (
            mock.patch("svd_trt.export.random_checkpoint.empty_model", lambda component, _: empty(component)),
            mock.patch("svd_trt.export.single_file.sha256_of", _start_work),
        ):
            open_checkpoint(str(path), config=config)

    configs = st.sampled_from((str(checkpoint), str(checkpoint), None, "svd", "missing"))
    return st.tuples(names, changed_names(shapes), configs), attempt


def pickles(_bundle: Path, checkpoint: Path) -> Any:
    """Files of ``torch.save``, in both of its formats, with changed bytes.

    Of its older format, torch reserves the memory that a damaged size claims before it reads on, and nothing before it
    can tell. The limit of this process makes that an error, so the refusal counts.
    """
    import torch

    from svd_trt.export.tensor_files import shapes_of

    weights = {"conv.weight": torch.zeros(3, 2), "conv.bias": torch.ones(3, dtype=torch.float16)}
    originals = []
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save(weights, file, _use_new_zipfile_serialization=zipped)
        originals.append(file.getvalue())
    path = Path("diffusion_pytorch_model.bin")

    def attempt(content: bytes) -> None:
        path.write_bytes(content)
        try:
            shapes_of(path, pickles=True)
        except CheckpointError as error:
            raise CheckpointError(str(error)) from None

    return st.sampled_from(originals).flatmap(changed_bytes), attempt


def _write_header(path: Path, shapes: Mapping[str, Any]) -> None:
    """A safetensors file of half-precision tensors, as far as the shapes are shapes; the weights are a hole."""
    header, end = {}, 0
    for name, shape in shapes.items():
        whole = isinstance(shape, list | tuple) and all(isinstance(n, int) for n in shape)
        size = 2 * math.prod(shape) if whole else 0
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = encode(header)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if 0 < end < 2**40:
            file.truncate(8 + len(text) + end)


def configurations_of(_bundle: Path, checkpoint: Path) -> Any:
    """Configuration files of a checkpoint, and its index."""
    from svd_trt.export.checkpoint_kinds import open_checkpoint

    names = ["model_index.json", *(str(p.relative_to(checkpoint)) for p in checkpoint.glob("*/*.json"))]
    originals = {name: (checkpoint / name).read_bytes() for name in sorted(names)}
    folder = Path("checkpoint")
    for name in originals:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        for weights in (checkpoint / name).parent.glob("*.safetensors"):
            target = (folder / name).parent / weights.name
            if not target.exists():
                target.symlink_to(weights)

    @st.composite
    def strategy(draw: st.DrawFn) -> tuple[str, bytes]:
        name = draw(st.sampled_from(list(originals)))
        return name, draw(changed_json(json.loads(originals[name])))

    def attempt(value: tuple[str, bytes]) -> None:
        for name, content in originals.items():
            (folder / name).write_bytes(content)
        (folder / value[0]).write_bytes(value[1])
        opened = open_checkpoint(str(folder))
        for component in ("unet", "vae"):
            opened.check(component)  # type: ignore[arg-type]

    attempt(next(iter(originals.items())))  # imports torch and diffusers, which takes seconds
    return strategy(), attempt


def pictures(_bundle: Path, _checkpoint: Path) -> Any:
    """Pictures of every format that Pillow writes, with changed bytes and with damaged metadata."""
    from svd_trt.runtime.images import load_image

    originals = _pictures()

    @st.composite
    def strategy(draw: st.DrawFn) -> tuple[bytes, Any, Any]:
        content = draw(changed_bytes(draw(st.sampled_from(originals))))
        return content, draw(st.sampled_from((None, "convert"))), draw(st.sampled_from((None, "white")))

    path = Path("picture")

    def attempt(value: tuple[bytes, Any, Any]) -> None:
        content, icc, background = value
        path.write_bytes(content)
        load_image(path, icc=icc, background=background, warn=lambda text: None)

    return strategy(), attempt


def _pictures() -> list[bytes]:
    """Small pictures of all modes in all formats that Pillow writes, and some with all kinds of metadata."""
    PIL.Image.init()
    made = []
    noise = random.Random(0)
    for name in sorted(PIL.Image.SAVE):
        for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"):
            picture = (
                PIL.Image.new(mode, (24, 16))
                if mode != "RGB"
                else PIL.Image.frombytes("RGB", (24, 16), noise.randbytes(24 * 16 * 3))
            )
            file = io.BytesIO()
            try:
                picture.save(file, name)
            except Exception:
                continue
            made.append(file.getvalue())
    exif = PIL.Image.Exif()
    for tag in (PIL.ExifTags.Base.Orientation, PIL.ExifTags.Base.XResolution, PIL.ExifTags.Base.ImageDescription):
        exif[tag] = 6
    for name in ("JPEG", "PNG", "WEBP", "TIFF"):
        file = io.BytesIO()
        PIL.Image.new("RGB", (24, 16)).save(file, name, exif=exif, icc_profile=noise.randbytes(200))
        made += [file.getvalue()] * 20  # as often as all the others together
    return made


def kernel_lists(bundle: Path, _checkpoint: Path) -> Any:
    """Lists of kernels, with their expressions of sizes."""
    from svd_trt import Bundle

    opened = Bundle.open(bundle)
    entry = opened.network("image_encoder").plan
    assert entry is not None
    assert entry.kernels is not None
    original = json.loads((bundle / entry.kernels.path).read_bytes())
    here = Bundle(Path.cwd(), opened.manifest)
    path = Path(entry.kernels.path)
    path.parent.mkdir()

    def attempt(content: bytes) -> None:
        path.write_bytes(content)
        with mock.patch.object(here, "_problem", return_value=None):  # as if the manifest had its hash
            here.kernels("image_encoder")

    return changed_json(original), attempt


def results(_bundle: Path, _checkpoint: Path) -> Any:
    """Results of ``svd-trt bench``, read and drawn as tables."""
    from svd_trt.benchmarks.report import markdown_page
    from svd_trt.benchmarks.results import read_result

    committed = Path(__file__).parents[2] / "benchmarks" / "results" / "bench-mid-cpu.json"
    original = json.loads(committed.read_bytes())
    path = Path("result.json")

    def attempt(content: bytes) -> None:
        path.write_bytes(content)
        markdown_page(read_result(path))

    return changed_json(original), attempt


def videos(_bundle: Path, _checkpoint: Path) -> Any:
    """Videos, whose parameters are read back."""
    import numpy as np

    from svd_trt.runtime.video import open_writer, read_metadata

    originals = {}
    for name in ("out.mp4", "out.webp", "out.gif", "out"):
        with open_writer(name, height=16, width=16, fps=7, metadata={"seed": 1}) as writer:
            writer.write(np.zeros((2, 16, 16, 3), np.uint8))
        path = Path(name)
        originals[name] = (path / "frame_0000.png" if path.is_dir() else path).read_bytes()

    @st.composite
    def strategy(draw: st.DrawFn) -> tuple[str, bytes]:
        name = draw(st.sampled_from(sorted(originals)))
        return name, draw(changed_bytes(originals[name]))

    def attempt(value: tuple[str, bytes]) -> None:
        path = Path(value[0])
        (path / "frame_0000.png" if path.is_dir() else path).write_bytes(value[1])
        read_metadata(path)

    return strategy(), attempt


def command_lines(bundle: Path, checkpoint: Path) -> Any:
    """Command lines: real options with all kinds of values, up to the point at which work would start."""
    from tests.fuzz.command_lines import attempt_command, command_line_strategy

    return command_line_strategy(bundle, checkpoint), attempt_command


KINDS: dict[str, Kind] = {
    "manifests": manifests_of,
    "safetensors": safetensors,
    "single files": single_files,
    "pickles": pickles,
    "configurations": configurations_of,
    "pictures": pictures,
    "kernel lists": kernel_lists,
    "results": results,
    "videos": videos,
    "command lines": command_lines,
}
