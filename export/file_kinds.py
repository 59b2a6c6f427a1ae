"""What a weight file is, recognised by its content before it is hashed or loaded."""

from __future__ import annotations

import json
import shlex
import zipfile
from collections.abc import Collection
from pathlib import Path

from svd_trt.errors import CheckpointError, first_line
from svd_trt.units import format_bytes

__all__ = ["is_pickle", "refuse_other_files", "refuse_parts_of_svd", "refuse_quantised"]

_START = 512
_MOST_HEADER = 100_000_000  # safetensors' own limit
_SIZE = 8  # of the number at the start, the header's length

_ARCHIVES = {
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
}
# bitsandbytes' 8 and 4 bits, fp8 with scales in two forms of ComfyUI, torchao, GPTQ.
_QUANTISERS = (
    ".SCB",
    ".absmax",
    ".quant_map",
    "scaled_fp8",
    ".scale_weight",
    ".weight_scale",
    ".comfy_quant",
    ".qweight",
)
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")
_CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; "
    "w = torch.load(sys.argv[1], 'cpu', weights_only=True); w = w.get('state_dict', w); "
    "save_file({k: v.clone().contiguous() for k, v in w.items() if torch.is_tensor(v)}, sys.argv[2])"
)


def is_pickle(path: Path) -> bool:
    """True if torch wrote the file with ``torch.save``, in either of its formats."""
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"\x80\x02":
        return True
    if start != b"PK":
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except Exception:  # on damaged archives zipfile raises nearly anything, UnicodeDecodeError included
        return False


def refuse_other_files(path: Path) -> None:
    """Refuse what is not a whole safetensors file.

    Raises:
        CheckpointError: the file is empty, cut off, a pointer, a web page, an archive, a pickle, or of another format;
            the message says what to do.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_START)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not size:
        raise CheckpointError(f"{path} is empty; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a pointer of git-lfs and not the weights; run `git lfs pull` in its repository, or download it "
            "again"
        )
    if start.lstrip().lower().startswith(_PAGES):
        raise CheckpointError(
            f"{path} is a web page and not weights, such as a request to log in; run `hf auth login` and download it "
            "with `hf download`"
        )
    if is_pickle(path):
        raise CheckpointError(f"{path} is a pickle of torch and not safetensors; convert it: `{_conversion(path)}`")
    for magic, kind in _ARCHIVES.items():
        if start.startswith(magic):
            raise CheckpointError(f"{path} is {kind} and not safetensors; unpack it and give what is inside")
    if start.startswith(b"GGUF"):
        raise CheckpointError(
            f"{path} is a GGUF file, whose weights are quantised; give the safetensors file that it was made from"
        )
    _refuse_damaged(path, size, start)


def _conversion(path: Path) -> str:
    """A command that writes the weights of a pickle beside it, without running code that it may have."""
    target = path.with_suffix(".safetensors")
    if target == path:
        target = path.with_name(f"{path.stem}-converted.safetensors")
    return f'python -c "{_CONVERT}" {shlex.join([str(path), str(target)])}'


def _refuse_damaged(path: Path, size: int, start: bytes) -> None:
    header = int.from_bytes(start[:_SIZE], "little")
    if size < _SIZE or header > _MOST_HEADER or start[_SIZE : _SIZE + 1] not in (b"{", b""):
        raise CheckpointError(f"{path} is not a safetensors file, or is damaged; download or save it again")
    if size < _SIZE + header:
        raise CheckpointError(f"{path} is cut off in its header, after {format_bytes(size)}; download or save it again")
    try:
        with path.open("rb") as file:
            fields = json.loads(file.read(_SIZE + header)[_SIZE:])
        whole = _SIZE + header + max(entry["data_offsets"][1] for name, entry in fields.items() if name[:2] != "__")
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors file, or is damaged: {first_line(error)}") from error
    if isinstance(whole, int) and size < whole:
        raise CheckpointError(
            f"{path} is damaged: it is cut off after {size:,} of {whole:,} bytes; download or save it again"
        )


def refuse_quantised(path: Path, names: Collection[str]) -> None:
    """Refuse weights that are numbers to be scaled: read as they are, they would be other weights.

    Raises:
        CheckpointError: the names of the tensors are those of a quantiser.
    """
    found = next((name for name in names if name.endswith(_QUANTISERS)), None)
    if found is not None:
        raise CheckpointError(
            f"{path} is quantised (it has {found}), and svd-trt would lose the scales; give the fp16 or fp32 weights "
            "that it was made from"
        )


def refuse_parts_of_svd(path: Path, names: Collection[str]) -> None:
    """Refuse a single file that is recognised as something other than the whole SVD, by the names of its tensors.

    Raises:
        CheckpointError: it is one of the networks alone, a LoRA, the published file of the image decoder, or a model
            for pictures; the message says what to do.
    """

    def have(*words: str) -> bool:
        return all(any(word in name for name in names) for word in words)

    if have("lora_") or have(".lora."):
        raise CheckpointError(f"{path} is a LoRA and not a checkpoint; merge it into SVD, and build the merged weights")
    if not have("first_stage_model.") and (network := _network_alone(names)) is not None:
        raise CheckpointError(f"{path} is {network}")
    if have("diffusion_model.") and not have("time_stack"):
        raise CheckpointError(
            f"{path} is a diffusion model for pictures: its UNet has no layers over time; give svd.safetensors or "
            "svd_xt.safetensors"
        )
    decoder = [name for name in names if name.startswith("first_stage_model.decoder.")]
    if decoder and not any("time_stack" in name or "time_mix_conv" in name for name in decoder):
        raise CheckpointError(
            f"{path} has the decoder of pictures, which flickers, as svd_image_decoder.safetensors and "
            "svd_xt_image_decoder.safetensors do; give the file without image_decoder in its name"
        )


def _network_alone(names: Collection[str]) -> str | None:
    """What a file is that has one of the networks, and what to do with it; None for anything else."""
    copy = "copy the folder of the checkpoint that it belongs to, put this file there as"
    if "conv_in.weight" in names and "time_embedding.linear_1.weight" in names:
        return f"a UNet alone; {copy} unet/diffusion_pytorch_model.safetensors, and build the folder"
    if "encoder.conv_in.weight" in names and any(name.startswith("decoder.up_blocks.") for name in names):
        return f"a VAE alone; {copy} vae/diffusion_pytorch_model.safetensors, and build the folder"
    if any(name.startswith("vision_model.") for name in names):
        return f"an image encoder alone; {copy} image_encoder/model.safetensors, and build the folder"
    for prefix in ("", "diffusion_model.", "model.diffusion_model.", "model_ema.diffusion_model."):
        if f"{prefix}input_blocks.0.0.weight" in names:
            return (
                "a UNet alone, in stabilityai's names; copy its tensors over those of model.diffusion_model. in a "
                "whole file, svd.safetensors or svd_xt.safetensors, and build that file"
            )
    return None
