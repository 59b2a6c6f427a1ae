"""Plots of kernels are pictures of sensible size, whatever they show."""

from __future__ import annotations

from pathlib import Path

import msgspec
import PIL.Image
import pytest
from matplotlib.figure import Figure

from svd_trt.benchmarks.kernel_plots import plot_kernels
from svd_trt.engine.kernel_kinds import KINDS
from svd_trt.engine.kernels import Kernel, KernelCost
from svd_trt.errors import OutputError


def costs(kinds: int) -> list[KernelCost]:
    return [
        KernelCost(
            Kernel("k", "kgen", kind, (), (), (), None, ()), 10**9, 10**9 * place, 0, 0, 0, half=True, known=True
        )
        for place, kind in enumerate(KINDS[:kinds])
    ]


def test_panels_and_bars_make_the_picture_higher(tmp_path: Path) -> None:
    sizes = {}
    shown = {
        "one": {"denoiser": {"a": costs(9)}},
        "compared": {"denoiser": {"a": costs(9), "b": costs(5)}},
        "two": {"denoiser": {"a": costs(9), "b": costs(5)}, "vae_decoder": {"a": costs(3), "b": costs(3)}},
    }
    for name, panels in shown.items():
        path = tmp_path / f"{name}.png"
        plot_kernels(panels, path)
        with PIL.Image.open(path) as image:
            assert image.format == "PNG"
            sizes[name] = image.size
    assert 400 < sizes["one"][1] < sizes["compared"][1] < sizes["two"][1] < 2000
    assert len({width for width, _ in sizes.values()}) == 1


def test_no_kernels_make_a_picture_too(tmp_path: Path) -> None:
    plot_kernels({"image_encoder": {"a": []}}, tmp_path / "none.png")
    with PIL.Image.open(tmp_path / "none.png") as image:
        assert image.height > 100


def test_labels_have_the_unit_of_the_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    large = KernelCost(
        Kernel("k", "kgen", "product", (), (), (), None, ()), 2_500_000, 0, 9, 0, 0, half=True, known=True
    )
    small = msgspec.structs.replace(large, read=1000, kernel=msgspec.structs.replace(large.kernel, kind="attention"))
    plot_kernels({"denoiser": {"a": [large, small]}}, tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert axes.get_xlabel() == "MB"
    assert [text.get_text().strip() for text in axes.texts] == ["2.5, 1"], "a thousandth of it is not drawn"
    assert axes.get_legend().get_texts()[0].get_text() == "a: 2.5 MB, 2 kernels"


def test_folders_are_not_created(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        plot_kernels({"denoiser": {"a": costs(2)}}, tmp_path / "missing" / "plot.png")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*file"):
        plot_kernels({"denoiser": {"a": costs(2)}}, tmp_path / "file" / "plot.png")
