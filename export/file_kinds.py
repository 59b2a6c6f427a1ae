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
    """True if the file is a pickle, as torch writes it with ``torch.save`` in either of its formats.

    Raises:
        CheckpointError: the file cannot be read; the message says what to do.
    """
    start = _start_of(path)
    # The protocol is the second byte. In a safetensors file the two are a part of a size, before a brace.
    if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5") and start[_SIZE : _SIZE + 1] != b"{":
        return True
    if start[:2] != b"PK":
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except Exception:  # on damaged archives zipfile raises nearly anything, UnicodeDecodeError included
        return False


def _start_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_START)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and path.is_symlink():  # as in a hub's cache that was cleaned
            reason = "it is a link to a file that is gone; download it again"
        elif isinstance(error, IsADirectoryError):
            reason = "it is a folder; put the file of that name there"
        else:
            reason = f"{error.strerror or error}; check its path and its permissions"
        raise CheckpointError(f"{path} cannot be read: {reason}") from error


def refuse_other_files(path: Path) -> None:
    """Refuse what is not a whole safetensors file.

    Raises:
        CheckpointError: the file is empty, cut off, a pointer, a web page, an archive, a pickle, or of another format;
            the message says what to do.
    """
    start = _start_of(path)
    size = path.stat().st_size
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
        if start[:1] == b"\x80" and start[1] > 3:  # torch's weights-only reader stops at its first operations
            raise CheckpointError(
                f"{path} is a pickle of protocol {start[1]}, which only a reader that runs its code can read; save the "
                "weights as safetensors where it was made"
            )
        raise CheckpointError(f"{path} is a pickle and not safetensors; convert it: `{_conversion(path)}`")
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
    return f'python -c "{_CONVERT}" {shlex.join([str(path), str(_free(path, "converted"))])}'


def _free(path: Path, word: str) -> Path:
    """The name of a safetensors file beside ``path`` that does not exist yet: with its stem, or ``word`` after it."""
    names = (path.stem, f"{path.stem}-{word}", *(f"{path.stem}-{word}-{number}" for number in range(2, 1000)))
    paths = [path.with_name(f"{name}.safetensors") for name in names]
    return next((free for free in paths if not free.exists()), paths[-1])


def _refuse_damaged(path: Path, size: int, start: bytes) -> None:
    header = int.from_bytes(start[:_SIZE], "little")
    if size < _SIZE or header > _MOST_HEADER or start[_SIZE : _SIZE + 1] not in (b"{", b""):
        raise CheckpointError(f"{path} is not a safetensors file, or is damaged; download or save it again")
    if size < _SIZE + header:
        raise CheckpointError(f"{path} is cut off in its header, after {format_bytes(size)}; download or save it again")
    try:
        with path.open("rb") as file:
            fields = json.loads(file.read(_SIZE + header)[_SIZE:])
        ends = [entry["data_offsets"][1] for name, entry in fields.items() if name[:2] != "__"]
        whole = _SIZE + header + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file, or is damaged: {first_line(error)}; download or save it again"
        ) from error
    if not ends:
        raise CheckpointError(f"{path} has no tensors; download or save it again")
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
        raise CheckpointError(
            f"{path} is a LoRA and not a checkpoint; build the checkpoint that it was trained on with --lora "
            f"{shlex.quote(str(path))}"
        )
    if not have("first_stage_model.") and (network := _network_alone(path, names)) is not None:
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


def _network_alone(path: Path, names: Collection[str]) -> str | None:
    """What a file is that has one of the networks, and what to do with it; None for anything else."""
    copy = "copy the folder of the checkpoint that it belongs to, put this file there as"
    if "conv_in.weight" in names and "time_embedding.linear_1.weight" in names:
        return f"a UNet alone; build the checkpoint that it was trained from with --unet {shlex.quote(str(path))}"
    if "encoder.conv_in.weight" in names and any(name.startswith("decoder.up_blocks.") for name in names):
        return f"a VAE alone; {copy} vae/diffusion_pytorch_model.safetensors, and build the folder"
    if any(name.startswith("vision_model.") for name in names):
        return f"an image encoder alone; {copy} image_encoder/model.safetensors, and build the folder"
    for prefix in ("", "diffusion_model.", "model.diffusion_model.", "model_ema.diffusion_model."):
        if f"{prefix}input_blocks.0.0.weight" in names:
            return f"a UNet alone; build the checkpoint that it was trained from with --unet {shlex.quote(str(path))}"
    return None
