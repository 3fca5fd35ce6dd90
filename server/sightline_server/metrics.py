"""What Prometheus is told: counts and times of requests, and the engine's own figures, read when it asks.

Knows names and buckets. Knows the engine by the shape of its figures only.
"""

import time
from collections.abc import Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN_TOKENS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_END_TO_END_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

# Metric, field of EngineStats, help.
_GAUGES = (
    ("sightline_requests_running", "running", "Requests the engine has begun."),
    ("sightline_requests_waiting", "waiting", "Requests in the engine's queue, not begun."),
    ("sightline_kv_blocks_used", "blocks_used", "Key/value cache blocks in use."),
    ("sightline_kv_blocks", "blocks_total", "Key/value cache blocks there are."),
)
_COUNTERS = (
    ("sightline_prompt_tokens", "prompt_tokens_total", "Prompt tokens, those of images included."),
    ("sightline_image_tokens", "image_tokens_total", "Prompt tokens that stand for images."),
    ("sightline_generated_tokens", "generated_tokens_total", "Tokens sampled."),
    ("sightline_prefix_cache_queries", "prefix_queries_total", "Prompt tokens looked up in the prefix cache."),
    ("sightline_prefix_cache_hits", "prefix_hits_total", "Prompt tokens found in the prefix cache."),
    ("sightline_encoder_cache_queries", "encoder_queries_total", "Images looked up in the encoder cache."),
    ("sightline_encoder_cache_hits", "encoder_hits_total", "Images found in the encoder cache."),
    ("sightline_images_encoded", "images_encoded_total", "Images run through the vision tower."),
    ("sightline_preemptions", "preemptions_total", "Requests put back because the cache was full."),
    ("sightline_engine_steps", "steps_total", "Steps the engine has taken."),
    ("sightline_graph_steps", "graph_steps_total", "Decode steps replayed from a graph."),
)


class EngineFigures(Protocol):
    """An engine client, as far as it is looked at from here."""

    @property
    def num_ready(self) -> int: ...
    @property
    def restarts(self) -> int: ...
    @property
    def stats(self) -> object:
        """Holds the fields named in the two tables above as numbers."""


class ImageFigures(Protocol):
    @property
    def decoded_total(self) -> int: ...


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "sightline_requests",
            "Answered HTTP requests by how they ended: completed, refused, overloaded, failed, cancelled.",
            ["endpoint", "outcome"],
            registry=self.registry,
        )
        self.in_flight = Gauge("sightline_http_requests_in_flight", "Requests being answered.", registry=self.registry)
        self.first_token = Histogram(
            "sightline_time_to_first_token_seconds",
            "From a chat request's arrival to its first token.",
            buckets=_FIRST_TOKEN_S,
            registry=self.registry,
        )
        self.between_tokens = Histogram(
            "sightline_inter_token_seconds",
            "Between two tokens of one choice.",
            buckets=_BETWEEN_TOKENS_S,
            registry=self.registry,
        )
        self.end_to_end = Histogram(
            "sightline_request_seconds",
            "From a chat request's arrival to the end of its completed answer.",
            buckets=_END_TO_END_S,
            registry=self.registry,
        )

    def watch(self, engine: EngineFigures, images: ImageFigures) -> None:
        """Report these two as well, as they stand whenever the page is rendered."""
        self.registry.register(_Watched(engine, images))

    def render(self) -> bytes:
        """The page, in Prometheus' text format."""
        return generate_latest(self.registry)


class Timeline:
    """The tokens of one HTTP request as they arrive, told to the histograms."""

    def __init__(self, metrics: Metrics, arrived: float) -> None:
        """``arrived`` is the request's arrival by ``time.perf_counter``."""
        self._metrics = metrics
        self._arrived = arrived
        self._last: dict[int, float] = {}

    def token(self, choice: int) -> None:
        now = time.perf_counter()
        if choice in self._last:
            self._metrics.between_tokens.observe(now - self._last[choice])
        elif not self._last:
            self._metrics.first_token.observe(now - self._arrived)
        self._last[choice] = now


class _Watched(Collector):
    def __init__(self, engine: EngineFigures, images: ImageFigures) -> None:
        self._engine = engine
        self._images = images

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        yield GaugeMetricFamily("sightline_engine_ready", "Engines that answer.", value=self._engine.num_ready)
        yield CounterMetricFamily("sightline_engine_restarts", "Times it died.", value=self._engine.restarts)
        yield CounterMetricFamily("sightline_images_decoded", "Images decoded.", value=self._images.decoded_total)
        for name, attribute, text in _GAUGES:
            yield GaugeMetricFamily(name, text, value=getattr(stats, attribute))
        for name, attribute, text in _COUNTERS:
            yield CounterMetricFamily(name, text, value=getattr(stats, attribute))
