"""Results: their figures and files, and how they are compared, drawn and put into a page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

from svd_trt.benchmarks.compare import compare_results, same_machine
from svd_trt.benchmarks.plots import plot_result
from svd_trt.benchmarks.report import BEGIN, END, main, main_rows, markdown_page, section, tables, with_section
from svd_trt.benchmarks.results import ContenderResult, Curve, Point, Result, Summary, read_result, write_result
from svd_trt.errors import OutputError, ResultError
from tests.benchmarks.conftest import contender_result

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results"
Make = Callable[..., Result]


def test_median_and_range() -> None:
    assert Summary.of([3.0, 1.0, 10.0]) == Summary(3.0, 1.0, 10.0)
    assert Summary.of([2.0]) == Summary(2.0, 2.0, 2.0)


def test_drift_cancels_within_a_round() -> None:
    """The machine becomes four times slower, and one contender stays twice as fast as the other."""
    assert Summary.of_ratios([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]) == Summary(2.0, 2.0, 2.0)


def test_a_result_is_read_back(make_result: Make, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_result(path, make_result())
    again, made = read_result(path), make_result()
    assert again.workload == made.workload
    assert again.contenders[1].total_s == made.contenders[1].total_s
    raw = json.loads(path.read_text())
    one = raw["contenders"][1]
    assert one["name"] == "svd-trt-onnxruntime"
    assert set(one) >= {"step_s", "total_s", "psnr_db", "ratio_to_eager"}
    assert one["ratio_to_eager"] == pytest.approx(10 / 6, rel=0.02)
    assert list(tmp_path.iterdir()) == [path], "nothing is left beside it"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t[: len(t) // 2], "not JSON, or cut short"),
        (lambda t: t.replace(b"side-by-side", b"build_cost"), "not a result of"),
        (lambda t: t.replace(b'"schema": 1', b'"schema": 2'), "schema 2"),
        (lambda t: t.replace(b'"threads": 2', b'"threads": "two"'), "damaged"),
        (lambda t: b"\xff\xfe" + t, "not JSON"),
        (lambda t: t.replace(b'"schema"', b'"\x80chema"'), "not JSON"),
        (lambda t: b"[" * 9999, "not JSON"),
        (lambda t: b"[]", "not a result of"),
        (lambda t: t.replace(b'"spread"', b'"other"'), "neither times of diffusers-eager nor the reason"),
    ],
)
def test_damaged_files_are_refused(damage: Any, message: str, make_result: Make, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_result(path, make_result())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ResultError, match=message):
        read_result(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="not a result of"):
        read_result(RESULTS / "build-cost.json")
    with pytest.raises(ResultError, match="cannot read"):
        read_result(tmp_path / "missing.json")


def test_a_failed_write_keeps_what_was_there(make_result: Make, tmp_path: Path) -> None:
    folder = tmp_path / "taken"
    folder.mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        write_result(folder, make_result())
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_a_device_is_written_in_place(make_result: Make, tmp_path: Path) -> None:
    full = Path("/dev/full")
    before = full.stat()
    with pytest.raises(OutputError, match="No space left"):
        write_result(full, make_result())
    assert full.stat().st_rdev == before.st_rdev
    assert full.stat().st_mode == before.st_mode


def test_tables_show_what_was_measured_and_what_was_not(make_result: Make) -> None:
    result = make_result()
    header, *rows = main_rows(result)
    assert [row[0] for row in rows] == ["diffusers-eager", "svd-trt-onnxruntime"]
    assert "VRAM" not in header, "a column that is empty everywhere is left out"
    assert len(tables(result)) == 2
    page = markdown_page(result)
    assert "svd-trt-tensorrt: needs an NVIDIA GPU" in page
    assert "| svd-trt-onnxruntime |" in page


def curve() -> Curve:
    points = [Point(float(n), Summary(n * 0.5, n * 0.4, n * 0.6), n * 10**9) for n in (1, 2, 4)]
    return Curve(
        contender="diffusers-eager", axis="frames", what="step_s", points=points, slope=0.5, intercept=0.0, exponent=1.0
    )


def test_plots_are_pictures(make_result: Make, tmp_path: Path) -> None:
    paths = plot_result(make_result(curves=[curve()]), tmp_path / "new", "r")
    assert [p.name for p in paths] == [
        "r-speed.png",
        "r-stages.png",
        "r-memory.png",
        "r-fidelity.png",
        "r-curve-frames.png",
    ]
    for path in paths:
        pixels = np.asarray(PIL.Image.open(path).convert("L"))
        assert min(pixels.shape) > 200
        assert pixels.std() > 5, "not blank"


def test_nothing_measured_is_nothing_to_draw(make_result: Make, tmp_path: Path) -> None:
    empty = make_result(contenders=[ContenderResult(name="a", what="b", skipped="c")])
    with pytest.raises(ResultError, match="nothing to draw"):
        plot_result(empty, tmp_path, "r")
    assert main_rows(empty)[1:] == []


def test_comparison_separates_change_from_noise(make_result: Make) -> None:
    old = make_result([6.0, 6.3, 5.9])

    def verdicts(ours: list[float]) -> set[str]:
        rows = compare_results(old, make_result(ours))
        return {r.verdict for r in rows if r.contender == "svd-trt-onnxruntime" and r.figure in ("x eager", "total s")}

    assert verdicts([6.1, 6.2, 6.0]) == {"within noise"}
    assert verdicts([4.0, 4.1, 3.9]) == {"better"}
    assert verdicts([8.0, 8.1, 7.9]) == {"worse"}


def test_comparison_refuses_other_videos_and_leaves_out_seconds_of_other_machines(make_result: Make) -> None:
    old = make_result()
    other = make_result(workload=msgspec.structs.replace(old.workload, steps=9))
    with pytest.raises(ResultError, match="different videos"):
        compare_results(old, other)
    elsewhere = make_result(machine=old.machine | {"cpu": "another"})
    assert {r.figure for r in compare_results(old, elsewhere)} == {"x eager", "step x eager", "worst PSNR dB"}


def test_too_few_rounds_get_no_verdict(make_result: Make) -> None:
    def of(seconds: float) -> Result:
        return make_result(
            contenders=[contender_result(n, [s], [10.0]) for n, s in (("diffusers-eager", 10.0), ("x", seconds))]
        )

    rows = compare_results(of(5.0), of(7.0))
    assert {r.verdict for r in rows if r.figure in ("x eager", "step s", "total s", "decode s")} == {"too few rounds"}
    assert "(" not in main_rows(of(5.0))[2][2], "one figure has no range"


def test_a_contender_that_failed_is_reported(make_result: Make) -> None:
    old = make_result()
    broken = msgspec.structs.replace(old.contenders[1], skipped="it crashed", spread=None)
    new = make_result(contenders=[old.contenders[0], broken])
    (row,) = [r for r in compare_results(old, new) if r.contender == "svd-trt-onnxruntime"]
    assert (row.figure, row.verdict) == ("no longer measured: it crashed", "worse")
    assert not [r for r in compare_results(old, make_result(contenders=old.contenders[:1])) if "ort" in r.contender]


def test_machines_are_the_same_at_any_clock(make_result: Make) -> None:
    old = make_result()
    a, b = (
        make_result(machine=old.machine | {"gpu": [f"NVIDIA H100, 600.1, {clock} MHz"], "cpu_mhz": clock})
        for clock in (1980, 1755)
    )
    assert same_machine(a, b)
    assert not same_machine(a, make_result(machine=old.machine | {"gpu": ["NVIDIA A100, 600.1, 1980 MHz"]}))


def test_memory_changes_by_more_than_noise(make_result: Make) -> None:
    old = make_result()

    def verdict(factor: float) -> str:
        one = msgspec.structs.replace(old.contenders[1], peak_rss=int(1.5e9 * factor))
        rows = compare_results(old, make_result(contenders=[old.contenders[0], one]))
        return next(r.verdict for r in rows if r.figure == "RAM bytes" and r.contender == one.name)

    assert [verdict(f) for f in (1.03, 1.2, 0.8)] == ["within noise", "worse", "better"]


def test_section_of_a_page(make_result: Make, tmp_path: Path) -> None:
    path, page = tmp_path / "results" / "mid.json", tmp_path / "page.md"
    path.parent.mkdir()
    write_result(path, make_result())
    (path.parent / "mid-speed.png").touch()
    page.write_text(f"# Title\n{BEGIN}\nold\n{END}\nrest\n")
    for _ in range(2):  # once more changes nothing
        found = CliRunner().invoke(main, [str(page), str(path)])
        assert found.exit_code == 0, found.output
        text = page.read_text()
        assert text == with_section(text, section([(path, read_result(path))], page))
    assert text.startswith("# Title\n")
    assert text.endswith("rest\n")
    assert "old" not in text
    assert "(results/mid-speed.png)" in text
    for broken in ("# Title", f"{END}\n{BEGIN}", f"{BEGIN}{BEGIN}{END}"):
        with pytest.raises(ResultError, match="no place"):
            with_section(broken, "new")


def test_performance_page_is_current() -> None:
    """The figures of docs/performance.md are those of the committed results."""
    page = Path(__file__).parent.parent.parent / "docs" / "performance.md"
    paths = sorted(RESULTS.glob("bench-*.json"))
    text = page.read_text()
    assert paths
    assert with_section(text, section([(p, read_result(p)) for p in paths], page)) == text
