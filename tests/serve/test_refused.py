"""What clients send wrongly: an answer below 500 that names the field and the limit, and a server that goes on."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import sqlite3
import struct
import time
import zlib
from typing import Any

import httpx
import PIL.Image
import pytest

from svd_trt.runtime.samplers import SAMPLERS
from svd_trt.serve.application import build_application
from svd_trt.serve.service import Service
from tests.serve.conftest import FAST, Served, error_of


def png_of(width: int, height: int) -> bytes:
    """A PNG whose head tells a size, of a few bytes: a bomb if somebody believes it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("fields", "field", "words", "limit"),
    [
        (
            {"num_frames": 9},
            "num_frames",
            "num_frames 9 is outside what this bundle was built for",
            {"min": 2, "max": 8},
        ),
        ({"num_frames": "many"}, "num_frames", "num_frames must be a whole number, not 'many'", {"min": 2, "max": 8}),
        ({"fps": 0}, "fps", "fps must be 1 to 1000, not 0", {"min": 1, "max": 1000}),
        ({"noise_aug_strength": "nan"}, "noise_aug_strength", "must be a number, not nan", {"min": 0, "max": 100}),
        ({"num_inference_steps": 101}, "num_inference_steps", "at most 100 on this server", {"min": 1, "max": 100}),
        (
            {"num_frames": 8, "extend": 300},
            "extend",
            "at most 250 frames on this server, not 308",
            {"min": 0, "max": 249},
        ),
        ({"num_videos_per_prompt": 2}, "num_videos_per_prompt", "at most 1 on this server", {"min": 1, "max": 1}),
        ({"seed": "1,2"}, "seed", "seed must be a whole number, not '1,2'", {"min": 0, "max": 2**64 - 1}),
        ({"sampler": "best"}, "sampler", "sampler must be one of", {"choices": list(SAMPLERS)}),
        ({"height": 36}, "height", "height 36 is outside", {"min": 32, "max": 32, "multiple": 8}),
        ({"background": "mud"}, "background", "background must be an opaque colour", {}),
        ({"deep_every": 2}, "deep_every", "needs a shallow denoiser", {"min": 1, "max": 1}),
        ({"steps": 3}, "steps", "use num_inference_steps=", None),
        ({"stepz": 3}, "stepz", "there is no field 'stepz'; fields are image, model, background", None),
        ({"output_type": "np"}, "output_type", "there is no field 'output_type'; fields are image, model", None),
        ({"model": "other"}, "model", "there is no model 'other'", None),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_arguments_are_refused_in_the_words_of_the_pipeline(
    served: Served, png: bytes, fields: dict[str, Any], field: str, words: str, limit: dict[str, Any] | None
) -> None:
    error = error_of(served.post(png, **fields), 400, "invalid_request")
    assert words in error["message"]
    assert error["field"] == field
    assert error["limit"] == limit
    error_of(served.post(png, **fields, stream="true"), 400, "invalid_request")  # before the first byte of a stream


@pytest.mark.parametrize(
    ("picture", "status", "words"),
    [
        (b"", 400, "the picture is empty"),
        (b"no picture", 400, "it is not a picture in a format that Pillow knows"),
        (png_of(8_000, 8_000), 413, "8,000x8,000 pixels, and this server takes at most 40 M"),
        (png_of(100_000, 100_000), 413, "more than 179 M pixels, and this server takes at most 40 M"),
        (png_of(40, 40)[:60], 400, "cannot read the picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", 400, "it is EPS"),
    ],
    ids=["empty", "text", "large", "bomb", "truncated", "eps"],
)
def test_pictures_are_refused(served: Served, picture: bytes, status: int, words: str) -> None:
    error = error_of(served.post(picture), status, "invalid_request" if status == 400 else "too_large")
    assert words in error["message"]
    assert error["field"] == "image"


def test_forms_are_refused(served: Served, png: bytes) -> None:
    def sent(**request: Any) -> httpx.Response:
        return served.client.post("/v1/videos", **request)

    file = ("p.png", png)
    assert "multipart/form-data" in error_of(sent(json={"image": "x"}), 415, "invalid_request")["message"]
    for url in ("http://localhost/p.png", "/etc/passwd", "data:image/png;base64,AAAA"):
        error = error_of(sent(files={"x": (None, "1")}, data={"image": url}), 400, "invalid_request")
        assert "must be a file in the form" in error["message"]
    assert "send a file as image" in error_of(sent(files={"seed": (None, "1")}), 400, "invalid_request")["message"]
    both = sent(files=[("image", file), ("input_reference", file)])
    twice = error_of(both, 400, "invalid_request")
    assert (twice["message"], twice["field"]) == ("input_reference was given twice; give it once", "input_reference")
    seed = error_of(sent(files=[("image", file), ("seed", file)]), 400, "invalid_request")
    assert (seed["message"], seed["field"]) == (
        "seed is a file; the picture is image, and other fields are text",
        "seed",
    )
    twice = sent(files=[("image", file), ("seed", (None, "1")), ("seed", (None, "2"))])
    assert error_of(twice, 400, "invalid_request")["field"] == "seed"
    error_of(sent(files={"image": file, "mask": file}), 400, "invalid_request")
    error_of(sent(files={"image": file, **{f"x{n}": (None, "1") for n in range(100)}}), 400, "invalid_request")
    error_of(sent(files={"image": file}, data={"sampler": "x" * 70_000}), 400, "invalid_request")
    boundary = {"Content-Type": "multipart/form-data"}
    error_of(sent(content=b"no boundary", headers=boundary), 400, "invalid_request")
    assert served.wait(sent(files={"input_reference": file}, data=FAST).json()["id"])["status"] == "completed"


def test_addresses_and_queries_are_refused(served: Served) -> None:
    get = served.client.get
    for path in ("/v1/videos/vid_0", f"/v1/videos/vid_{'0' * 32}", "/v1/videos/..%2f..%2fetc", "/v1/nothing", "/docs"):
        error_of(get(path), 404, "not_found")
    for query in ({"limit": 0}, {"limit": 101}, {"limit": "x"}, {"after": "x"}):
        error = error_of(get("/v1/videos", params=query), 400, "invalid_request")
        assert error["field"] == next(iter(query))
    most = error_of(get("/v1/videos", params={"limit": 101}), 400, "invalid_request")
    assert (most["message"], most["limit"]) == ("limit: input should be less than or equal to 100", {"max": 100})
    removed = error_of(get("/v1/videos", params={"after": f"vid_{'0' * 32}"}), 400, "invalid_request")
    assert removed["field"] == "after"
    for path in ("/", "/healthz", "/readyz"):
        answer = served.client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
    error_of(served.client.put("/v1/videos"), 405, "invalid_request")


def test_content_of_a_video_that_is_not_finished_is_a_conflict(served: Served, png: bytes) -> None:
    job = served.accepted(png, num_inference_steps=50)
    error = error_of(served.client.get(f"/v1/videos/{job['id']}/content"), 409, "invalid_request")
    assert "exists once it is completed" in error["message"]
    served.client.delete(f"/v1/videos/{job['id']}")
    error_of(served.client.get(f"/v1/videos/{job['id']}/content"), 409, "invalid_request")


def test_pages_of_other_sites_are_refused(served: Served, png: bytes) -> None:
    for site in ("cross-site", "same-site"):
        error_of(served.client.get("/v1/videos", headers={"Sec-Fetch-Site": site}), 403, "unauthorized")
    error_of(served.client.get("/v1/videos", headers={"Host": "evil.example:80"}), 403, "unauthorized")
    own = str(served.client.base_url).rstrip("/")
    for origin, status in {
        own: 200,
        own.upper(): 200,
        "https://proxy.example": 200,
        "http://localhost:1": 403,
        "http://evil.example": 403,
        "null": 403,
    }.items():
        assert served.client.get("/v1/videos", headers={"Origin": origin}).status_code == status, origin
    answer = served.client.options("/v1/videos", headers={"Origin": "http://a", "Access-Control-Request-Method": "GET"})
    assert "access-control-allow-origin" not in answer.headers
    for host in ("proxy.example", "localhost:1", "127.0.0.1", "[::1]:80"):
        assert served.client.get("/healthz", headers={"Host": host}).status_code == 200


def test_answers_have_safe_headers(served: Served) -> None:
    for path in ("/v1/models", "/", "/nothing"):
        headers = served.client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert "server" not in headers


def test_an_answer_of_500_has_safe_headers_and_is_counted(service: Service) -> None:
    """The jobs cannot be read any more."""
    with sqlite3.connect(service.store.folder / "jobs.sqlite3") as rows:
        rows.execute("ALTER TABLE jobs RENAME TO gone")

    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(build_application(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/v1/videos")

    answer = asyncio.run(asked())
    assert error_of(answer, 500, "server_error")["message"] == "the server failed; its log says why"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    with sqlite3.connect(service.store.folder / "jobs.sqlite3") as rows:
        rows.execute("ALTER TABLE gone RENAME TO jobs")
    assert 'svd_trt_refused_requests_total{type="server_error"} 1.0' in service.metrics.text().decode()


def test_a_picture_that_is_stretched_is_accepted_with_a_warning(served: Served) -> None:
    file = io.BytesIO()
    PIL.Image.new("RGB", (80, 20)).save(file, "PNG")
    job = served.accepted(file.getvalue(), **FAST)
    assert ["is stretched to 32x32" in warning for warning in job["warnings"]] == [True]
    assert served.accepted(file.getvalue(), **FAST, resize_mode="crop")["warnings"] == []
    assert served.wait(job["id"])["warnings"] == job["warnings"]


def test_uploads_are_bounded_in_bytes_and_time(served: Served, png: bytes) -> None:
    server = served
    error = error_of(server.post(b"x" * 200_000), 413, "too_large")
    assert error["limit"] == 100_000
    host, port = server.client.base_url.host, server.client.base_url.port
    assert port is not None
    head = f"POST /v1/videos HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer secret\r\n"
    head += "Content-Type: multipart/form-data; boundary=b\r\n"
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="p"\r\n\r\n'
    # Without a length, so that only what arrives is known.
    with socket.create_connection((host, port), timeout=30) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        connection.sendall(f"{len(part):x}\r\n".encode() + part + b"\r\n" + b"20000\r\n" + b"x" * 0x20000 + b"\r\n")
        assert connection.recv(20).startswith(b"HTTP/1.1 413")
    # Too slow, which is noticed while the client is silent.
    with socket.create_connection((host, port), timeout=30) as connection:
        connection.sendall(f"{head}Content-Length: 5000\r\n\r\n".encode() + part)
        assert connection.recv(20).startswith(b"HTTP/1.1 408")
    # Cut short, and no HTTP at all.
    with socket.create_connection((host, port), timeout=30) as connection:
        connection.sendall(f"{head}Content-Length: 5000\r\n\r\n".encode() + part + png[:100])
    with socket.create_connection((host, port), timeout=30) as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
        answer = connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 400")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request"
    time.sleep(0.2)
    assert server.wait(server.accepted(png, **FAST)["id"])["status"] == "completed"
    assert list((served.data / "pictures").iterdir()) == []


def test_a_key_is_needed_if_one_is_set(served: Served, png: bytes) -> None:
    address = served.client.base_url
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "secret"},
        {"Authorization": "Bearer \xe9"},
    ):
        for path in ("/v1/videos", "/v1/models", "/metrics", "/openapi.json"):
            sent = {name: value.encode("latin-1") for name, value in headers.items()}
            answer = httpx.get(f"{address}{path}", headers=sent)
            assert answer.headers["www-authenticate"] == "Bearer"
            words = "the key is wrong" if headers else "this server needs a key"
            assert words in error_of(answer, 401, "unauthorized")["message"]
    error_of(httpx.post(f"{address}/v1/videos", files={"image": ("p", png)}), 401, "unauthorized")
    assert httpx.get(f"{address}/healthz").status_code == 200
    assert served.client.get("/v1/models").status_code == 200
