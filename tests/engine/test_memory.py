"""Plans of GPU memory over the figures of full-size SVD-XT (fp16, 576x1024), without a bundle."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from svd_trt.engine.host import describe_host
from svd_trt.engine.manifest import (
    SCHEMA_VERSION,
    FileEntry,
    GraphEntry,
    Manifest,
    NetworkEntry,
    OnnxEntry,
    PlanEntry,
    ProfileEntry,
    SamplerInfo,
    SourceInfo,
    TensorRtEntry,
)
from svd_trt.engine.memory import (
    MemoryPlan,
    MemoryRequest,
    activation_bytes,
    compare_plans,
    plan_footprint,
    plan_memory,
    smallest_budget,
)
from svd_trt.engine.spec import SHALLOW, ModelInfo, NetworkName, Range, Ranges, network_specs
from svd_trt.errors import ArgumentError, BudgetError

GB = 10**9
VIDEO = MemoryRequest(25, 576, 1024)
BRANCHES, CHUNK = Range(1, 2, 2), Range(1, 8, 25)
BUDGETS = [budget * GB for budget in (4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 80)]

# Weights and activations in bytes, of benchmarks/results/build-cost.json of 2026-11-22.
DEFAULT: dict[NetworkName, tuple[int, int]] = {
    "image_encoder": (1_264_759_680, 12_797_440),
    "vae_encoder": (136_655_104, 921_239_552),
    "denoiser": (2_777_727_616, 4_611_976_704),
    "vae_decoder": (135_424_768, 22_934_374_912),
}
LOW_MEMORY = DEFAULT | {"denoiser": (2_777_727_488, 2_123_496_960)}


def full_size(
    figures: dict[NetworkName, tuple[int, int]],
    *,
    branches: Range = BRANCHES,
    chunk: Range = CHUNK,
    ff_chunks: int = 2,
    streaming: bool = False,
    deep_channels: int | None = None,
) -> Manifest:
    model = ModelInfo(4, 8, 1024, 224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 25, 256)
    one = Range(1, 1, 1)
    graph = GraphEntry(rewrites=True, ff_chunks=ff_chunks, deep_channels=deep_channels)
    ranges = Ranges(one, one, branches, Range(2, 25, 25), chunk, Range(576, 576, 576), Range(1024, 1024, 1024))

    def entry(name: NetworkName) -> NetworkEntry:
        weights, activations = figures[name]
        file = FileEntry(f"tensorrt-rtx/{name}.plan", 1, "")
        spec = network_specs(model, ranges, graph.kept("fp16"))[name]
        profiles = (ProfileEntry(spec.ranges, activations),)
        plan = PlanEntry("", file, None, profiles, 1, weights, weight_streaming=streaming and name == "denoiser")
        return NetworkEntry(spec, OnnxEntry("", FileEntry("", 0, ""), (), 1, 1), plan, 1)

    return Manifest(
        schema_version=SCHEMA_VERSION,
        svd_trt_version="0",
        family="svd",
        source=SourceInfo("random:svd-xt", None, None, {}),
        precision="fp16",
        model=model,
        sampler=SamplerInfo(0.002, 700.0, 7.0, "leading"),
        ranges=ranges,
        graph=graph,
        tensorrt=TensorRtEntry("tensorrt-rtx", "1.7.1", ""),
        networks={name: entry(name) for name in figures},
        host=describe_host(model, half=True, adds_one=True, arguments={}),
        golden=None,
    )


def default(*, streaming: bool = False, chunk: Range = CHUNK) -> Manifest:
    return full_size(DEFAULT, streaming=streaming, chunk=chunk)


def low_memory(*, streaming: bool = False) -> Manifest:
    return full_size(LOW_MEMORY, branches=Range(1, 1, 1), ff_chunks=4, streaming=streaming)


def without_figures(manifest: Manifest, *, engines: bool) -> Manifest:
    def bare(entry: NetworkEntry) -> NetworkEntry:
        assert entry.plan is not None
        unknown = tuple(msgspec.structs.replace(profile, activation_bytes=None) for profile in entry.plan.profiles)
        plan = msgspec.structs.replace(entry.plan, profiles=unknown) if engines else None
        return msgspec.structs.replace(entry, plan=plan)

    return msgspec.structs.replace(
        manifest,
        tensorrt=manifest.tensorrt if engines else None,
        networks={name: bare(entry) for name, entry in manifest.networks.items()},
    )


BUNDLES = {
    "default": default(),
    "default, streaming": default(streaming=True),
    "low memory": low_memory(),
    "low memory, streaming": low_memory(streaming=True),
}
# Resident, split guidance, decode chunk, megabytes streamed; None if nothing fits.
Choice = tuple[bool, bool, int, int] | None
WITH_ROOM: list[Choice] = [(True, False, 5, 0)] * 7
CHOICES: dict[str, list[Choice]] = {
    "default": [None, None, (False, True, 5, 0), (True, True, 3, 0), *WITH_ROOM],
    "default, streaming": [
        (False, True, 1, 1461),
        (False, True, 1, 461),
        (False, True, 5, 0),
        (True, True, 3, 0),
        *WITH_ROOM,
    ],
    "low memory": [None, (False, True, 5, 0), (False, True, 5, 0), (True, True, 3, 0)],
    "low memory, streaming": [(False, True, 1, 1278)],
}
CHOICES["low memory"] += [(True, True, 5, 0)] * 7
CHOICES["low memory, streaming"] += CHOICES["low memory"][1:]


def choice(manifest: Manifest, request: MemoryRequest, budget: int | None) -> Choice:
    try:
        plan = plan_memory(manifest, request, budget)
    except BudgetError:
        return None
    return plan.resident, plan.split_guidance, plan.decode_chunk_size, round(plan.streamed_bytes / 1e6)


def slowness(plan: MemoryPlan) -> tuple[int, bool, bool, int]:
    return plan.streamed_bytes, not plan.resident, plan.split_guidance, -plan.decode_chunk_size


@pytest.mark.parametrize(
    ("bundle", "budget", "expected"),
    [(name, *row) for name, choices in CHOICES.items() for row in zip(BUDGETS, choices, strict=True)],
)
def test_choices_of_full_size(bundle: str, budget: int, expected: Choice) -> None:
    assert choice(BUNDLES[bundle], VIDEO, budget) == expected


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize(
    "request_",
    [
        VIDEO,
        replace(VIDEO, frames=14),
        replace(VIDEO, frames=2),
        replace(VIDEO, guided=False),
        replace(VIDEO, guided_in_part=True),
        replace(VIDEO, decode_chunk_size=8),
        replace(VIDEO, videos=3),
    ],
    ids=["25", "14", "2", "unguided", "guided in part", "chunks of 8", "three videos"],
)
def test_every_budget(bundle: str, request_: MemoryRequest) -> None:
    manifest = BUNDLES[bundle]
    smallest = smallest_budget(manifest, request_)
    assert smallest is not None
    with pytest.raises(BudgetError, match="the smallest budget that works is"):
        plan_memory(manifest, request_, smallest - 1)
    before = None
    for budget in (smallest, *range(smallest + 1, 30 * GB, GB // 5)):
        plan = plan_memory(manifest, request_, budget)
        assert plan.total_bytes is not None
        assert plan.total_bytes <= budget
        found = plan_footprint(manifest, request_, plan)
        assert found is not None
        assert (plan.activation_bytes, plan.total_bytes) == (found.activations, found.total)
        assert before is None or slowness(plan) <= slowness(before)
        assert plan.decode_chunk_size in range(1, request_.frames + 1)
        assert request_.decode_chunk_size in (None, plan.decode_chunk_size)
        weights = manifest.networks["denoiser"].plan
        assert weights is not None
        assert weights.weight_bytes is not None
        assert plan.streamed_bytes <= weights.weight_bytes * 3 / 4
        assert weights.weight_streaming or not plan.streamed_bytes
        before = plan
    assert before == plan_memory(manifest, request_, None), "30 GB allow the same as no limit"


def test_no_budget_is_the_fastest_plan() -> None:
    plan = plan_memory(default(), VIDEO, None)
    assert plan.words() == "all engines loaded, guidance branches together, decoding 5 frames at a time"
    assert plan.total_bytes == pytest.approx(8.964 * GB, rel=0.001)
    assert plan.activation_bytes == DEFAULT["denoiser"][1], "shared: the most of one engine, not the sum"


def test_words_of_the_slowest_plan() -> None:
    words = plan_memory(default(streaming=True), VIDEO, 4 * GB).words()
    assert words == (
        "one engine at a time, guidance branches one at a time, decoding 1 frame at a time, "
        "1.47 GB of weights streamed from host memory"
    )


def test_a_quarter_of_the_weights_stays() -> None:
    manifest = full_size(DEFAULT | {"image_encoder": (1, 1)}, streaming=True)
    smallest = smallest_budget(manifest, VIDEO)
    assert plan_memory(manifest, VIDEO, smallest).streamed_bytes == DEFAULT["denoiser"][0] * 3 // 4


def test_one_engine_at_a_time_counts_the_one_that_needs_most() -> None:
    manifest = default()
    decoding = plan_footprint(manifest, VIDEO, MemoryPlan(False, False, 25))
    assert decoding is not None
    assert (decoding.weights, decoding.activations) == DEFAULT["vae_decoder"]
    denoising = plan_footprint(manifest, VIDEO, MemoryPlan(False, False, 1))
    assert denoising is not None
    assert (denoising.weights, denoising.activations) == DEFAULT["denoiser"]


def test_fewer_frames_need_less() -> None:
    manifest = default()
    needs = [
        smallest_budget(manifest, request) or 0
        for request in (VIDEO, replace(VIDEO, frames=14), replace(VIDEO, frames=8))
    ]
    assert needs == sorted(needs, reverse=True)
    assert needs[0] > needs[1] + 0.9 * GB
    unguided = plan_memory(manifest, replace(VIDEO, guided=False, decode_chunk_size=1), None)
    guided = plan_memory(manifest, replace(VIDEO, decode_chunk_size=1), None)
    assert unguided.activation_bytes == pytest.approx((guided.activation_bytes or 0) / 2, rel=1e-6)
    assert not unguided.split_guidance, "there is one branch"
    assert not plan_memory(low_memory(), replace(VIDEO, guided=False), None).split_guidance
    assert plan_memory(low_memory(), VIDEO, None).split_guidance, "its engine has one branch"


def test_branches_that_cannot_be_split() -> None:
    manifest = full_size(DEFAULT, branches=Range(2, 2, 2))
    assert choice(manifest, VIDEO, 6 * GB) is None
    assert choice(manifest, VIDEO, 8 * GB) == (False, False, 5, 0)
    with pytest.raises(ArgumentError, match=r"without guidance runs one branch, .* another --branches"):
        plan_memory(manifest, replace(VIDEO, guided=False), None)
    with pytest.raises(ArgumentError, match=r"outside guidance_interval runs one branch, .* without --branches 2"):
        plan_memory(manifest, replace(VIDEO, guided_in_part=True), None)


def test_steps_over_one_branch_may_need_a_profile_that_needs_more() -> None:
    """An exact profile for both branches needs little; one branch is only in the range, with half of its figure."""
    manifest = default()
    denoiser = manifest.networks["denoiser"]
    assert denoiser.plan is not None
    exact = ProfileEntry({"branches": Range(2, 2, 2), "frames": Range(25, 25, 25)}, GB)
    plan = msgspec.structs.replace(denoiser.plan, profiles=(exact, *denoiser.plan.profiles))
    entry = msgspec.structs.replace(denoiser, plan=plan)
    manifest = msgspec.structs.replace(manifest, networks={**manifest.networks, "denoiser": entry})
    guided, in_part = (
        plan_footprint(manifest, replace(VIDEO, guided_in_part=part), MemoryPlan(False, False, 1))
        for part in (False, True)
    )
    assert guided is not None
    assert in_part is not None
    assert guided.activations == GB
    assert in_part.activations == pytest.approx(DEFAULT["denoiser"][1] / 2, abs=256)


def test_the_last_chunk_has_a_size_that_the_bundle_takes() -> None:
    manifest = default(chunk=Range(3, 8, 8))
    assert choice(manifest, VIDEO, None) == (True, False, 5, 0)  # divides evenly
    assert choice(manifest, replace(VIDEO, frames=17), None) == (True, False, 6, 0)  # 8 leaves 1, and 6 + 6 + 5
    with pytest.raises(BudgetError, match="decoding 5 frames at a time"):  # 4 and 3 leave 1
        plan_memory(manifest, VIDEO, 5 * GB)
    with pytest.raises(ArgumentError, match="decoding 25 frames by 3 needs a chunk of 1"):
        plan_memory(manifest, replace(VIDEO, decode_chunk_size=3), None)
    with pytest.raises(ArgumentError, match="needs a chunk of 1"):
        plan_memory(default(chunk=Range(5, 5, 6)), replace(VIDEO, frames=7, decode_chunk_size=6), 80 * GB)


def test_a_chunk_of_more_than_all_frames_costs_all_frames() -> None:
    request = replace(VIDEO, frames=14)
    plan = plan_memory(default(), replace(request, decode_chunk_size=25), None)
    assert plan.decode_chunk_size == 25
    assert plan.total_bytes == plan_memory(default(), request, None).total_bytes


def test_an_exact_profile_needs_what_it_says() -> None:
    """A size that only the range holds needs a share of the range's figure, and so does a shorter last chunk."""
    manifest = full_size(DEFAULT | {"denoiser": (1, 1)})
    decoder = manifest.networks["vae_decoder"]
    assert decoder.plan is not None
    exact = ProfileEntry({"chunk": Range(5, 5, 5)}, 2 * GB)
    plan = msgspec.structs.replace(decoder.plan, profiles=(exact, *decoder.plan.profiles))
    entry = msgspec.structs.replace(decoder, plan=plan)
    assert activation_bytes(entry, {"chunk": 5}) == 2 * GB
    assert activation_bytes(entry, {"chunk": 4}) == pytest.approx(DEFAULT["vae_decoder"][1] * 4 / 25, abs=1)
    manifest = msgspec.structs.replace(manifest, networks={**manifest.networks, "vae_decoder": entry})
    even, rest = (
        plan_footprint(manifest, replace(VIDEO, frames=frames), MemoryPlan(True, False, 5)) for frames in (10, 9)
    )
    assert even is not None
    assert rest is not None
    assert even.activations == 2 * GB
    assert rest.activations > 3 * GB


def test_compared_plans_have_the_figures_of_the_planner() -> None:
    """The default bundle runs both branches together, the low-memory one cannot."""
    for manifest, split in ((default(), False), (low_memory(), True)):
        compared = compare_plans(manifest)
        assert [(r.frames, p.decode_chunk_size, p.resident) for r, p in compared] == [
            (frames, chunk, resident)
            for resident in (True, False)
            for frames in (14, 25)
            for chunk in (14 if frames == 14 else 5, 1)
        ]
        for request, plan in compared:
            assert plan.split_guidance == split
            found = plan_footprint(manifest, request, plan)
            assert found is not None
            assert plan.total_bytes == found.total
        assert (VIDEO, plan_memory(manifest, VIDEO, None)) in compared


@pytest.mark.parametrize("chunk", [Range(2, 8, 14), Range(4, 8, 14), Range(5, 5, 14), Range(8, 8, 8)])
def test_compared_plans_can_be_run(chunk: Range) -> None:
    """A smallest chunk of more than one frame may leave a last chunk that the bundle does not take."""
    manifest = default(chunk=chunk)
    for request, plan in compare_plans(manifest):
        assert plan_memory(manifest, replace(request, decode_chunk_size=plan.decode_chunk_size), None)
    assert compare_plans(manifest) or chunk.fixed


def test_buffers() -> None:
    """Five buffers of latents, conditions and coefficients, and two of decoded frames with their latents."""
    plan = plan_memory(default(), VIDEO, None)
    found = plan_footprint(default(), VIDEO, plan)
    assert found is not None
    latents = 4 * 4 * 72 * 128
    loop = 5 * 25 * latents + 2 * latents + 2 * 1024 * 4 + 3 * 4 + 2 * 25 * 4 + 7 * 4
    table = 1000 * 7 * 4
    assert found.buffers == loop + table + 2 * (5 * latents + 5 * 3 * 576 * 1024)
    split = plan_footprint(default(), VIDEO, replace(plan, split_guidance=True))
    assert split is not None
    # The result of the first pass; each branch has its own times and coefficients, and its conditions as before.
    assert split.buffers == found.buffers + 25 * latents + 3 * 4 + 7 * 4 + table
    # Steps without guidance have the conditions of one branch, and take the rest of the others.
    in_part = replace(VIDEO, guided_in_part=True)
    for one in (plan, replace(plan, split_guidance=True)):
        whole, part = plan_footprint(default(), VIDEO, one), plan_footprint(default(), in_part, one)
        assert whole is not None
        assert part is not None
        assert part.buffers == whole.buffers + latents + 1024 * 4 + 3 * 4 + 25 * 4


def test_refusals_name_what_works() -> None:
    with pytest.raises(BudgetError) as error:
        plan_memory(default(), VIDEO, 4 * GB)
    assert str(error.value) == (
        "4 GB is not enough for 25 frames of 1024x576: the smallest budget that works is 5.12 GB (one engine at a "
        "time, guidance branches one at a time, decoding 3 frames at a time); "
        "a bundle built with --split-guidance --ff-chunks 4 needs less"
    )
    with pytest.raises(BudgetError) as error:
        plan_memory(low_memory(), VIDEO, 4_560_000_000)
    assert "4.56 GB is not enough" in str(error.value)
    assert "4.94 GB" in str(error.value)
    assert "--split-guidance" not in str(error.value), "it is built that way"
    assert plan_memory(low_memory(), VIDEO, 4_940_000_000), "the figure is rounded up, so it works"


def test_refusals_say_what_a_smaller_chunk_allows() -> None:
    fixed = replace(VIDEO, decode_chunk_size=25)
    with pytest.raises(BudgetError, match=r"is 23\.19 GB \(.*\); decode_chunk_size 5 instead of 25 fits; a bundle"):
        plan_memory(default(), fixed, 12 * GB)
    with pytest.raises(BudgetError, match=r"; with decode_chunk_size 1 instead of 25, 5\.12 GB is enough; a bundle"):
        plan_memory(default(), fixed, 4 * GB)
    with pytest.raises(BudgetError) as error:
        plan_memory(default(), replace(VIDEO, decode_chunk_size=1), 4 * GB)
    assert "decode_chunk_size" not in str(error.value)


def test_unknown_figures() -> None:
    for engines, words in ((False, "has no engines"), (True, "did not report it")):
        manifest = without_figures(default(), engines=engines)
        assert smallest_budget(manifest, VIDEO) is None
        assert plan_memory(manifest, VIDEO, None) == MemoryPlan(True, False, 5)
        with pytest.raises(BudgetError, match=f"{words}.*svd-trt build .* --backend tensorrt-rtx"):
            plan_memory(manifest, VIDEO, 8 * GB)


@pytest.mark.parametrize(
    "changes",
    [{"frames": 26}, {"height": 512}, {"width": 1032}, {"frames": 1}, {"videos": 0}, {"decode_chunk_size": 0}],
)
def test_requests_outside_the_bundle(changes: dict[str, int]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(changes))):
        plan_memory(default(), replace(VIDEO, **changes), None)  # type: ignore[arg-type]


def test_pictures_and_batches_are_counted_to_what_the_bundle_takes() -> None:
    many = replace(VIDEO, pictures=4, videos=4)
    assert plan_memory(default(), many, None).total_bytes == plan_memory(default(), VIDEO, None).total_bytes


def test_a_shallow_denoiser_is_counted_if_it_runs() -> None:
    """Its engine is loaded beside the denoiser's, and the features take 147 MB for both branches in any case."""
    plain = default()
    figures = DEFAULT | {SHALLOW: (121_000_000, 4_000_000_000)}
    manifest = full_size(figures, deep_channels=640)
    features = 2 * 25 * 640 * 36 * 64 * 2
    assert features == 147_456_000
    deep, shallow = (plan_memory(manifest, replace(VIDEO, shallow_steps=steps), None) for steps in (False, True))
    without = plan_memory(plain, VIDEO, None)
    assert deep.total_bytes == (without.total_bytes or 0) + features
    assert shallow.total_bytes == deep.total_bytes + 121_000_000
    assert (deep.shallow_steps, shallow.shallow_steps) == (False, True)
    assert shallow.activation_bytes == DEFAULT["denoiser"][1]
    large = full_size(figures | {SHALLOW: (121_000_000, 5_000_000_000)}, deep_channels=640)
    most = plan_memory(large, replace(VIDEO, shallow_steps=True), None).activation_bytes
    assert most == 5_000_000_000 // 256 * 256 + (256 if 5_000_000_000 % 256 else 0)
    alone = plan_footprint(manifest, replace(VIDEO, shallow_steps=True), MemoryPlan(False, False, 1))
    assert alone is not None
    assert (alone.weights, alone.activations) == (DEFAULT["denoiser"][0] + 121_000_000, DEFAULT["denoiser"][1])
    split = plan_footprint(manifest, VIDEO, MemoryPlan(True, True, 5))
    plain_split = plan_footprint(plain, VIDEO, MemoryPlan(True, True, 5))
    assert split is not None
    assert plain_split is not None
    assert split.buffers == plain_split.buffers + features, "each pass keeps the features of its branch"
