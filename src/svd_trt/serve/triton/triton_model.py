"""The model that Triton's Python backend runs; ``1/model.py`` in a model repository imports it.

Triton starts one process for each instance, which opens the bundle beside ``model.py`` once and makes one video at a
time. Requests wait in Triton's own queue meanwhile.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from svd_trt.errors import ArgumentError, BudgetError, CancelledError, ImageError, SvdTrtError, first_line
from svd_trt.runtime.decode import Frames
from svd_trt.runtime.output import VideoStream
from svd_trt.runtime.pipeline import VideoPipeline
from svd_trt.serve.triton.triton_tensors import DETAILS, FRAME, INDEX, TOTAL, Array, read_request
from svd_trt.serve.words import api_words

__all__ = ["BUNDLE", "TritonVideoModel"]

BUNDLE = "bundle"
"""The name of the bundle beside ``model.py``."""

_SECONDS_BETWEEN_LOOKS = 0.05

_log = logging.getLogger("svd_trt")


class TritonVideoModel:
    """What Triton's Python backend expects of a ``TritonPythonModel``, for one instance."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle.

        Args:
            args: of Triton: the folder and version of the model, its configuration as JSON, and the instance's device.

        Raises:
            SvdTrtError: the bundle cannot be opened; Triton then refuses to load the model, with the message.
        """
        self._triton: Any = importlib.import_module("triton_python_backend_utils")  # exists in Triton's process alone
        given = json.loads(args["model_config"])["parameters"]
        options = {key: field["string_value"] for key, field in given.items()}
        on_gpu = args["model_instance_kind"] == "GPU"
        budget = options.get("vram_budget")
        self._pipe = VideoPipeline.open(
            Path(args["model_repository"]) / args["model_version"] / BUNDLE,
            device=f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu",
            provider=options.get("provider"),  # the pipeline checks it
            vram_budget=None if budget is None else int(budget),
        )

    def execute(self, requests: Sequence[Any]) -> None:
        """Make the video of each request, and send its frames as they are decoded."""
        for request in requests:
            sender = request.get_response_sender()
            error = None
            try:
                self._answer({tensor.name(): tensor.as_numpy() for tensor in request.inputs()}, sender)
            except SvdTrtError as raised:
                error = self._triton.TritonError(api_words(str(raised)), self._code_of(raised))
            except Exception as raised:
                _log.exception("a video could not be made")
                error = self._triton.TritonError(f"svd-trt failed: {first_line(raised)}; see Triton's log")
            if error is not None:
                sender.send(self._triton.InferenceResponse(error=error))
            sender.send(flags=self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self) -> None:
        """Free networks and device."""
        self._pipe.close()

    def _answer(self, tensors: Mapping[str, Array], sender: Any) -> None:
        picture, arguments = read_request(tensors)
        with _warnings() as warnings:
            stream = self._pipe.stream(picture, **arguments)
            with _cancelling(stream, sender):
                for index, frame in enumerate(stream):
                    sender.send(self._response(stream, index, frame, warnings))

    def _response(self, stream: VideoStream, index: int, frame: Frames, warnings: list[str]) -> Any:
        details = json.dumps({"arguments": stream.parameters.as_dict(), "warnings": warnings})
        outputs = {
            FRAME: np.ascontiguousarray(frame),
            INDEX: np.array([index], np.int32),
            TOTAL: np.array([stream.parameters.total_frames], np.int32),
            DETAILS: np.array([details.encode()], np.object_),
        }
        return self._triton.InferenceResponse([self._triton.Tensor(name, value) for name, value in outputs.items()])

    def _code_of(self, error: SvdTrtError) -> Any:
        codes = self._triton.TritonError
        if isinstance(error, ArgumentError | ImageError | BudgetError):
            return codes.INVALID_ARG
        return codes.CANCELLED if isinstance(error, CancelledError) else codes.UNAVAILABLE


@contextlib.contextmanager
def _cancelling(stream: VideoStream, sender: Any) -> Iterator[None]:
    """End ``stream`` when the client cancels its request or goes away, which Triton only tells those who ask."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_SECONDS_BETWEEN_LOOKS):
            if sender.is_cancelled():
                stream.cancel()
                return

    thread = threading.Thread(target=look, name="svd-trt cancellation", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        stream.close()


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """What svd-trt logs while the block runs, such as that a picture is stretched; an instance makes one video."""
    messages: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(api_words(record.getMessage()))

    handler = Handler(logging.WARNING)
    _log.addHandler(handler)
    try:
        yield messages
    finally:
        _log.removeHandler(handler)
