"""``svd-trt infer``: formats are read back, mistakes get one line, and no incomplete video remains."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest

from svd_trt import VideoPipeline
from svd_trt.engine.driver import gpu_count
from svd_trt.errors import OutputError
from svd_trt.runtime.parameters import ParameterArguments, Parameters
from svd_trt.runtime.video import read_metadata
from tests.cli.conftest import Run, assert_refused, invoke, start

FAST = ("--num-inference-steps", "2", "--num-frames", "3", "--seed", "7")


@pytest.fixture(scope="module")
def expected(small_bundle: Path, picture: PIL.Image.Image) -> np.ndarray:
    with VideoPipeline.open(small_bundle) as pipe:
        return pipe(picture, num_inference_steps=2, num_frames=3, seed=7, output_type="np").frames[0]


def test_mp4_has_the_frames_size_and_rate(
    small_bundle: Path, picture_file: Path, tmp_path: Path, expected: np.ndarray
) -> None:
    out = tmp_path / "o.mp4"
    result = invoke("infer", small_bundle, picture_file, "-o", out, *FAST, "--fps", "12", "--json")
    assert result.returncode == 0, result.stderr
    with av.open(str(out)) as file:
        stream = file.streams.video[0]
        assert (stream.codec.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height, stream.average_rate) == (32, 32, 12)
        frames = [f.to_ndarray(format="rgb24") for f in file.decode(video=0)]
    assert len(frames) == 3
    # fps is also a condition of the motion, so these are not the frames of 7 fps; only mean colours are compared.
    assert np.abs(np.stack(frames).mean((0, 1, 2)) - expected.mean((0, 1, 2))).max() < 20
    said = json.loads(result.stdout)
    assert said["seed"] == 7
    assert said["backend"] == "onnxruntime (CPU)"
    assert said["parameters"]["fps"] == 12
    assert len(said["timings_s"]["steps"]) == 2
    assert {"open", "load", "image_encoder", "vae_encoder", "denoise", "decode", "write", "total"} <= set(
        said["timings_s"]
    )
    assert read_metadata(out)["seed"] == 7


def test_npy_png_and_stdout_hold_the_exact_frames(
    run: Run, small_bundle: Path, picture_file: Path, tmp_path: Path, expected: np.ndarray
) -> None:
    assert invoke("infer", small_bundle, picture_file, "-o", tmp_path / "o.npy", *FAST).returncode == 0
    assert invoke("infer", small_bundle, picture_file, "-o", tmp_path / "frames", *FAST).returncode == 0
    raw = run("infer", small_bundle, picture_file, "-o", "-", *FAST, text=False)
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), expected)
    pngs = [np.asarray(PIL.Image.open(p).convert("RGB")) for p in sorted((tmp_path / "frames").iterdir())]
    np.testing.assert_array_equal(np.stack(pngs), expected)
    np.testing.assert_array_equal(np.frombuffer(raw.stdout, np.uint8).reshape(expected.shape), expected)
    assert read_metadata(tmp_path / "frames")["num_inference_steps"] == 2


def test_a_lossless_stream_and_a_rate_of_its_own(
    run: Run, small_bundle: Path, picture_file: Path, tmp_path: Path, expected: np.ndarray
) -> None:
    """The rate of the file is no condition: the frames stay those of the default fps."""
    arguments = ["--output-fps", "24000/1001", *FAST]
    stream = run("infer", small_bundle, picture_file, "-o", "-", "--format", "mkv", *arguments, text=False)
    result = invoke("infer", small_bundle, picture_file, "-o", tmp_path / "o.mkv", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    assert "3 frames of 32x32 at 24000/1001 fps, seed 7" in " ".join(result.stderr.split())
    assert json.loads(result.stdout)["output_fps"] == "24000/1001"
    assert json.loads(result.stdout)["parameters"]["fps"] == 7
    for source in (io.BytesIO(stream.stdout), str(tmp_path / "o.mkv")):
        with av.open(source) as file:
            assert file.streams.video[0].average_rate == Fraction(24000, 1001)
            frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        np.testing.assert_array_equal(np.stack(frames), expected)
    assert read_metadata(tmp_path / "o.mkv")["fps"] == 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "o.mp4", "--format", "y4m"], "--format is for -o -"),
        (["x.png", "-o", "-", "--format", "mp4"], "2 videos one after the other only as --format raw"),
        (["-o", "-", "--format", "avi"], "'avi' is not one of 'raw', 'y4m'"),
        (["-o", "o.mp4", "--output-fps", "0"], "'0' is not a frame rate from 0.01 to 1000"),
        (["-o", "o.mp4", "--output-fps", "30/0"], "'30/0' is not a frame rate"),
        (["-o", "o.mp4", "--output-fps", "fast"], "'fast' is not a frame rate"),
        (["-o", "o.mp4", "--output-fps", "9" * 400 + "/1"], "(402 characters)"),
        (["-o", "o.mp4", "--output-fps", "9" * 400], "is not a frame rate"),
    ],
)
def test_formats_and_rates_that_are_none(arguments: list[str], words: str, small_bundle: Path) -> None:
    result = invoke("infer", small_bundle, "x.png", *arguments)
    assert result.returncode == 2
    assert words in result.stderr


def test_several_pictures_make_several_files(small_bundle: Path, picture_file: Path, tmp_path: Path) -> None:
    result = invoke("infer", small_bundle, picture_file, picture_file, "-o", tmp_path / "o.gif", *FAST, "-q")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o-0.gif", "o-1.gif"]
    with PIL.Image.open(tmp_path / "o-1.gif") as gif:
        assert (gif.n_frames, gif.size) == (3, (32, 32))


def test_progress_goes_to_standard_error(small_bundle: Path, picture_file: Path, tmp_path: Path) -> None:
    result = invoke("infer", small_bundle, picture_file, "-o", tmp_path / "o.webp", *FAST)
    assert result.stdout == ""
    assert re.search(r"denoise.*2/2", result.stderr)
    assert re.search(r"decode.*3/3", result.stderr)
    assert "seed 7" in result.stderr


def test_several_seeds_are_one_for_each_video(small_bundle: Path, picture_file: Path, tmp_path: Path) -> None:
    fast = ("--num-inference-steps", "1", "--num-frames", "2")
    pictures = (picture_file, picture_file)
    result = invoke("infer", small_bundle, *pictures, "-o", tmp_path / "v.npy", *fast, "--seed", "7,8", "--json")
    assert json.loads(result.stdout)["seed"] == [7, 8]
    assert "seeds 7, 8" in result.stderr
    for seed in (7, 8):
        invoke("infer", small_bundle, picture_file, "-o", tmp_path / f"{seed}.npy", *fast, "--seed", str(seed))
        alone, together = np.load(tmp_path / f"{seed}.npy"), np.load(tmp_path / f"v-{seed - 7}.npy")
        np.testing.assert_allclose(together.astype(int), alone, atol=1)


def test_same_seed_same_video_and_random_seeds_differ(small_bundle: Path, picture_file: Path, tmp_path: Path) -> None:
    fast = FAST[:-2]
    seeds = []
    for name in ("a.npy", "b.npy"):
        result = invoke("infer", small_bundle, picture_file, "-o", tmp_path / name, *fast, "--json")
        seeds.append(json.loads(result.stdout)["seed"])
    assert seeds[0] != seeds[1]
    invoke("infer", small_bundle, picture_file, "-o", tmp_path / "c.npy", *fast, "--seed", str(seeds[0]))
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "c.npy"))
    assert not np.array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--num-frames", "7"], 1, ["num_frames 7", "2 to 6", "--frames"]),
        (["--num-frames", "1"], 1, ["2 to 6"]),
        (["--num-frames", "0"], 2, ["--num-frames"]),
        (["--num-frames", "3.5"], 2, ["--num-frames"]),
        (["--height", "80"], 1, ["height 80", "32"]),
        (["--width", "7"], 2, ["--width"]),
        (["--num-videos-per-prompt", "3", "--decode-chunk-size", "7"], 1, ["chunk of 7", "1 to 6"]),
        (["--num-inference-steps", "0"], 2, ["--num-inference-steps"]),
        (["--fps", "-1"], 2, ["--fps"]),
        (["--noise-aug-strength", "nan"], 1, ["noise_aug_strength"]),
        (["--max-guidance-scale", "inf"], 2, ["--max-guidance-scale"]),
        (["--seed", str(2**64)], 2, ["--seed"]),
        (["--sigmas", "1,2,3"], 1, ["decrease"]),
        (["--sigmas", "5"], 1, ["at least two"]),
        (["--sigmas", "a,b"], 2, ["--sigmas"]),
        (["--sigmas", "nan,0"], 1, ["decrease"]),
        (["--backend", "abacus"], 2, ["--backend"]),
        (["--resize-mode", "zoom"], 2, ["--resize-mode", "crop"]),
        (["--icc", "yes"], 2, ["--icc", "convert"]),
        (["--background", "bluish"], 1, ["background", "'bluish'", "#ff8000"]),
        (["--background", "#ff000080"], 1, ["background", "opaque"]),
        (["--background", "x" * 5000], 1, ["background", "characters)"]),
        (["--sigmas", "x" * 5000], 2, ["--sigmas", "characters)"]),
        (["--seed", "9" * 5000], 2, ["--seed", "characters)"]),
        (["--seed", "1,x"], 2, ["--seed", "'x' is not a valid integer"]),
        (["--seed", f"1,{2**64}"], 2, ["--seed", "not in the range"]),
        (["--seed", "1,2"], 1, ["2 seeds were given for 1 video; give one for each video, or one for all"]),
        (["--sampler", "x" * 5000], 2, ["--sampler", "characters)"]),
    ],
)
def test_bad_arguments(
    options: list[str], code: int, words: list[str], small_bundle: Path, picture_file: Path, tmp_path: Path
) -> None:
    result = invoke("infer", small_bundle, picture_file, "-o", tmp_path / "o.mp4", *options, "-q")
    assert_refused(result, *words, code=code)
    assert len(result.stderr) < 1000
    assert list(tmp_path.iterdir()) == []


def test_bad_pictures_and_places(small_bundle: Path, picture_file: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.png"
    text.write_text("not a picture")
    cut = tmp_path / "cut.png"
    cut.write_bytes(picture_file.read_bytes()[:300])
    out = tmp_path / "out"
    out.mkdir()
    for image, word in ((text, "notes.png"), (cut, "cut.png"), (tmp_path / "none.png", "none.png")):
        assert_refused(invoke("infer", small_bundle, image, "-o", out / "o.mp4", "-q"), word)
    assert_refused(invoke("infer", small_bundle, picture_file, "-o", out / "o.avi"), ".mp4", ".gif")
    assert_refused(invoke("infer", small_bundle, picture_file, "-o", tmp_path / "no" / "o.mp4"), "no")
    assert_refused(invoke("infer", small_bundle, picture_file, "-o", text / "o.mp4"), "notes.png")
    assert list(out.iterdir()) == []
    mine = shutil.copy(picture_file, tmp_path / "mine.gif")
    assert_refused(invoke("infer", small_bundle, mine, "-o", mine), "also an input")
    assert Path(mine).read_bytes() == picture_file.read_bytes()


def test_inputs_and_bundle_are_safe_from_outputs(small_bundle: Path, picture_file: Path, tmp_path: Path) -> None:
    inside = small_bundle / "o.mp4"
    assert_refused(invoke("infer", small_bundle, picture_file, "-o", inside, *FAST), "is inside the bundle")
    frames = tmp_path / "frames"
    assert invoke("infer", small_bundle, picture_file, "-o", frames, *FAST, "-q").returncode == 0
    last = frames / "frame_0002.png"
    assert_refused(invoke("infer", small_bundle, last, "-o", frames, *FAST), "contains one")
    assert last.exists()
    assert_refused(invoke("infer", picture_file, picture_file, "-o", tmp_path / "o.mp4"), "is a file, not a bundle")


def test_names_are_printed_as_they_are(run: Run, small_bundle: Path, picture_file: Path, tmp_path: Path) -> None:
    """Brackets are not taken for markup, and long lines are not broken, so that they can be copied."""
    out = tmp_path / ("x" * 150) / "video [final] [b] ü.mp4"
    out.parent.mkdir()
    result = run("infer", small_bundle, picture_file, "-o", out, *FAST, env={"COLUMNS": "80"})
    assert result.returncode == 0, result.stderr
    assert str(out) in result.stderr
    assert out.exists()


def test_standard_output_that_is_full(small_bundle: Path, picture_file: Path, tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        process = start(
            "infer", small_bundle, picture_file, "-o", tmp_path / "o.mp4", *FAST, "--json", "-q", stdout=full
        )
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "cannot write to standard output" in err
    assert "Traceback" not in err


def test_missing_arguments_are_usage_errors(small_bundle: Path) -> None:
    assert invoke("infer", small_bundle).returncode == 2
    assert invoke("infer").returncode == 2
    assert invoke("fly").returncode == 2
    assert invoke("infer", small_bundle, "x.png", "-o", "-", "--json").returncode == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_leaves_no_partial_video(
    number: signal.Signals, small_bundle: Path, picture_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o.mp4"
    process = start(
        "infer", small_bundle, picture_file, "-o", out, "--num-inference-steps", "1000", "--num-frames", "6"
    )
    while not list(tmp_path.iterdir()):  # the writer's hidden file: the loop is running
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}[number]
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def finished_videos(err: str) -> int:
    """The number in the message that says how many of three videos are finished."""
    said = re.search(r"(\d) of 3 videos (?:is|are) finished(.*)", err)
    assert said is not None, err
    names = {0: "", 1: "o-0.npy", 2: "o-0.npy to .*o-1.npy"}[int(said[1])]
    assert re.search(f"{names}$", said[2]), err
    return int(said[1])


def test_an_interrupt_keeps_the_finished_videos(
    small_bundle: Path, picture_file: Path, tmp_path: Path, expected: np.ndarray
) -> None:
    """Each video is in its place before the next begins."""
    several = (picture_file, "-o", tmp_path / "o.npy", "--num-videos-per-prompt", "3")
    process = start("infer", small_bundle, *several, "--num-inference-steps", "50", "--num-frames", "3")
    while not (tmp_path / "o-0.npy").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(r"^interrupted: \d of 3", err, re.MULTILINE), err
    finished = finished_videos(err)
    assert 1 <= finished < 3
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"o-{i}.npy" for i in range(finished)]
    assert all(np.load(p).shape == expected.shape for p in tmp_path.iterdir())


def test_a_failure_in_the_middle_keeps_the_finished_videos(
    small_bundle: Path, picture_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the second video is written."""
    import svd_trt.cli.infer_command as module

    opened = module.open_writer

    def open_or_fail(path: str, **options: Any) -> Any:
        if path.endswith("o-1.npy"):
            raise OutputError(f"cannot write {path}: No space left on device; free some space, or write elsewhere")
        return opened(path, **options)

    monkeypatch.setattr(module, "open_writer", open_or_fail)
    several = (picture_file, "-o", tmp_path / "o.npy", "--num-videos-per-prompt", "3")
    result = invoke("infer", small_bundle, *several, *FAST, "-q")
    assert_refused(result, "o-1.npy: No space left on device; free some space, or write elsewhere; 1 of 3 videos is")
    assert finished_videos(result.stderr) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["o-0.npy"]


def test_keyword_arguments_are_the_parameters() -> None:
    """The keyword arguments that type checkers see are the fields of `Parameters`."""
    assert list(ParameterArguments.__annotations__) == list(Parameters.fields())


def test_defaults_are_diffusers() -> None:
    import inspect

    from diffusers import StableVideoDiffusionPipeline

    theirs = inspect.signature(StableVideoDiffusionPipeline.__call__).parameters
    # diffusers has a generator, 576x1024 (decided by the bundle here) and a scheduler object instead, and does what
    # stretch, ignore and None do
    ours = {"seed", "height", "width", "schedule", "sampler", "quality", "resize_mode", "icc", "background"}
    ours |= {"guidance_shape", "guidance_interval", "deep_every", "extend"}
    for name in Parameters.fields().keys() - ours:
        assert theirs[name].default == getattr(Parameters(), name), name


def test_a_budget_chooses_how_to_run(
    small_bundle: Path, picture_file: Path, tmp_path: Path, expected: np.ndarray
) -> None:
    """A CPU follows the same plan as a GPU, and every plan gives the same frames."""
    out = tmp_path / "o.npy"
    asked = ("infer", small_bundle, picture_file, "-o", out, *FAST, "--decode-chunk-size", "3")
    refused = invoke(*asked, "--vram-budget", "1MB")
    assert_refused(refused, "smallest budget that works is")
    smallest = re.search(r"works is ([0-9.]+ MB)", refused.stderr)
    assert smallest is not None
    result = invoke(*asked, "--vram-budget", smallest[1], "--json")
    assert result.returncode == 0, result.stderr
    memory = json.loads(result.stdout)["memory"]
    assert (memory["resident"], memory["decode_chunk"]) == (False, 3)
    assert memory["total_bytes"] <= float(smallest[1].removesuffix(" MB")) * 1e6
    assert "one engine at a time" in result.stderr
    assert np.abs(np.load(out).astype(int) - expected).max() <= 2
    assert "memory:" not in invoke(*asked).stderr


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--device", "cuda"), "no NVIDIA driver"),
        (("--provider", "cuda"), "without --backend, --provider and --device it runs on the CPU"),
        (("--device", "gpu"), "write cpu, cuda, or cuda:1"),
        (("--backend", "tensorrt", "--provider", "cuda"), "only ONNX Runtime has providers"),
    ],
)
@pytest.mark.skipif(gpu_count() > 0, reason="this machine has a GPU")
def test_devices_that_are_not_here(
    options: tuple[str, ...], problem: str, small_bundle: Path, picture_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o.gif"
    assert_refused(invoke("infer", small_bundle, picture_file, "-o", out, *FAST, *options), problem)
    assert list(tmp_path.iterdir()) == []
