"""The harness on the tests' checkpoint and bundle: real processes, one of them broken. No time is asserted."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

from svd_trt import Bundle
from svd_trt.benchmarks.bundles import Bundles
from svd_trt.benchmarks.contender_process import ContenderError, Worker
from svd_trt.benchmarks.contenders import CONTENDERS, BundleKind, Entrant, choose
from svd_trt.benchmarks.harness import Bench
from svd_trt.benchmarks.protocol import Job
from svd_trt.benchmarks.resources import peak_rss
from svd_trt.benchmarks.results import encode_result
from svd_trt.benchmarks.schema import STAGES, Contender, Result, Subject
from svd_trt.errors import ArgumentError, BenchmarkError
from svd_trt.export.fidelity import draw_picture

pytestmark = pytest.mark.xdist_group("dynamic")


def subject_of(model: Path | str) -> Subject:
    return Subject(
        model=str(model),
        precision="fp32",
        frames=2,
        height=64,
        width=64,
        steps=2,
        decode_chunk_size=2,
        seed=7,
        step_flops=1e9,
    )


@dataclass
class _Given(Bundles):
    """Bundles that are there already."""

    paths: dict[BundleKind, Path] | None = None

    def get(self, kind: BundleKind) -> tuple[Path, float | None]:
        assert self.paths is not None
        return self.paths[kind], 1.5


def bench_of(tmp_path: Path, model: Path | str, entrants: list[Entrant], paths: dict[BundleKind, Path]) -> Bench:
    subject = subject_of(model)
    picture = tmp_path / "picture.png"
    draw_picture(subject.height, subject.width).save(picture)
    return Bench(
        subject=subject,
        entrants=entrants,
        rounds=2,
        threads=1,
        work=tmp_path,
        picture=picture,
        bundles=_Given(subject, tmp_path, None, lambda _: None, paths=paths),
        command="svd-trt bench",
        gpu=False,
        report=lambda *_: None,
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, dynamic_bundle: Bundle) -> Result:
    """Two rounds of diffusers, ours, one whose bundle is damaged, and one that cannot run here."""
    work = tmp_path_factory.mktemp("bench")
    damaged = work / "damaged"
    shutil.copytree(dynamic_bundle.path, damaged)
    (damaged / "onnx" / "denoiser.onnx").write_bytes(b"x")
    names = ["svd-trt-onnxruntime", "svd-trt-onnxruntime-plain", "svd-trt-onnxruntime-cuda"]
    bench = bench_of(work, checkpoint, choose(names), {"default": dynamic_bundle.path, "plain": damaged})
    kept: list[Result] = []
    assert bench.run(kept.append) == kept[-1]
    assert [len(r.contenders[0].rounds) for r in kept] == [1, 2], "kept after every round"
    return kept[-1]


def named(result: Result, name: str) -> Contender:
    return next(c for c in result.contenders if c.name == name)


def test_what_works_is_measured_in_full(result: Result) -> None:
    for name in ("diffusers-eager", "svd-trt-onnxruntime"):
        c = named(result, name)
        assert c.skipped is None
        assert [r.round for r in c.rounds] == [0, 1]
        for r in c.rounds:
            assert len(r.steps) == result.subject.steps
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
    assert len(ours.fidelity.psnr_db) == len(ours.fidelity.ssim) == result.subject.frames
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


def test_a_baseline_that_fails_ends_the_run(tmp_path: Path) -> None:
    bench = bench_of(tmp_path, tmp_path / "none", choose(["diffusers-eager"]), {})
    with pytest.raises(BenchmarkError, match="diffusers-eager failed"):
        bench.run(lambda _: None)


def test_a_worker_that_dies_says_so(tmp_path: Path, checkpoint: Path) -> None:
    job = Job(
        contender="diffusers-eager", subject=subject_of(checkpoint), picture="", bundle=None, threads=1, gpu=False
    )
    with Worker(job, tmp_path / "log") as worker:
        worker._process.kill()
        with pytest.raises(ContenderError, match="memory ran out"):
            worker.make(tmp_path / "video.mp4")


def test_a_worker_that_says_nothing_is_given_up(tmp_path: Path, checkpoint: Path) -> None:
    job = Job(
        contender="diffusers-eager", subject=subject_of(checkpoint), picture="", bundle=None, threads=1, gpu=False
    )
    with pytest.raises(ContenderError, match=r"no answer within 0.5 s; --timeout"):
        Worker(job, tmp_path / "log", timeout=0.5)


def test_a_worker_ends_with_the_harness(tmp_path: Path, checkpoint: Path) -> None:
    """Killed outright, it can tell nobody, and a video may take minutes."""
    job = Job(
        contender="diffusers-eager", subject=subject_of(checkpoint), picture="", bundle=None, threads=1, gpu=False
    )
    code = (
        "import sys, time, msgspec; from pathlib import Path; from svd_trt.benchmarks.contender_process import Worker;"
        "from svd_trt.benchmarks.protocol import Job;"
        "worker = Worker(msgspec.json.decode(sys.argv[1], type=Job), Path(sys.argv[2]));"
        "print(worker._process.pid, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, msgspec.json.encode(job).decode(), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as harness:
        assert harness.stdout is not None
        worker = int(harness.stdout.readline())
        harness.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(worker).wait(60)
    assert not psutil.pid_exists(worker)


def test_without_a_reference_all_else_is_measured(tmp_path: Path, checkpoint: Path, dynamic_bundle: Bundle) -> None:
    """The fp32 frames are made for an fp16 video by another process, which may run out of memory."""
    bench = bench_of(tmp_path, checkpoint, choose(["svd-trt-onnxruntime"]), {"default": dynamic_bundle.path})
    bench = replace(bench, rounds=1, subject=msgspec.structs.replace(bench.subject, precision="fp16"))
    inner = bench.start

    def start(entrant: Entrant, subject: Subject, bundle: Path | None, *, exact: bool = False) -> Worker:
        if exact:
            raise ContenderError("out of memory")
        return inner(entrant, subject, bundle, exact=exact)

    bench.start = start  # type: ignore[method-assign]
    made = bench.run(lambda _: None)
    assert [c.skipped for c in made.contenders] == [None, None]
    assert [c.psnr_db for c in made.contenders] == [None, None]
    assert made.notes == ["frames were not compared: the reference in fp32 failed: out of memory"]


def test_names() -> None:
    assert [e.name for e in choose(["openvino"])] == ["diffusers-eager", "openvino"]
    assert [e.name for e in choose([])] == [e.name for e in CONTENDERS]
    assert len({e.name for e in CONTENDERS}) == len(CONTENDERS)
    (same,) = (e for e in choose([], precision="fp16") if e.name == "svd-trt-onnxruntime-portable")
    assert "the same as svd-trt-onnxruntime" in str(same.obstacle())
    with pytest.raises(ArgumentError, match="no contender is called 'svd'; choose from: diffusers-eager, "):
        choose(["svd"])


def test_memory_is_the_process_s_own() -> None:
    """Linux lets ru_maxrss begin with that of the process before; a child of a large one would seem large."""
    large = np.ones(300_000_000, np.uint8)
    code = "from svd_trt.benchmarks.resources import peak_rss; print(peak_rss())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert 1e6 < int(found.stdout) < large.nbytes < peak_rss()
