"""Calls that make several videos: what is measured of them, and what the documents say of that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from svd_trt import Bundle
from svd_trt.benchmarks.batch_calls import measure_batches

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_videos_alone_and_together_are_measured(dynamic_bundle: Bundle) -> None:
    found = measure_batches(dynamic_bundle.path, 1, steps=1)
    assert set(found["videos_per_second"]) == {"1", "2"}
    assert (found["frames"], found["steps"], found["size"]) == (9, 1, (72, 96))
    assert found["levels"] <= 1
    expected = found["videos_per_second"]["2"] / found["videos_per_second"]["1"]
    assert abs(found["ratio"] - expected) < 0.01 * expected


def test_figures_are_those_of_the_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "batch-calls.json").read_text())
    text = " ".join((ROOT / "docs" / "serving.md").read_text().split())
    rates = record["videos_per_second"]
    assert f"{rates['2']:.2f} videos a second in calls of two, and {rates['1']:.2f} in calls of one" in text
    assert f"by the processors' time that is {record['processor_ratio']:.2f} times as many" in text
