"""The figures of docs/embedding.md are those of the record."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOSTS = {"C++": "C++, `svd_trt_cli`", "Python": "Python, `svd-trt infer`"}


def test_figures_are_those_of_the_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "cpp-host.json").read_text())
    text = (ROOT / "docs" / "embedding.md").read_text()
    for host, title in HOSTS.items():
        found = record["hosts"][host]
        seconds = " | ".join(f"{found[key]:.1f} s" for key in ("first_frame_s", "total_s", "processor_s"))
        assert f"| {title} | {seconds} | {found['peak_bytes'] / 1e6:.0f} MB |" in text
