"""A checkpoint whose UNet is another one, or has LoRAs merged into it: ``svd-trt build --unet`` and ``--lora``."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

import svd_trt.export.lora as lora_module
import svd_trt.export.other_unet as unet_module
from svd_trt.engine.manifest import LoraInfo, sha256_of
from svd_trt.export.checkpoint import Checkpoint, Component, describe
from svd_trt.export.code_digest import digest_of
from svd_trt.export.folder import FolderCheckpoint
from svd_trt.export.lora import check_lora, find_lora, merge_lora
from svd_trt.export.other_unet import OtherUnet, find_unet, original_modules
from svd_trt.export.random_source import RandomCheckpoint
from svd_trt.export.single_file import SingleFileCheckpoint
from svd_trt.export.tensor_files import to_weight

__all__ = ["ChangedCheckpoint", "change_unet"]

_log = logging.getLogger("svd_trt")


class ChangedCheckpoint(Checkpoint, frozen=True, kw_only=True, tag="changed UNet"):
    """A checked checkpoint with a checked UNet of its own, or with checked LoRAs, or with both."""

    base: FolderCheckpoint | SingleFileCheckpoint | RandomCheckpoint
    unet: OtherUnet | None
    loras: tuple[LoraInfo, ...]

    def check(self, component: Component) -> None:
        """See `Checkpoint.check`; `change_unet` has done it for the UNet that is not the checkpoint's own."""
        if component != "unet" or self.unet is None:
            self.base.check(component)

    def load(self, component: Component, dtype: Any) -> Any:
        """See `Checkpoint.load`; LoRAs are merged in fp32."""
        import torch

        from svd_trt.export.random_checkpoint import parameters_of

        if component != "unet":
            return self.base.load(component, dtype)
        first = torch.float32 if self.loras else dtype
        model = self.base.load("unet", first) if self.unet is None else self.unet.load(self.configurations, first)
        aliases = self._aliases(model) if self.loras else {}
        for lora in self.loras:
            merge_lora(model, lora, aliases)
        for module, name, _ in list(parameters_of(model)):  # diffusers' own to() warns
            setattr(module, name, to_weight(getattr(module, name), dtype, name))
        return model

    def check_loras(self) -> None:
        """Compare the LoRAs' names and shapes with the UNet's, and log which tensors are left out.

        Raises:
            CheckpointError: see `svd_trt.export.lora.check_lora`.
        """
        from svd_trt.export.random_checkpoint import empty_model

        model = empty_model("unet", self.configurations["unet"])
        shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        for lora in self.loras:
            if left := check_lora(Path(str(lora.path)), shapes, self._aliases(model)):
                _log.warning(
                    "%s: %d tensors of text encoders, such as %s, are left out: SVD has none",
                    lora.model,
                    len(left),
                    left[0],
                )

    def _aliases(self, model: Any) -> dict[str, str]:
        return original_modules(self.configurations, [name for name, _ in model.named_parameters()])


def change_unet(
    base: FolderCheckpoint | SingleFileCheckpoint | RandomCheckpoint,
    unet: str | None,
    loras: Sequence[str],
    *,
    variant: str | None,
    local_files_only: bool,
) -> ChangedCheckpoint:
    """Put another UNet into ``base``, or LoRAs, and check that they fit.

    Args:
        base: the checkpoint.
        unet: see `svd_trt.export.other_unet.find_unet`; None keeps the checkpoint's own.
        loras: ``FILE`` or ``FILE:SCALE`` each; they add up.
        variant: of ``unet``, if it has it.
        local_files_only: never download ``unet``.

    Raises:
        CheckpointError: one does not exist, is damaged, or is of another architecture.
    """
    found, info = (None, None) if unet is None else find_unet(unet, variant, local_files_only)
    merged = tuple(find_lora(text) for text in loras)
    configurations, description = base.configurations, base.description
    if found is not None:
        found.check(configurations)
        if found.config is not None and "num_frames" in found.config:
            own = configurations["unet"] | {"num_frames": found.config["num_frames"]}
            configurations = configurations | {"unet": own}
            description = describe(found.where, configurations)
    source = base.source
    changed = ChangedCheckpoint(
        description=description,
        source=msgspec.structs.replace(
            source,
            digests=source.digests | {"unet": _digest(base, found, configurations["unet"], merged)},
            files={name: files for name, files in source.files.items() if name != "unet" or found is None},
            unet=info,
            loras=merged,
        ),
        parameters=base.parameters,
        configurations=configurations,
        base=base,
        unet=found,
        loras=merged,
    )
    changed.check_loras()
    return changed


def _digest(
    base: FolderCheckpoint | SingleFileCheckpoint | RandomCheckpoint,
    unet: OtherUnet | None,
    configuration: dict[str, Any],
    loras: Sequence[LoraInfo],
) -> str:
    """Of all that the UNet's weights depend on: files, configuration, LoRAs with scales, and the code that reads."""
    weights = [base.source.digests["unet"]] if unet is None else [sha256_of(Path(file)) for file in unet.files]
    merged = [[lora.digest, lora.scale] for lora in loras]
    code = digest_of(Path(str(module.__file__)) for module in (unet_module, lora_module))
    return hashlib.sha256(json.dumps([code, weights, configuration, merged], sort_keys=True).encode()).hexdigest()
