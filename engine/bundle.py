"""A bundle on disk, opened and checked."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from svd_trt.engine.kernels import KernelList, read_kernels
from svd_trt.engine.manifest import MANIFEST_NAME, NOT_JSON, FileEntry, Manifest, NetworkEntry, read_manifest, sha256_of
from svd_trt.engine.manifest_check import find_contradiction
from svd_trt.engine.rebuild import rebuild_command
from svd_trt.engine.spec import NETWORKS, NetworkName
from svd_trt.errors import BundleError, first_line

__all__ = ["Bundle"]


class Bundle:
    """The four networks of a checkpoint, ready to run: a directory that `svd_trt.build_bundle` wrote.

    Attributes:
        path: the directory.
        manifest: the content of its ``manifest.json``.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Bundle:
        """Read the manifest and check that every file is there, complete and unaltered.

        Args:
            path: the bundle's directory.
            verify: compare the sha256 of every file, which reads all of the bundle; otherwise only sizes are compared.

        Raises:
            BundleError: there is no bundle, or it is incomplete, altered or of another schema; the message says what
                to run.
        """
        directory = Path(path)
        bundle = cls(directory, read_manifest(directory))
        missing = [name for name in NETWORKS if name not in bundle.manifest.networks]
        if missing:
            raise BundleError(f"{directory} lacks {', '.join(missing)}; {bundle._repair()}")
        if (problem := find_contradiction(bundle.manifest)) is not None:
            raise BundleError(f"{directory / MANIFEST_NAME} contradicts itself: {problem}; {bundle._repair()}")
        bundle._check_files(verify=verify)
        return bundle

    def network(self, name: NetworkName) -> NetworkEntry:
        """The entry of network ``name``."""
        return self.manifest.networks[name]

    def onnx_path(self, name: NetworkName) -> Path:
        """The ONNX graph of network ``name``; its weights are in the same folder."""
        return self.path / self.network(name).onnx.graph.path

    def plan_path(self, name: NetworkName) -> Path | None:
        """The TensorRT plan of network ``name``; None if the bundle has no engines."""
        plan = self.network(name).plan
        return self.path / plan.file.path if plan else None

    def kernels(self, name: NetworkName) -> KernelList | None:
        """The kernels in the plan of network ``name``; None if there is no plan or it has no list.

        Raises:
            BundleError: the list is damaged, or was altered since the build.
        """
        plan = self.network(name).plan
        if plan is None or plan.kernels is None:
            return None
        problem = self._problem(plan.kernels, verify=True)
        if problem:
            raise BundleError(f"{problem}; {self._repair()}")
        try:
            return read_kernels(self.path / plan.kernels.path)
        except (BundleError, *NOT_JSON) as error:
            raise BundleError(f"{first_line(error)}; {self._repair()}") from error

    def _check_files(self, *, verify: bool) -> None:
        # Hashing releases the interpreter lock, so threads hash files in parallel.
        pool = ThreadPoolExecutor(max_workers=4)
        try:
            for problem in pool.map(lambda file: self._problem(file, verify=verify), self.manifest.files):
                if problem:
                    raise BundleError(f"{problem}; {self._repair()}")
        finally:
            pool.shutdown(cancel_futures=True)  # after a problem, files that are still queued are not hashed

    def _repair(self) -> str:
        return f"to repair it, run {rebuild_command(self.manifest, self.path)}"

    def _problem(self, file: FileEntry, *, verify: bool) -> str | None:
        path = self.path / file.path
        try:
            size = path.stat().st_size
            if size != file.size:
                return f"{path} is truncated or altered ({size} bytes, {file.size} were written)"
            if verify and sha256_of(path) != file.sha256:
                return f"{path} was altered since it was built"
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
        return None
