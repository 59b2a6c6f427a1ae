"""``svd-trt bench quality``: what it measures, its files, and its picture."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
from matplotlib.text import Annotation

from svd_trt import VideoPipeline
from svd_trt.benchmarks import quality
from svd_trt.benchmarks.quality import (
    Point,
    QualityResult,
    default_variants,
    evaluations_of,
    read_clips,
    read_quality,
    with_frontier,
)
from svd_trt.benchmarks.quality_plot import draw_quality
from svd_trt.benchmarks.quality_report import BEGIN, END, quality_section
from svd_trt.benchmarks.report import with_section
from svd_trt.errors import ArgumentError, ImageError, ResultError
from svd_trt.export.fidelity import psnr
from svd_trt.runtime.parameters import Parameters
from svd_trt.runtime.quality_presets import QUALITIES
from tests.cli.conftest import invoke

ROOT = Path(__file__).parent.parent.parent
SIGMAS = (700.0, 100.0, 10.0, 1.0, 0.0)


def settings(**changes: Any) -> Any:
    fields = {"sigmas": SIGMAS, "guidance_interval": None, "guidance_shape": "linear", "deep_every": 1}
    return SimpleNamespace(**fields | {"min_guidance_scale": 1.0, "max_guidance_scale": 3.0} | changes)


def test_a_step_with_guidance_is_two_evaluations() -> None:
    assert evaluations_of(settings()) == 8
    assert evaluations_of(settings(max_guidance_scale=1.0)) == 4
    assert evaluations_of(settings(guidance_interval=(0.0, 50.0))) == 6
    assert evaluations_of(settings(deep_every=2), 0.25) == 2 * (1 + 0.25 + 1 + 0.25)
    assert evaluations_of(settings(deep_every=2, max_guidance_scale=1.0), 0.25) == 1 + 0.25 + 1 + 0.25


def point(evaluations: float, error: float, series: str = "s", label: str = "1", level: float = 40.0) -> Point:
    return Point(
        series=series,
        label=label,
        arguments={},
        evaluations=evaluations,
        seconds=1.0,
        denoise_seconds=0.9,
        error=error,
        psnr_db=level,
        least_psnr_db=level - 3,
    )


def test_the_frontier_has_the_points_that_none_beats() -> None:
    """A point is beaten by one with no more evaluations and no larger error. Equal points do not beat each other."""
    points = [point(50, 0.02), point(40, 0.03), point(40, 0.02), point(10, 0.05), point(10, 0.05), point(8, 0.06)]
    found = [p.frontier for p in with_frontier(points)]
    assert found == [False, False, True, True, True, True]


def result(points: list[Point], *, truth: bool = True) -> QualityResult:
    return QualityResult(
        date="2026-01-02T03:04:05+00:00",
        command="svd-trt bench quality bundle",
        machine={"cpu": "A CPU", "commit": "abc", "svd_trt": "0", "packages": {"onnxruntime": "1"}},
        backend="onnxruntime (CPU)",
        model="m",
        precision="fp32",
        frames=8,
        height=32,
        width=32,
        pictures=3,
        seed=0,
        truth=truth,
        reference={"num_inference_steps": 50},
        reference_error=0.028,
        points=with_frontier(points),
    )


@pytest.mark.parametrize("truth", [True, False])
def test_labels_overlap_neither_each_other_nor_leave_the_axes(truth: bool) -> None:
    """Points that are close together, as those of good samplers are, and one with a long name at the edge."""
    points = [point(n, 0.028 + d / 1e5, f"series {d}", str(n // 2), 50 + d / 9) for n in (10, 16, 20) for d in range(5)]
    figure = draw_quality(result([*points, point(50, 0.06, "", "--num-inference-steps 25 --guidance-interval 0,50")]))
    figure.canvas.draw()
    assert len(figure.axes) == 2
    for axes in figure.axes:
        labels = [child for child in axes.get_children() if isinstance(child, Annotation)]
        assert len(labels) == 16
        boxes = [label.get_window_extent() for label in labels]
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
        frame = axes.get_window_extent()
        assert all(frame.x0 - 1 <= box.x0 and box.x1 <= frame.x1 + 1 for box in boxes)


def test_without_true_clips_there_is_one_panel() -> None:
    assert len(draw_quality(result([point(8, 0.1)], truth=False)).axes) == 1
    assert len(draw_quality(result([])).axes) == 2, "an empty result is drawn too"


def test_every_default_variant_is_of_arguments_that_exist() -> None:
    variants = default_variants()
    assert len({variant.name for variant in variants}) == len(variants) > 10
    for variant in variants:
        Parameters(**variant.arguments)
    assert {label.partition(" ")[2] for label in (variant.label for variant in variants)} >= set(QUALITIES)


def test_a_bundle_with_shallow_steps_has_variants_of_them() -> None:
    with_them = default_variants(shallow=True)
    assert with_them[: len(default_variants())] == default_variants()
    assert {Parameters(**variant.arguments).deep_every for variant in default_variants()} == {1}
    assert {Parameters(**variant.arguments).deep_every for variant in with_them} == {1, 2, 3}
    assert len({variant.name for variant in with_them}) == len(with_them)


def write_clips(path: Path, frames: Any, **arguments: Any) -> Path:
    np.savez(path, frames=frames, **{name: np.asarray(values) for name, values in arguments.items()})
    return path


def test_clips_are_read_with_their_arguments(tmp_path: Path) -> None:
    frames = np.arange(3 * 2 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 2, 4, 4, 3)
    path = write_clips(tmp_path / "clips.npz", frames, fps=[6, 7, 8])
    clips = read_clips(path, 2)
    assert [clip.arguments for clip in clips] == [{"fps": 6}, {"fps": 7}]
    np.testing.assert_array_equal(clips[1].picture, frames[1, 0])
    np.testing.assert_array_equal(clips[1].truth, frames[1])  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"has 3 clips; .* not 4"):
        read_clips(path, 4)


def test_files_that_are_no_clips(tmp_path: Path, picture_file: Path) -> None:
    with pytest.raises(ImageError, match="is no file of clips"):
        read_clips(picture_file, 1)
    with pytest.raises(ImageError, match="is no file of clips"):
        read_clips(tmp_path / "missing.npz", 1)
    np.savez(tmp_path / "other.npz", pictures=np.zeros(3))
    with pytest.raises(ImageError, match="is no file of clips"):
        read_clips(tmp_path / "other.npz", 1)
    with pytest.raises(ImageError, match=r"frames of float64 \[1, 2, 4, 4, 3\]"):
        read_clips(write_clips(tmp_path / "float.npz", np.zeros((1, 2, 4, 4, 3))), 1)
    with pytest.raises(ImageError, match="not one number for each of its 1 clips"):
        read_clips(write_clips(tmp_path / "args.npz", np.zeros((1, 2, 4, 4, 3), np.uint8), fps=[1, 2]), 1)


def test_a_measurement_has_the_figures_of_the_videos(
    small_bundle: Path, picture: PIL.Image.Image, tmp_path: Path
) -> None:
    """Two clips with their own fps, and three variants: the reference itself, one of two, and one that is refused."""
    pictures = [picture.resize((32, 32)), picture.rotate(90).resize((32, 32))]
    truth = np.stack([np.stack([np.asarray(one)] * 3) for one in pictures])
    clips = write_clips(tmp_path / "clips.npz", truth, fps=[6, 9])
    files = [tmp_path / name for name in ("q.json", "q.png", "q.md")]
    variants = ["same: --num-inference-steps 3", "--num-inference-steps 2 --guidance-interval 0,50"]
    done = invoke(
        *("bench", "quality", small_bundle, "--clips", clips, "--pictures", "2", "--seed", "5"),
        *("--reference", "--num-inference-steps 3", "--variant", variants[0], "--variant", variants[1]),
        *("--variant", "--guidance-interval 800,900", "-o", files[0], "--plot", files[1], "--markdown", files[2]),
        *("--backend", "onnxruntime", "--json"),
    )
    assert done.returncode == 0, done.stderr
    found = read_quality(files[0])
    assert json.loads(done.stdout) == json.loads(files[0].read_text())
    with VideoPipeline.open(small_bundle) as pipe:
        expected, shorter = (
            [
                pipe(one, num_frames=3, fps=fps, seed=5 + i, output_type="np", **arguments).frames[0]
                for i, (one, fps) in enumerate(zip(pictures, (6, 9), strict=True))
            ]
            for arguments in ({"num_inference_steps": 3}, {"num_inference_steps": 2, "guidance_interval": (0, 50)})
        )
    same, other = found.points
    error = [np.sqrt(np.mean((np.float64(a) - b) ** 2)) / 255 for a, b in zip(shorter, truth, strict=True)]
    levels = [psnr(a, b) for a, b in zip(shorter, expected, strict=True)]
    assert other.error == pytest.approx(np.mean(error), rel=1e-4)
    assert (other.psnr_db, other.least_psnr_db) == pytest.approx((np.mean(levels), min(levels)), rel=1e-4)
    assert (same.label, same.psnr_db, same.evaluations, other.evaluations) == ("same", 200.0, 6.0, 3.0)
    assert same.error == pytest.approx(found.reference_error)
    assert (found.pictures, found.frames, found.truth) == (2, 3, True)
    assert [note.partition(": ")[0] for note in found.notes] == ["--guidance-interval 800,900"]
    with PIL.Image.open(files[1]) as drawing:
        assert drawing.size[0] > 1000
    assert "| same | 6 |" in files[2].read_text()
    drawn = invoke("bench", "plot", files[0], "-o", tmp_path / "again")
    assert drawn.returncode == 1, "the folder does not exist"
    drawn = invoke("bench", "plot", files[0])
    assert drawn.stdout.strip() == str(files[1])


def test_without_clips_errors_are_to_the_reference(small_bundle: Path) -> None:
    common = ("--num-frames", "2", "--reference", "--num-inference-steps 2", "--backend", "onnxruntime", "-q")
    done = invoke("bench", "quality", small_bundle, "--variant", "--num-inference-steps 1", *common, "--json")
    assert done.returncode == 0, done.stderr
    (one,) = json.loads(done.stdout)["points"]
    assert one["error"] == pytest.approx(10 ** (-one["psnr_db"] / 20), rel=1e-3)
    done = invoke("bench", "quality", small_bundle, "--variant", "--num-inference-steps 1", *common)
    assert "error to the reference" in done.stdout


def test_variants_that_are_all_refused_are_an_error(small_bundle: Path) -> None:
    common = ("--num-frames", "2", "--reference", "--num-inference-steps 1", "--backend", "onnxruntime", "-q")
    done = invoke("bench", "quality", small_bundle, "--variant", "--deep-every 2", *common)
    assert done.returncode == 1
    assert "no variant was measured" in done.stderr
    assert "build one with --shallow-steps" in done.stderr


def test_an_interrupt_keeps_what_is_done(small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def make(*arguments: Any) -> Any:
        made.append(arguments)
        if len(made) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    real = quality._make
    monkeypatch.setattr(quality, "_make", make)
    variants = [part for n in (1, 2) for part in ("--variant", f"--num-inference-steps {n}")]
    path = tmp_path / "q.json"
    common = ("--num-frames", "2", "--reference", "--num-inference-steps 2", "--backend", "onnxruntime", "-o", path)
    done = invoke("bench", "quality", small_bundle, *variants, *common)
    assert done.returncode == 130
    assert [one.label for one in read_quality(path).points] == ["--num-inference-steps 1"]
    assert "--num-inference-steps 1" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.png", "--clips", "c.npz"], "--clips has the pictures"),
        (["--pictures", "3"], "--pictures is the number of --clips"),
        (["--variant", "--seed 3"], "--variant '--seed 3': No such option"),
        (["--variant", "steps 3"], "--variant 'steps 3': Got unexpected extra arguments"),
        (["--reference", "--sampler 'euler"], "No closing quotation"),
        (["--variant", "--sampler magic"], "'magic' is not one of"),
        (["--variant", "--extend 3"], "--variant '--extend 3': No such option"),
        (["--variant", "--guidance-interval 9,1"], "--variant '--guidance-interval 9,1': guidance_interval must be"),
        (["--reference", "--schedule ays --sigmas 9,1,0"], "schedule and sigmas were both given"),
        (["-o", "no/such/folder/q.json"], "cannot write no/such/folder/q.json"),
        (["--clips", "missing.npz"], "missing.npz is no file of clips"),
    ],
)
def test_wrong_use(arguments: list[str], words: str, small_bundle: Path) -> None:
    done = invoke("bench", "quality", small_bundle, *arguments)
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_the_quality_page_is_current() -> None:
    """The figures of docs/quality.md are those of the committed result."""
    page, path = ROOT / "docs" / "quality.md", ROOT / "benchmarks" / "results" / "quality-tiny.json"
    text = page.read_text()
    assert with_section(text, quality_section(path, read_quality(path), page), BEGIN, END) == text


def test_other_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="is not a result of `svd-trt bench quality`"):
        read_quality(ROOT / "benchmarks" / "results" / "build-cost.json")
    with pytest.raises(ResultError, match="cannot read"):
        read_quality(tmp_path / "missing.json")
