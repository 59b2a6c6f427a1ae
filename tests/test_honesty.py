"""The README claims to have run on exactly the GPUs that there are records of."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOTHING = "**Nothing here has run on a GPU yet**"


def test_readme_names_the_gpus_of_the_records() -> None:
    readme = (ROOT / "README.md").read_text()
    records = [json.loads(p.read_text()) for p in (ROOT / "benchmarks" / "results").glob("gpu-tests-*.json")]
    gpus = {gpu.partition(",")[0] for record in records for gpu in record["machine"]["gpu"]}
    assert (NOTHING in readme) == (not gpus)
    assert all(gpu in readme for gpu in gpus)
