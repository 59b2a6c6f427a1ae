"""The probe of a GPU: its processes and records, and every step as far as it goes on a CPU."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import onnxruntime
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from svd_trt.benchmarks import probe_engines, probe_rtx
from svd_trt.benchmarks.gpu_probe import main, run_step
from svd_trt.benchmarks.probe_process import unmet
from svd_trt.benchmarks.probe_steps import FULL, STEPS, ProbeError, ProbeJob, SkippedError, Step
from svd_trt.engine.decode_chunks import chunk_choices
from svd_trt.engine.spec import NETWORKS, Range
from tests.benchmarks import probe_cases
from tests.standin.cuda import StandInCuda

ROOT = Path(__file__).parents[2]


def case(function: Any, seconds: int = 60, needs: Any = (), **arguments: Any) -> Step:
    return Step(function.__name__, "a case", needs, seconds, f"{function.__module__}:{function.__name__}", arguments)


def record_of(step: Step, tmp_path: Path, seconds: float = 60) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The record of ``step``, and what was written before it was complete."""
    written: list[dict[str, Any]] = []
    job = ProbeJob(work=str(tmp_path), dry_run=True)
    record = run_step(step, job, seconds, lambda entry: written.append(json.loads(json.dumps(entry))))
    assert written[-1] == record
    return record, written


@pytest.fixture(autouse=True)
def from_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes find this folder's modules."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("step", "outcome", "reason", "figures"),
    [
        (case(probe_cases.passes, value=3), "passed", None, {"first": 3, "second": True}),
        (case(probe_cases.fails), "failed", "it is wrong", {"first": 1}),
        (case(probe_cases.breaks), "failed", "RuntimeError: nobody expected it", {}),
        (case(probe_cases.skips), "skipped", "not here", {}),
        (case(probe_cases.passes, needs=("bundle",)), "skipped", "it needs the step `bundle`, or --bundle: there", {}),
        (case(probe_cases.crashes), "crashed", "the step crashed (SIGSEGV)", {"first": 1}),
    ],
    ids=lambda value: value.name if isinstance(value, Step) else None,
)
def test_every_end_of_a_step_is_a_record(
    step: Step, outcome: str, reason: str | None, figures: dict[str, Any], tmp_path: Path
) -> None:
    record, written = record_of(step, tmp_path)
    assert record["outcome"] == outcome
    assert (record["reason"] or "").startswith(reason or "")
    assert record["figures"] == figures
    assert record["limit"] == 60
    assert written[0]["outcome"] == "crashed", "a probe that is killed has said so already"


def test_a_step_over_its_limit_ends_and_keeps_its_figures(tmp_path: Path) -> None:
    record, _ = record_of(case(probe_cases.hangs), tmp_path, seconds=4)
    assert (record["outcome"], record["reason"]) == ("timeout", "it ran longer than 4 s")
    assert record["figures"] == {"first": 1}


def probe(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)


def test_the_list_names_every_step_and_what_it_needs() -> None:
    listed = probe("--list").output
    for step in STEPS:
        assert step.name in listed
        assert step.what in listed
        module, _, function = step.place.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
    assert len({step.name for step in STEPS}) == len(STEPS)
    assert probe("--list", "--step", "rtx").output.count("capability") == 5


def test_records_are_added_to_the_file_and_missing_leaves_them_out(tmp_path: Path) -> None:
    common = ("--dry-run", "--work", tmp_path, "-o", tmp_path / "record.json")
    assert "passed" in probe(*common, "--step", "rtx-8.9").output
    first = json.loads((tmp_path / "record.json").read_bytes())
    assert first["dry_run"] is True
    assert first["steps"]["rtx-8.9"]["figures"]["plan_bytes"] > 100_000
    assert first["steps"]["rtx-8.9"]["commit"] == first["machine"]["commit"]
    more = probe(*common, "--step", "rtx-8.9", "--step", "driver", "--missing").output
    assert "rtx-8.9:" not in more
    both = json.loads((tmp_path / "record.json").read_bytes())
    assert list(both["steps"]) == ["rtx-8.9", "driver"]
    assert both["steps"]["rtx-8.9"] == first["steps"]["rtx-8.9"]
    refused = CliRunner().invoke(main, ["--work", str(tmp_path), "-o", str(tmp_path / "record.json")])
    assert "is no record of such a probe" in str(refused.exception)


def entry_of(outcome: str, reason: str | None = None, **figures: Any) -> dict[str, Any]:
    return {"outcome": outcome, "reason": reason, "seconds": 1.0, "figures": figures}


def test_missing_runs_what_was_skipped_or_stopped_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step needs can come later, and a machine can go away in the middle of a step."""
    left = {
        "rtx-8.0": entry_of("passed", tensorrt="tensorrt-rtx 1.7"),
        "torch-denoiser": entry_of("crashed", "the probe was stopped"),
        "torch-decoder": entry_of("crashed", "the step crashed (SIGSEGV)"),
        "engine-video": entry_of("skipped", "it needs the step `bundle`, or --bundle: there is none yet"),
    }
    content = {"benchmark": "gpu-probe", "dry_run": True, "steps": left}
    (tmp_path / "record.json").write_bytes(json.dumps(content).encode())
    jobs: dict[str, ProbeJob] = {}

    def run(step: Step, job: ProbeJob, seconds: float, update: Any) -> dict[str, Any]:
        jobs[step.name] = job
        return entry_of("passed")

    monkeypatch.setattr("svd_trt.benchmarks.gpu_probe.run_step", run)
    chosen = [word for name in left for word in ("--step", name)]
    probe("--dry-run", "--work", tmp_path, "-o", tmp_path / "record.json", "--missing", *chosen)
    assert list(jobs) == ["torch-denoiser", "engine-video"]
    assert jobs["engine-video"].rtx_runs


def test_a_bundle_that_cannot_run_here_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = ProbeJob(work=str(tmp_path))
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", StandInCuda(capability=(9, 0)))
    with pytest.raises(SkippedError, match=r"TensorRT for RTX serves sm75, .*, and this GPU is sm90; try --backend"):
        probe_engines.build(job, lambda **_: None)
    assert probe_engines._unserved(msgspec.structs.replace(job, rtx_runs=True)) is None
    assert probe_engines._unserved(msgspec.structs.replace(job, backend="tensorrt")) is None
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", StandInCuda(capability=(8, 9)))
    assert probe_engines._unserved(job) is None


def test_tensorrt_takes_no_capability(tmp_path: Path) -> None:
    job = ProbeJob(work=str(tmp_path), backend="tensorrt", dry_run=True)
    for target in ("current", "8.9"):
        with pytest.raises(SkippedError, match="takes no compute capability"):
            probe_rtx.run_small_engine(job, lambda **_: None, target=target)


def test_decodes_have_the_default_chunk() -> None:
    assert FULL.chunk == chunk_choices(FULL.frames, 1, Range(1, FULL.chunk, 25), 14)[0]


def test_a_step_that_would_be_cut_short_waits_for_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 70))  # every look at the clock finds that 70 s have passed
    monkeypatch.setattr("svd_trt.benchmarks.gpu_probe.time.monotonic", lambda: float(next(clock)))
    started: list[tuple[str, float]] = []

    def run(step: Step, job: ProbeJob, seconds: float, update: Any) -> dict[str, Any]:
        started.append((step.name, seconds))
        return {"outcome": "passed", "reason": None, "seconds": 1.0, "figures": {}}

    monkeypatch.setattr("svd_trt.benchmarks.gpu_probe.run_step", run)
    chosen = ("--step", "rtx-8.0", "--step", "bundle", "--step", "rtx-8.9", "--step", "torch-denoiser")
    said = probe("--dry-run", "--work", tmp_path, "--limit", "400", *chosen).output
    assert started == [("rtx-8.0", 120), ("rtx-8.9", 120)]
    assert "2 steps did not fit into --limit; go on with --missing" in said
    started.clear()
    probe("--dry-run", "--work", tmp_path, "--limit", "2000", "--step", "bundle")
    probe("--dry-run", "--work", tmp_path, "--limit", "10000", "--step", "bundle")
    assert started == [("bundle", 580), ("bundle", 580)]


def test_an_unknown_step_is_refused_with_the_list() -> None:
    refused = CliRunner().invoke(main, ["--step", "nonsense"])
    assert "there is no step 'nonsense'; choose one of rtx-unset, " in str(refused.exception)
    assert "or a group: rtx, driver, " in str(refused.exception)


def run_here(name: str, job: ProbeJob) -> dict[str, Any]:
    """The figures of the step ``name``, run in this process."""
    step = next(step for step in STEPS if step.name == name)
    module, _, function = step.place.partition(":")
    figures: dict[str, Any] = {}
    with torch.no_grad():
        getattr(importlib.import_module(module), function)(job, lambda **more: figures.update(more), **step.arguments)
    return figures


@pytest.fixture
def job(small_bundle: Path, small_checkpoint: Path, tmp_path: Path) -> ProbeJob:
    return ProbeJob(work=str(tmp_path), bundle=str(small_bundle), model=str(small_checkpoint), dry_run=True)


def test_the_provider_is_looked_for_before_a_bundle_is_built_for_it() -> None:
    assert unmet("provider", ProbeJob(work="", dry_run=True)) is None
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        reason = unmet("provider", ProbeJob(work=""))
        assert reason is not None
        assert "CPUExecutionProvider" in reason


def test_denoisers_race_and_agree(job: ProbeJob) -> None:
    figures = run_here("torch-denoiser", job)
    assert set(figures["median_ms"]) == set(figures["speedup"]) == {"diffusers", "rewritten"}
    assert figures["speedup"]["diffusers"] == 1.0
    assert 0 < figures["relative_error"]["diffusers"] < 0.2


def test_decoders_race_and_agree(job: ProbeJob) -> None:
    assert run_here("torch-decoder", job)["levels_rewritten"]["mean"] < 0.5


def test_attention_with_large_scores(job: ProbeJob) -> None:
    errors = run_here("torch-scores", job)["relative_error"]
    assert len(errors) == 6
    assert all(found["bounded"] is not None for found in errors.values())


@pytest.mark.parametrize("step", ["engine-chunk-25", "engine-denoiser", "engine-video"])
def test_steps_with_a_bundle(step: str, job: ProbeJob) -> None:
    figures = run_here(step, job)
    assert figures["backend"] == "onnxruntime (CPU)"
    if step == "engine-video":
        found = {layer["network"] for layer in figures["slowest_layers"]}
        assert "denoiser" in found
        assert found <= set(NETWORKS), "which ones are slow depends on the machine's load"
        assert figures["second_median_step"] > 0


@pytest.mark.parametrize("step", ["torch-denoiser", "chunk-8"])
def test_a_network_that_is_wrong_fails(step: str, job: ProbeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    from svd_trt.benchmarks import probe_torch

    make = probe_torch.make_network

    def wrong(*arguments: Any, **options: Any) -> nn.Module:
        made = make(*arguments, **options)
        for module in made.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(1.5)
        return made

    monkeypatch.setattr(probe_torch, "make_network", wrong)
    with pytest.raises(ProbeError, match=r"farther from fp32|frames by rewritten are wrong"):
        run_here(step, job)


def test_a_network_that_does_not_fit_is_left_out(job: ProbeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    from svd_trt.benchmarks import probe_torch

    class TooLarge(nn.Module):
        def forward(self, **_: Any) -> None:
            torch.empty(1 << 60)  # a GPU without enough memory raises a kind of RuntimeError, a CPU only that

    monkeypatch.setattr(torch, "OutOfMemoryError", RuntimeError)
    monkeypatch.setattr(probe_torch, "make_network", lambda *_, **__: TooLarge())
    figures = run_here("torch-denoiser", job)
    assert "allocate memory" in figures["out_of_memory"]["rewritten"]
    assert set(figures["median_ms"]) == set(figures["relative_error"]) == {"diffusers"}


def test_the_small_engine_is_compared_with_the_right_thing() -> None:
    x = torch.randn(3, probe_rtx.CHANNELS, probe_rtx.SIDE, probe_rtx.SIDE)
    weights = {name: torch.from_numpy(values).float() for name, values in probe_rtx._weights().items()}
    tokens = nn.functional.conv2d(x, weights["conv"], padding=1).flatten(2).transpose(1, 2)
    scores = (tokens @ weights["query"]) @ (tokens @ weights["key"]).transpose(1, 2)
    expected = torch.softmax(scores, -1) @ tokens
    torch.testing.assert_close(torch.from_numpy(probe_rtx.reference(x.numpy())), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_dry_run_executes_every_step(
    tmp_path: Path, small_bundle: Path, small_checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It builds a bundle, whose networks the cache has, runs the tests of a GPU, which are skipped, and compiles."""
    monkeypatch.setenv("SVD_TRT_CACHE", str(cache))
    result = probe("--dry-run", "--work", tmp_path, "-o", tmp_path / "record.json", "--model", small_checkpoint)
    steps = json.loads((tmp_path / "record.json").read_bytes())["steps"]
    assert set(steps) == {step.name for step in STEPS}, result.output
    outcomes = {name: (record["outcome"], record["reason"]) for name, record in steps.items()}
    for name in ("rtx-current", "driver", "gpu-tests"):
        assert outcomes.pop(name)[0] in ("skipped", "passed")
    assert {outcome for outcome, _ in outcomes.values()} == {"passed"}, outcomes
