"""
OpenTelemetry's exporters, set up so that a slow or missing collector never delays or ends a run: see endpoint.py.

Spans go into a bounded queue; of each metric the newest value is kept. Threads of the SDK send both; they are daemons,
so a process can end while one waits for a collector.
"""

import logging
import os
import re
import threading
import time

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its C library has a log of its own

import requests
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Status, StatusCode

from megacontext.telemetry.events import EVENT_GAUGES, EVENT_HISTOGRAMS, METRICS, Telemetry, metric_of

SEND_SECONDS = 2  # one batch, all tries together
CLOSE_SECONDS = 2  # what is left, at the end
SPANS_EVERY, METRICS_EVERY = 1.0, 5.0  # seconds
QUEUE, BATCH = 2048, 256  # spans
BOUNDARIES = {  # of histograms
    "gen_ai.client.token": [16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576],
    "gen_ai.server": [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100],
}
CHAT_LABELS = ("gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model", "error.type")

logger = logging.getLogger(__name__)
sdk_logger = logging.getLogger("opentelemetry")


class _OneWarning(logging.Handler):
    """Replaces all messages of the SDK about an unavailable collector by a single warning."""

    def __init__(self, endpoint):
        super().__init__(logging.WARNING)
        self.endpoint, self.warned = endpoint, False

    def emit(self, record):
        if not self.warned:
            self.warned = True
            logger.warning(
                "%s does not accept telemetry (%s); the run continues, and what cannot be sent is lost",
                self.endpoint.target,
                record.getMessage(),
            )


def _exporters(endpoint):
    """(of spans, of metrics)"""
    if endpoint.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        options = {"endpoint": endpoint.target, "insecure": not endpoint.tls, "timeout": SEND_SECONDS}
        return OTLPSpanExporter(**options), OTLPMetricExporter(**options)
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    def options(path):  # a session each: they are used by two threads
        session = requests.Session()
        session.verify = endpoint.verify
        return {"endpoint": f"{endpoint.target}/v1/{path}", "timeout": SEND_SECONDS, "session": session}

    return OTLPSpanExporter(**options("traces")), OTLPMetricExporter(**options("metrics"))


class OTLP(Telemetry):
    """resource: attributes that all spans and metrics of this process have."""

    listens = True

    def __init__(self, endpoint, resource):
        self.handler = _OneWarning(endpoint)
        sdk_logger.addHandler(self.handler)
        sdk_logger.propagate = False
        resource = Resource.create(resource)
        span_exporter, metric_exporter = _exporters(endpoint)
        self.traces = TracerProvider(resource=resource, shutdown_on_exit=False)
        self.traces.add_span_processor(
            BatchSpanProcessor(
                span_exporter,
                max_queue_size=QUEUE,
                max_export_batch_size=BATCH,
                schedule_delay_millis=1000 * SPANS_EVERY,
            )
        )
        reader = PeriodicExportingMetricReader(metric_exporter, 1000 * METRICS_EVERY, 1000 * SEND_SECONDS)
        self.meters = MeterProvider([reader], resource, shutdown_on_exit=False)
        self.tracer, self.meter = self.traces.get_tracer("megacontext"), self.meters.get_meter("megacontext")
        self.gauges, self.histograms = {}, {}
        self.closed = False

    def _event(self, name, attributes, seconds):
        now = time.time_ns()
        title = f"chat {attributes['gen_ai.request.model']}" if name == "chat" else name
        span = self.tracer.start_span(title, start_time=now - int(1e9 * seconds), attributes=attributes)
        if "error.type" in attributes:
            span.set_status(Status(StatusCode.ERROR))
        span.end(now)
        values = {**attributes, "seconds": seconds}
        for metric, (event, attribute, description) in EVENT_GAUGES.items():
            if event == name and "{lod}" in attribute:
                start = attribute.removesuffix("{lod}")
                for key in (key for key in values if key.startswith(start)):
                    self._gauge(metric, description).set(values[key], {"lod": int(key.removeprefix(start))})
            elif event == name and attribute in values:
                self._gauge(metric, description).set(values[attribute])
        for metric, event, attribute, labels, description in EVENT_HISTOGRAMS:
            if event == name and attribute in values:
                common = {label: attributes[label] for label in CHAT_LABELS if label in attributes}
                self._histogram(metric, description).record(values[attribute], {**common, **labels})

    def _metrics(self, record):
        for key, value in record.items():
            name, labels = metric_of(key)
            self._gauge(name, METRICS.get(re.sub(r"/\d+$", "/{lod}", key), "")).set(value, labels)

    def _gauge(self, name, description):
        if name not in self.gauges:
            self.gauges[name] = self.meter.create_gauge(name, description=description)
        return self.gauges[name]

    def _histogram(self, name, description):
        if name not in self.histograms:
            boundaries = next(values for start, values in BOUNDARIES.items() if name.startswith(start))
            self.histograms[name] = self.meter.create_histogram(
                name, description=description, explicit_bucket_boundaries_advisory=boundaries
            )
        return self.histograms[name]

    def close(self):
        if self.closed:
            return
        self.closed = True
        threads = [threading.Thread(target=p.shutdown, daemon=True) for p in (self.traces, self.meters)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + CLOSE_SECONDS
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        if not any(thread.is_alive() for thread in threads):  # else they may still have something to complain of
            sdk_logger.removeHandler(self.handler)
