"""`svd_trt.benchmarks.serve_load` with a real server."""

from __future__ import annotations

from pathlib import Path

import pytest

from svd_trt import Bundle
from svd_trt.benchmarks.serve_load import measure_serving
from svd_trt.errors import BenchmarkError


@pytest.mark.slow
def test_a_measurement_has_every_way_and_the_memory(tiny_bundle: Bundle, picture_file: Path) -> None:
    found = measure_serving(tiny_bundle.path, picture_file, rounds=2)
    assert len(found["start_to_ready_s"]) == 5
    for ways in found["seconds"].values():
        assert {way: len(seconds) for way, seconds in ways.items()} == {
            "pipeline": 2,
            "pipeline and files": 2,
            "request": 2,
        }
        assert all(seconds > 0 for times in ways.values() for seconds in times)
    assert found["memory_bytes"]["server, after the videos"] > found["memory_bytes"]["server, opened"] > 0


def test_a_server_that_does_not_start_is_an_error_with_its_words(tmp_path: Path, picture_file: Path) -> None:
    with pytest.raises(BenchmarkError, match=f"the server did not start: .*{tmp_path.name}"):
        measure_serving(tmp_path, picture_file, rounds=1)
