"""The README claims to have run on exactly the GPUs that there are records of."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOTHING = "**No engine of this project has run on a GPU yet.**"


def test_readme_names_the_gpus_of_the_records() -> None:
    readme = (ROOT / "README.md").read_text()
    records = [json.loads(p.read_text()) for p in (ROOT / "benchmarks" / "results").glob("gpu-tests-*.json")]
    gpus = {gpu.partition(",")[0] for record in records for gpu in record["machine"]["gpu"]}
    assert (NOTHING in readme) == (not gpus)
    assert all(gpu in readme for gpu in gpus)


SPEEDS = {
    "diffusers, eager": "diffusers-eager",
    "diffusers, torch.compile": "diffusers-compile",
    "svd-trt, ONNX Runtime": "svd-trt-onnxruntime",
    "svd-trt's networks, OpenVINO": "openvino",
}


def test_speeds_in_the_readme_are_those_of_the_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "bench-mid-cpu.json").read_text())
    contenders = {contender["name"]: contender for contender in record["contenders"]}
    readme = (ROOT / "README.md").read_text()
    for title, name in SPEEDS.items():
        found = contenders[name]
        psnr = "identical" if found["psnr_db"] >= 200 else f"{found['psnr_db']:.1f} dB"
        speedup = found["spread"]["ratio_to_eager"]["median"]
        assert f"| {title} | {found['total_s']:.1f} s | {speedup:.2f} | {psnr} |" in readme
