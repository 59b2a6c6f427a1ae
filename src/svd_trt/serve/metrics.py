"""What Prometheus reads at ``/metrics``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector, generate_latest

__all__ = ["Metrics"]

_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)


class Metrics:
    """The counters of one server, in a registry of their own. ``replica`` is its name, if there are several."""

    def __init__(self, replica: str | None = None) -> None:
        self._registry = CollectorRegistry()
        self._replica = replica
        ProcessCollector(registry=self._registry)
        self._videos = Counter(
            "svd_trt_videos",
            "Videos that have ended, by how: completed, failed, cancelled.",
            ["model", "status"],
            registry=self._registry,
        )
        self._frames = Counter("svd_trt_frames", "Frames that were decoded.", ["model"], registry=self._registry)
        self._stages = Histogram(
            "svd_trt_stage_seconds",
            "Time of a stage of a call, which makes one video or several.",
            ["model", "stage"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._whole = Histogram(
            "svd_trt_video_seconds",
            "Time of a video, from when it leaves the queue to its files.",
            ["model"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._calls = Histogram(
            "svd_trt_batch_size",
            "Videos that one call makes.",
            ["model"],
            buckets=(1, 2, 4, 8, 16),
            registry=self._registry,
        )
        self._refused = Counter(
            "svd_trt_refused_requests", "Requests that got an error, by its type.", ["type"], registry=self._registry
        )
        self._waiting = Gauge("svd_trt_waiting_jobs", "Jobs that wait.", ["model"], registry=self._registry)
        self._vram = Gauge(
            "svd_trt_vram_free_bytes", "Memory of the GPU that is free.", ["model"], registry=self._registry
        )

    def ended(self, model: str, status: str) -> None:
        """Count a job that has ended."""
        self._videos.labels(model, status).inc()

    def frame(self, model: str) -> None:
        """Count a frame."""
        self._frames.labels(model).inc()

    def call(self, model: str, videos: int) -> None:
        """Count a call that makes ``videos`` videos."""
        self._calls.labels(model).observe(videos)

    def stages(self, model: str, stages: Mapping[str, float]) -> None:
        """Note the times of a call's stages, in seconds."""
        for stage, spent in stages.items():
            self._stages.labels(model, stage).observe(spent)

    def video(self, model: str, seconds: float) -> None:
        """Note the time of a video that was made."""
        self._whole.labels(model).observe(seconds)

    def refused(self, kind: str) -> None:
        """Count a request that got an error."""
        self._refused.labels(kind).inc()

    def watch(self, model: str, waiting: Callable[[], int], free: Callable[[], int | None]) -> None:
        """Ask for the queue and the memory of ``model`` whenever the metrics are read."""
        self._waiting.labels(model).set_function(waiting)
        if free() is not None:
            self._vram.labels(model).set_function(lambda: free() or 0)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """All of them, with the name of the replica as a label."""
        for metric in self._registry.collect():
            if self._replica is not None:
                metric.samples = [
                    sample._replace(labels={**sample.labels, "replica": self._replica}) for sample in metric.samples
                ]
            yield metric
