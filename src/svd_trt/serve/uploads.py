"""Reading the body of a request: bounded in bytes and in time, while it arrives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import BinaryIO

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

from svd_trt.serve.limits import Limits
from svd_trt.serve.refusals import RequestError
from svd_trt.units import format_bytes

__all__ = ["Body", "discard", "read_form"]

_FIELDS = 60
_FILES = 2  # one too many is told apart from a form that cannot be read
_DISCARD_SECONDS = 2.0
_FIELD_BYTES = 65_536
_PICTURE = ("image", "input_reference")


@asynccontextmanager
async def read_form(request: Request, body: Body, limits: Limits) -> AsyncIterator[tuple[BinaryIO, dict[str, str]]]:
    """Read a multipart form, which ``body`` receives: the file of its picture, and its other fields.

    The file is on disk if it is large, so that many requests do not fill the memory with pictures.

    Raises:
        RequestError: it is too large, too slow, cut short, no form, or without a picture.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise RequestError(
            415, "invalid_request", "the body must be a form of the type multipart/form-data, with the picture as image"
        )
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limits.upload_bytes:
        raise _too_large(limits)
    bounded = Request(request.scope, body)
    try:
        async with asyncio.timeout(limits.upload_seconds):
            form = await bounded.form(max_files=_FILES, max_fields=_FIELDS, max_part_size=_FIELD_BYTES)
    except TimeoutError:
        raise RequestError(
            408,
            "invalid_request",
            f"the request did not arrive within {limits.upload_seconds:g} s; send it again, or a smaller picture",
            limit=limits.upload_seconds,
        ) from None
    except ClientDisconnect:
        raise RequestError(
            400, "invalid_request", "the client closed the connection before its form was read"
        ) from None
    except HTTPException as error:  # of the form's parser
        raise RequestError(400, "invalid_request", f"the form cannot be read: {error.detail}") from error
    try:
        yield _parts(form)
    finally:
        await form.close()


def _parts(form: FormData) -> tuple[BinaryIO, dict[str, str]]:
    picture: BinaryIO | None = None
    fields: dict[str, str] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile) and name not in _PICTURE:
            raise RequestError(
                400,
                "invalid_request",
                f"{name[:100]} is a file; the picture is image, and other fields are text",
                field=name[:100],
            )
        if name in fields or (name in _PICTURE and picture is not None):
            raise RequestError(400, "invalid_request", f"{name[:100]} was given twice; give it once", field=name[:100])
        if isinstance(value, UploadFile):
            picture = value.file
        else:
            fields[name] = value
    if picture is None:
        named = next((name for name in _PICTURE if name in fields), None)
        if named is not None:
            raise RequestError(
                400,
                "invalid_request",
                f"{named} must be a file in the form; paths and URLs are not read by a server",
                field=named,
            )
        raise RequestError(400, "invalid_request", "the form has no picture; send a file as image", field="image")
    return picture, fields


class Body:
    """Receives the body of a request, and refuses it when it grows beyond the limit."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive = receive
        self._limits = limits
        self._count = 0
        self._complete = False

    async def __call__(self) -> Message:
        message = await self._receive()
        self._complete = not message.get("more_body", False)
        self._count += len(message.get("body", b""))
        if self._count > self._limits.upload_bytes:
            raise _too_large(self._limits)
        return message

    async def discard(self) -> None:
        """Read the rest, so that the client reads why it was refused."""
        if not self._complete:
            await discard(self._receive)


async def discard(receive: Receive) -> None:
    """Read a body that nobody wants, for a while: a connection that is closed before that loses its answer."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            while (await receive()).get("more_body", False):
                pass


def _too_large(limits: Limits) -> RequestError:
    return RequestError(
        413,
        "too_large",
        f"the request has more than {format_bytes(limits.upload_bytes)}, the most that this server takes; "
        "send a smaller picture",
        field="image",
        limit=limits.upload_bytes,
        headers={"Connection": "close"},
    )
