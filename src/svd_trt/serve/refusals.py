"""Errors as the API answers them: ``{"error": {"type", "message", "field", "limit"}}``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, Self, TypeAlias

from svd_trt.errors import ArgumentError, BudgetError, CancelledError, ImageError, SvdTrtError
from svd_trt.runtime.parameters import Parameters
from svd_trt.serve.words import api_words

__all__ = ["ErrorType", "RequestError", "error_object", "refused"]

ErrorType: TypeAlias = Literal[
    "invalid_request", "not_found", "unauthorized", "queue_full", "too_large", "cancelled", "server_error"
]
Limit: TypeAlias = Mapping[str, Any] | int | float | None


class RequestError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: of HTTP.
        error: the object for the client.
        headers: to answer with.
    """

    def __init__(
        self,
        status: int,
        kind: ErrorType,
        message: str,
        *,
        field: str | None = None,
        limit: Limit = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error = error_object(kind, message, field, limit)
        self.headers = dict(headers or {})

    @classmethod
    def of(cls, status: int, error: Mapping[str, Any]) -> Self:
        """An error whose object is made already."""
        return cls(status, error["type"], error["message"], field=error["field"], limit=error["limit"])


def error_object(kind: ErrorType, message: str, field: str | None = None, limit: Limit = None) -> dict[str, Any]:
    """What answers, and jobs that failed, say of an error."""
    return {"type": kind, "message": message, "field": field, "limit": limit}


def refused(error: Exception, limits: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The error object of an exception of the pipeline, in the pipeline's own words.

    Args:
        error: anything that the pipeline raised.
        limits: of the arguments, by name.
    """
    message = api_words(str(error)) or type(error).__name__
    if isinstance(error, CancelledError):
        return error_object("cancelled", message)
    if isinstance(error, ImageError):
        return error_object("invalid_request", message, "image")
    if isinstance(error, ArgumentError | BudgetError | TypeError):
        field = _named(message)
        return error_object("invalid_request", message, field, _limit(limits.get(field or "")))
    if isinstance(error, SvdTrtError):
        return error_object("server_error", message)
    return error_object("server_error", "the server failed while it made this video; its log says why")


def _limit(described: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a client needs of the limits of an argument."""
    if described is None:
        return None
    return {name: described[name] for name in ("min", "max", "multiple", "choices") if described.get(name) is not None}


def _named(message: str) -> str | None:
    """The first argument that a message names; pictures are the argument ``image``."""
    names = [*Parameters.fields(), "image"]
    found = re.search(rf"(?<![\w-])({'|'.join(names)})(?![\w-])", message)
    return found[1] if found else None
