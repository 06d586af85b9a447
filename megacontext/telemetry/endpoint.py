"""
Telemetry endpoint: exports spans of MegaContext's events and the metrics of the log to a collector or a file.

    MC_OTEL_ENDPOINT=http://localhost:4318     OTLP over HTTP; over gRPC with port 4317 or as grpc://host:port
    MC_OTEL_ENDPOINT=file:events.jsonl         a line of JSON for each event and each record
    MC_OTEL_INSECURE=1                         grpc:// without TLS; https:// without verifying the certificate
    OTEL_EXPORTER_OTLP_HEADERS=k=v,…           headers to send, such as a token (read by OpenTelemetry itself)

Without an endpoint nothing is exported and no exporter is imported. An endpoint that refuses, hangs or goes away does
not slow down or end a run: what cannot be sent is dropped, with one warning. Exactly the attributes in events.py's
tables are exported: counts, times and names; and text only from chat_web, if the environment asks for it.
"""

import atexit
import os
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from megacontext.telemetry.events import Telemetry
from nanochat.common import JSONLines, UserError, get_dist_info


class TelemetryFile(Telemetry):
    """Writes lines {"time", "service", "run", "event", "seconds", …attributes} or {"time", …, "metrics": {…}}."""

    listens = True

    def __init__(self, path, head):
        try:
            self.file = JSONLines(path)
        except OSError as error:
            raise UserError(f"MC_OTEL_ENDPOINT: cannot write to {path} ({error.strerror})") from error
        self.head = head

    def _event(self, name, attributes, seconds):
        self.file.write({"time": time.time(), **self.head, "event": name, "seconds": seconds, **attributes})

    def _metrics(self, record):
        self.file.write({"time": time.time(), **self.head, "metrics": record})

    def close(self):
        self.file.close()


@dataclass(frozen=True)
class Endpoint:
    """Where to export. protocol: "http", "grpc" or "file"; target: URL, host:port or path; tls: whether to encrypt."""

    protocol: str
    target: str
    tls: bool = False
    verify: bool = True


def parse_endpoint(text: str, insecure: bool = False) -> Endpoint:
    """The Endpoint in MC_OTEL_ENDPOINT, given MC_OTEL_INSECURE. Raises UserError for an invalid one."""
    complaint = UserError(
        f"MC_OTEL_ENDPOINT must be like http://localhost:4318, grpc://localhost:4317 or file:events.jsonl, got {text!r}"
    )
    scheme, _, rest = text.partition(":")
    if scheme == "file" and rest.removeprefix("//"):
        return Endpoint("file", rest.removeprefix("//"))
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        raise complaint from None
    if scheme not in ("http", "https", "grpc") or not url.hostname:
        raise complaint
    if scheme == "grpc" or port == 4317:
        tls = scheme == "https" or (scheme == "grpc" and not insecure)
        return Endpoint("grpc", url.netloc if port else f"{url.netloc}:4317", tls)
    return Endpoint("http", text.rstrip("/"), scheme == "https", verify=not insecure)


def open_telemetry(service: str, run: str, attributes: dict | None = None) -> Telemetry:
    """
    The exporter that the environment variables ask for; one that drops everything on ranks other than the first.

    service: the script, such as "base_train"; run: name of the run, such as "d4"; attributes: further ones of the run,
    such as {"device": "cpu"}. Raises UserError for an invalid endpoint.
    """
    text = os.environ.get("MC_OTEL_ENDPOINT", "").strip()
    if not text or get_dist_info()[1] != 0:
        return Telemetry()
    endpoint = parse_endpoint(text, os.environ.get("MC_OTEL_INSECURE", "0").lower() in ("1", "true", "yes"))
    if endpoint.protocol == "file":
        telemetry = TelemetryFile(endpoint.target, {"service": service, "run": run, **(attributes or {})})
    else:
        from megacontext.telemetry.otlp import OTLP  # here: about a second and 40 MB that others are spared

        resource = {"service.name": service, "service.instance.id": run, **(attributes or {})}
        telemetry = OTLP(endpoint, resource)
    atexit.register(telemetry.close)  # for runs that end by an error
    return telemetry
