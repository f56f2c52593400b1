"""What Prometheus reads: counts and histograms kept as plain numbers, rendered when asked for.

The same measurements appear as `baton_*` and, for dashboards and gateways that know them, under the dozen `vllm:*`
names that they read. Event loop only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector

from baton import __version__
from protos import worker_pb2 as pb
from router.admission import Admission
from router.fleet import Fleet
from router.timeline import Timeline

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_TTFT_S: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_ITL_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20)
_STAGE_S: Final = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOTAL_S: Final = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_STAGES: Final = (
    "route",
    "queue",
    "prefill",
    "transfer",
    "transfer_hidden",
    "transfer_exposed",
    "handover",
    "failover",
    "decode",
)


class Histogram:
    """Counts per bucket and a sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: list[str]) -> None:
        """As one labelled sample of a metric."""
        total, buckets = 0, []
        for bound, count in zip((*map(str, map(float, self._bounds)), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric(labels, buckets, self._sum)


class Metrics:
    """One router's measurements."""

    def __init__(self, model: str, fleet: Fleet, admission: Admission) -> None:
        self._model = model
        self._fleet = fleet
        self._admission = admission
        self._outcomes: Counter[tuple[str, str]] = Counter()
        self._responses: Counter[str] = Counter()
        self._kv_bytes: Counter[str] = Counter()
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = self._attempts = 0
        self._ttft, self._itl, self._total = Histogram(_TTFT_S), Histogram(_ITL_S), Histogram(_TOTAL_S)
        self._stages = {stage: Histogram(_STAGE_S) for stage in _STAGES}
        self._statuses: Sequence[pb.WorkerStatus] = ()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def request_finished(self, timeline: Timeline) -> None:
        """Count one finished request."""
        outcome = timeline.error or timeline.finish_reason
        self._outcomes[timeline.endpoint, outcome] += 1
        self._attempts += len(timeline.attempts)
        self._prompt_tokens += timeline.num_prompt_tokens
        self._cached_tokens += timeline.num_cached_tokens
        self._generated_tokens += timeline.num_tokens
        for attempt in timeline.attempts:
            if attempt.kv_bytes:
                self._kv_bytes[attempt.transport or "unknown"] += attempt.kv_bytes
        if timeline.first_token is not None:
            self._ttft.observe(timeline.first_token - timeline.arrived)
        if timeline.finished is not None:
            self._total.observe(timeline.finished - timeline.arrived)
        for interval in timeline.intervals:
            self._itl.observe(interval)
        parts = timeline.waterfall()
        for stage, histogram in self._stages.items():
            if (value_ms := parts[f"{stage}_ms"]) is not None:
                histogram.observe(value_ms / 1e3)

    def response(self, status: int) -> None:
        """Count one HTTP response."""
        self._responses[str(status)] += 1

    def render(self, statuses: Sequence[pb.WorkerStatus]) -> bytes:
        """Prometheus's text format, with what the workers have just said of themselves."""
        self._statuses = statuses
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """For prometheus_client's registry."""
        yield from self._collect_baton()
        yield from self._collect_workers()
        yield from self._collect_vllm()

    def _collect_baton(self) -> Iterator[Metric]:
        yield _gauges("baton_build_info", "1, with the version as a label.", ["version"], [([__version__], 1)])
        yield _counters(
            "baton_requests",
            "Finished requests.",
            ["endpoint", "outcome"],
            [([*k], v) for k, v in self._outcomes.items()],
        )
        yield _counters(
            "baton_http_responses", "HTTP responses begun.", ["status"], [([k], v) for k, v in self._responses.items()]
        )
        yield _counters(
            "baton_kv_transferred_bytes",
            "KV moved between workers.",
            ["transport"],
            [([k], v) for k, v in self._kv_bytes.items()],
        )
        for name, help_text, value in (
            ("baton_prompt_tokens", "Prompt tokens of finished requests.", self._prompt_tokens),
            ("baton_cached_prompt_tokens", "Prompt tokens found in a prefix cache.", self._cached_tokens),
            ("baton_generated_tokens", "Tokens delivered.", self._generated_tokens),
            ("baton_attempts", "Attempts of finished requests; more than requests means fail-over.", self._attempts),
            ("baton_admission_refusals", "Requests refused for lack of room.", self._admission.num_refused),
            ("baton_kv_unreachable", "Hand-overs whose KV did not reach the decode worker.", self._fleet.reachability.num_failures),
            ("baton_stale_tokens", "Tokens of attempts that were over.", sum(link.num_stale_tokens for link in self._fleet.links.values())),
        ):  # fmt: skip
            yield _counters(name, help_text, [], [([], value)])
        yield _gauges("baton_requests_in_flight", "Generations running.", [], [([], self._admission.num_admitted)])
        yield _gauges("baton_serving", "1 if requests can be served.", [], [([], self._fleet.why_not_serving is None)])
        yield _gauges(
            "baton_kv_paths_broken",
            "Pairs of workers between which KV did not get through and has not since.",
            [],
            [([], len(self._fleet.reachability))],
        )
        views = self._fleet.views()
        for name, help_text, values in (
            ("baton_worker_up", "1 per connected worker.", [1 for _ in views]),
            ("baton_worker_waiting_tokens", "Prompt tokens still to compute.", [v.num_waiting_tokens for v in views]),
            ("baton_worker_capacity_blocks", "KV blocks in all.", [view.num_blocks for view in views]),
            ("baton_worker_free_blocks", "KV blocks free or evictable.", [view.num_free_blocks for view in views]),
        ):
            samples = [([v.key.worker_id, v.role], value) for v, value in zip(views, values, strict=True)]
            yield _gauges(name, help_text, ["worker_id", "role"], samples)
        for name, help_text, histogram in (
            ("baton_time_to_first_token_seconds", "Arrival to first token, at the router.", self._ttft),
            ("baton_inter_token_latency_seconds", "Between consecutive tokens, at the router.", self._itl),
            ("baton_request_duration_seconds", "Arrival to end, at the router.", self._total),
        ):
            yield _histograms(name, help_text, [], [([], histogram)])
        yield _histograms(
            "baton_request_stage_seconds",
            "Measured parts of requests.",
            ["stage"],
            [([k], v) for k, v in self._stages.items()],
        )

    def _collect_workers(self) -> Iterator[Metric]:
        """Worker ids as labels; every counter that a worker keeps becomes a metric of its own."""
        for name, help_text, part in (
            ("baton_worker_blocks", "KV blocks by state.", "blocks"),
            ("baton_worker_sequences", "Sequences by state.", "sequences"),
            ("baton_worker_transfers", "KV transfers by state.", "transfers"),
        ):
            samples = [
                ([status.worker_id, status.role, state], value)
                for status in self._statuses
                for state, value in sorted(getattr(status, part).items())
            ]
            yield _gauges(name, help_text, ["worker_id", "role", "state"], samples)
        for counter in sorted({name for status in self._statuses for name in status.counters}):
            samples = [([s.worker_id, s.role], s.counters[counter]) for s in self._statuses if counter in s.counters]
            yield _counters(f"baton_worker_{counter}", "A counter of the workers.", ["worker_id", "role"], samples)

    def _collect_vllm(self) -> Iterator[Metric]:
        names, labels = ["model_name", "engine"], [self._model, "0"]
        beats = [link.heartbeat for link in self._fleet.links.values() if link.hello is not None]
        views = self._fleet.views()
        num_blocks = sum(view.num_blocks for view in views)
        used = 1 - sum(view.num_free_blocks for view in views) / num_blocks if num_blocks else 0.0
        for name, help_text, value in (
            ("vllm:num_requests_running", "Sequences running.", sum(beat.num_running for beat in beats)),
            ("vllm:num_requests_waiting", "Sequences waiting.", sum(beat.num_waiting for beat in beats)),
            ("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0..1.", used),
        ):
            yield _gauges(name, help_text, names, [(labels, value)])
        for name, help_text, value in (
            ("vllm:prefix_cache_queries", "Prompt tokens looked up.", self._worker_sum("prefix_query_tokens")),
            ("vllm:prefix_cache_hits", "Prompt tokens found.", self._worker_sum("prefix_hit_tokens")),
            ("vllm:num_preemptions", "Preemptions.", self._worker_sum("preemptions")),
            ("vllm:prompt_tokens", "Prompt tokens.", self._prompt_tokens),
            ("vllm:generation_tokens", "Generated tokens.", self._generated_tokens),
        ):
            yield _counters(name, help_text, names, [(labels, value)])
        success: Counter[str] = Counter()
        for (_, outcome), count in self._outcomes.items():
            if outcome in ("stop", "length"):
                success[outcome] += count
        yield _counters(
            "vllm:request_success",
            "Finished requests.",
            [*names, "finished_reason"],
            [([*labels, k], v) for k, v in success.items()],
        )
        for name, help_text, histogram in (
            ("vllm:time_to_first_token_seconds", "Time to first token.", self._ttft),
            ("vllm:inter_token_latency_seconds", "Inter-token latency.", self._itl),
            ("vllm:e2e_request_latency_seconds", "Whole request.", self._total),
            ("vllm:request_queue_time_seconds", "Waiting at the prefill worker.", self._stages["queue"]),
            ("vllm:request_prefill_time_seconds", "Prefill.", self._stages["prefill"]),
            ("vllm:request_decode_time_seconds", "First to last token.", self._stages["decode"]),
        ):
            yield _histograms(name, help_text, names, [(labels, histogram)])

    def _worker_sum(self, counter: str) -> int:
        return sum(status.counters.get(counter, 0) for status in self._statuses)


def _counters(name: str, text: str, labels: list[str], samples: Iterable[tuple[list[str], float]]) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _gauges(name: str, text: str, labels: list[str], samples: Iterable[tuple[list[str], float]]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _histograms(name: str, text: str, labels: list[str], samples: Iterable[tuple[list[str], Histogram]]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=labels)
    for values, histogram in samples:
        histogram.add_to(family, values)
    return family
