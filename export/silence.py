"""Keep libraries from printing between the messages of svd-trt."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["silence_libraries"]

_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Silence warnings about missing torchvision and deprecated internals, and the libraries' progress bars.

    Errors are still raised. The settings are restored afterwards, since the process is the caller's.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    levels = [(logging.getLogger(name), logging.getLogger(name).level) for name in _LOGGERS]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    for logger, _ in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)
        for library, verbosity, bars in before:
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
