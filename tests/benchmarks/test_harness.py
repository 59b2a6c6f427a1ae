"""``svd-trt bench`` on the tests' checkpoint and bundle, in real processes, one of them broken. No time is asserted."""

from __future__ import annotations

import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from svd_trt import Bundle
from svd_trt.benchmarks.contender_process import ContenderError, ContenderProcess, Loaded, Measurement
from svd_trt.benchmarks.contenders import CONTENDERS, Contender, Job, choose_contenders
from svd_trt.benchmarks.harness import Bench
from svd_trt.benchmarks.results import STAGES, ContenderResult, Result, Workload, encode_result, read_result, write_file
from svd_trt.benchmarks.workload import BundleKind, Bundles
from svd_trt.errors import ArgumentError, BenchmarkError, OutputError
from svd_trt.export.fidelity import draw_picture
from svd_trt.progress import ignore_progress
from tests.cli.conftest import invoke
from tests.conftest import Once

NAMES = ["svd-trt-onnxruntime", "svd-trt-onnxruntime-plain", "svd-trt-onnxruntime-cuda"]
SMALL = ["--num-frames", "2", "--height", "64", "--width", "64", "--num-inference-steps", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def folder(once: Once, checkpoint: Path, dynamic_bundle: Bundle) -> Path:
    """What a run of two rounds wrote: diffusers, svd-trt, a contender with a damaged bundle, one that cannot run."""
    return once("bench", lambda work: run_bench(work, checkpoint, dynamic_bundle))


def run_bench(work: Path, checkpoint: Path, dynamic_bundle: Bundle) -> None:
    work.mkdir()
    damaged = work / "damaged"
    shutil.copytree(dynamic_bundle.path, damaged)
    (damaged / "onnx" / "denoiser.onnx").write_bytes(b"x")
    output = work / "output"
    output.mkdir()
    given = ["--bundle", dynamic_bundle.path, "--model", checkpoint, *SMALL, "--cache", work / "cache"]
    names = [argument for name in NAMES for argument in ("--contender", name)]
    inner = Bundles.get

    def get(bundles: Bundles, kind: BundleKind) -> tuple[Path, float | None]:
        return (damaged, 1.5) if kind == "plain" else inner(bundles, kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bundles, "get", get)
        files = ["-o", output / "result.json", "--markdown", output / "result.md"]
        found = invoke("bench", *given, *names, "--rounds", "2", *files, "--json")
    assert found.returncode == 0, found.stderr
    (work / "printed.json").write_text(found.stdout)


@pytest.fixture(scope="module")
def result(folder: Path) -> Result:
    return read_result(folder / "output" / "result.json")


def named(result: Result, name: str) -> ContenderResult:
    return next(c for c in result.contenders if c.name == name)


def test_files_and_output(folder: Path, result: Result) -> None:
    printed = json.loads((folder / "printed.json").read_text())
    assert printed["schema"] == 1
    assert printed["threads"] == result.threads == 1
    assert [c["name"] for c in printed["contenders"]] == ["diffusers-eager", *NAMES]
    assert result.peak is not None
    assert str(folder) not in result.command
    assert "| svd-trt-onnxruntime |" in (folder / "output" / "result.md").read_text()
    left = sorted(p.name for p in (folder / "output").iterdir())
    assert left == ["result.json", "result.md"], "nothing is left over"


def test_what_works_is_measured_in_full(result: Result) -> None:
    for name in ("diffusers-eager", "svd-trt-onnxruntime"):
        c = named(result, name)
        assert c.skipped is None
        assert [r.round for r in c.rounds] == [0, 1]
        for r in c.rounds:
            assert len(r.steps) == result.workload.steps
            assert set(r.stages) == set(STAGES)
            assert all(seconds > 0 for seconds in (*r.steps, *r.stages.values()))
            assert sum(r.steps) <= r.stages["denoise"] * 1.001
            assert r.stages["denoise"] < r.total_s
        spread = c.spread
        assert spread is not None
        assert (c.step_s, c.total_s, c.ratio_to_eager) == (
            spread.step_s.median,
            spread.total_s.median,
            spread.ratio_to_eager.median,
        )
        for measured in (
            spread.step_s,
            spread.total_s,
            spread.ratio_to_eager,
            spread.step_ratio_to_eager,
            *spread.stages.values(),
        ):
            assert 0 < measured.low <= measured.median <= measured.high
        for seconds in (c.import_s, c.load_s, c.warmup_s, c.startup_s):
            assert seconds is not None
            assert seconds > 0
        assert c.step_flops_per_s is not None
        assert c.step_flops_per_s > 0
        assert c.peak_vram is None
        assert c.energy_j is None


def test_fidelity_is_that_of_the_same_video(result: Result) -> None:
    eager, ours = named(result, "diffusers-eager"), named(result, "svd-trt-onnxruntime")
    assert eager.psnr_db == 200
    assert ours.fidelity is not None
    assert ours.psnr_db == ours.fidelity.worst_psnr_db == min(ours.fidelity.psnr_db) >= 50
    assert len(ours.fidelity.psnr_db) == len(ours.fidelity.ssim) == result.workload.frames == 2
    assert ours.fidelity.worst_ssim > 0.99


def test_what_does_not_work_is_recorded_and_the_run_goes_on(result: Result) -> None:
    broken = named(result, "svd-trt-onnxruntime-plain")
    assert broken.skipped is not None
    assert "denoiser.onnx is truncated or altered" in broken.skipped
    assert "\n" not in broken.skipped
    absent = named(result, "svd-trt-onnxruntime-cuda")
    assert absent.skipped is not None
    for c in (broken, absent):
        assert c.total_s is None
        assert c.rounds == []


def test_overhead_is_a_part_of_the_step(result: Result) -> None:
    ours = named(result, "svd-trt-onnxruntime")
    assert ours.spread is not None
    assert ours.host_overhead_s is not None
    assert 0 < ours.host_overhead_s < ours.spread.step_s.high
    assert named(result, "diffusers-eager").host_overhead_s is None


def test_the_file_reads_back_strictly(result: Result) -> None:
    again = msgspec.json.decode(encode_result(result), type=Result, strict=True)
    assert [c.name for c in again.contenders] == [c.name for c in result.contenders]
    assert again.machine["cpu"] == result.machine["cpu"]


def workload_of(model: Path) -> Workload:
    return Workload(
        model=str(model),
        precision="fp32",
        frames=2,
        height=64,
        width=64,
        steps=1,
        decode_chunk_size=2,
        seed=7,
    )


def bench_of(tmp_path: Path, workload: Workload, bundle: Path, start: Any = None) -> Bench:
    """diffusers and svd-trt; ``start`` replaces the method that starts a process."""
    picture = tmp_path / "picture.png"
    draw_picture(workload.height, workload.width).save(picture)
    bench = Bench(
        workload=workload,
        contenders=choose_contenders(["svd-trt-onnxruntime"]),
        rounds=2,
        threads=1,
        work=tmp_path,
        picture=picture,
        bundles=Bundles(workload, tmp_path, bundle, ignore_progress),
        command="svd-trt bench",
        gpu=False,
        progress=ignore_progress,
    )
    if start is not None:
        bench.start = start  # type: ignore[method-assign]
    return bench


def test_a_baseline_that_fails_ends_the_run(tmp_path: Path, small_bundle: Path) -> None:
    def start(*_: object, **__: object) -> ContenderProcess:
        raise ContenderError("out of memory")

    bench = bench_of(tmp_path, workload_of(tmp_path), small_bundle, start)
    with pytest.raises(
        BenchmarkError, match="the baseline run, diffusers-eager, failed: out of memory; --decode-chunk"
    ):
        bench.run(lambda _: None)


@pytest.mark.parametrize("where", ["build", "load"])
def test_a_main_contender_that_fails_ends_the_run_early(
    where: str, tmp_path: Path, small_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is for it, so its reason is reported before minutes are spent on the others."""
    started: list[str] = []

    class Idle:
        loaded, started_s = Loaded(import_s=1, load_s=1), 1.0

        def make_video(self, *_: Any) -> Measurement:
            return Measurement(
                total_s=1,
                stages={},
                steps=[1],
                first_step_s=1,
                host_s=None,
                load_s=0,
                peak_rss=1,
                peak_vram=None,
                energy_j=None,
            )

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None: ...

    def start(contender: Contender, *_: object, **__: object) -> Any:
        started.append(contender.name)
        if contender.kind == "svd-trt":
            raise ContenderError("the network is damaged")
        return Idle()

    def get(bundles: Bundles, kind: BundleKind) -> tuple[Path, float | None]:
        if where == "build":
            raise OutputError("the folder was removed by another program")
        return small_bundle, None

    monkeypatch.setattr(Bundles, "get", get)
    bench = bench_of(tmp_path, workload_of(tmp_path), small_bundle, start)
    bench.contenders = choose_contenders(["svd-trt-onnxruntime", "svd-trt-onnxruntime-plain"])
    reason = {"build": "its bundle was not built: the folder was removed", "load": "the network is damaged"}[where]
    with pytest.raises(BenchmarkError, match=f"svd-trt-onnxruntime, which this run is for, cannot .*: {reason}"):
        bench.run(lambda _: None)
    assert started == {"build": [], "load": ["diffusers-eager", "svd-trt-onnxruntime"]}[where]


def test_two_runs_may_write_the_same_file(tmp_path: Path) -> None:
    """Neither removes what the other is about to move into place."""

    def write(content: bytes) -> None:
        for _ in range(200):
            write_file(tmp_path / "result.json", content)

    with ThreadPoolExecutor(2) as threads:
        for written in [threads.submit(write, content) for content in (b"one", b"two")]:
            written.result()
    assert (tmp_path / "result.json").read_bytes() in (b"one", b"two")
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_without_a_reference_and_with_a_contender_that_dies(
    tmp_path: Path, checkpoint: Path, dynamic_bundle: Bundle
) -> None:
    """For an fp16 video the frames in fp32 are made by another process, which may run out of memory."""
    processes: dict[str, ContenderProcess] = {}
    workload = msgspec.structs.replace(workload_of(checkpoint), precision="fp16")

    def start(contender: Contender, workload: Workload, bundle: Path | None, *, exact: bool = False) -> Any:
        if exact:
            raise ContenderError("out of memory")
        processes[contender.name] = Bench.start(bench, contender, workload, bundle)
        return processes[contender.name]

    bench = bench_of(tmp_path, workload, dynamic_bundle.path, start)
    kept: list[Result] = []

    def keep(result: Result) -> None:
        kept.append(result)
        if len(kept) == 1:
            os.kill(processes["svd-trt-onnxruntime"].pid, signal.SIGKILL)

    assert bench.run(keep) == kept[-1]
    first, last = kept
    assert [len(r.contenders[0].rounds) for r in kept] == [1, 2], "kept after every round"
    assert [c.skipped for c in first.contenders] == [None, None]
    assert [c.psnr_db for c in first.contenders] == [None, None]
    assert first.notes == ["frames were not compared: the reference in fp32 failed: out of memory"]
    died = last.contenders[1].skipped
    assert died is not None
    assert died.startswith("failed in round 2: it was killed, most likely because memory ran out")


def test_a_contender_that_does_not_answer_is_killed(tmp_path: Path) -> None:
    job = Job(
        contender="diffusers-eager", workload=workload_of(tmp_path), picture="", bundle=None, threads=1, gpu=False
    )
    with pytest.raises(ContenderError, match=r"no answer within 0\.1 s; --timeout"):
        ContenderProcess(job, tmp_path / "log", timeout=0.1)


def test_names() -> None:
    assert [c.name for c in choose_contenders(["openvino"])] == ["diffusers-eager", "openvino"]
    assert [c.name for c in choose_contenders([])] == [c.name for c in CONTENDERS]
    assert len({c.name for c in CONTENDERS}) == len(CONTENDERS)
    (same,) = (c for c in choose_contenders([], precision="fp16") if c.name == "svd-trt-onnxruntime-portable")
    assert "the same as svd-trt-onnxruntime" in str(same.obstacle())
    with pytest.raises(ArgumentError, match="no contender is called 'svd'; choose from: diffusers-eager, "):
        choose_contenders(["svd"])
