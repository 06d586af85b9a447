"""Where events and records go: nowhere, into a file, or (otlp.py) to a collector."""

import contextlib
import json
import math
import re
import time
import warnings
from pathlib import Path

from megacontext.telemetry.events import EVENTS, as_exported, events_of_step
from nanochat.common import UserError


class Telemetry:
    """The base class, which drops everything: what a run without an endpoint has."""

    listens = False  # whether events are kept or sent, so that making them is worth the time

    def event(self, name: str, attributes: dict, seconds: float | None = None):
        """
        Something of EVENTS that ended just now. Returns at once.

        attributes: str, bool, int, float, or a list of one of these. seconds: what it took, else its "milliseconds".
        Raises KeyError for what is not in the table: that is our mistake, and shows in any test.
        """
        known = EVENTS[name]
        for key in attributes:
            if re.sub(r"/\d+$", "/{lod}", key) not in known:
                raise KeyError(f"{name} has no attribute {key!r}")
        seconds = attributes.get("milliseconds", 0.0) / 1000 if seconds is None else seconds
        self._event(name, as_exported(attributes), seconds)

    def metrics(self, record: dict):
        """A record of the log, and the events it tells of; what is no finite number is left out. Returns at once."""
        finite = {k: v for k, v in record.items() if isinstance(v, int | float) and math.isfinite(v)}
        self._metrics(finite)
        for name, attributes in events_of_step(finite).items():
            self.event(name, attributes)

    def close(self):
        """Send what is still there, for a few seconds at most. May be called again."""

    def _event(self, name, attributes, seconds):
        pass

    def _metrics(self, record):
        pass


class JSONLines(Telemetry):
    """A line {"time", "service", "run", "event", "seconds", …attributes} or {"time", …, "metrics": {…}} each."""

    listens = True

    def __init__(self, path, head):
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (lives as long as the run)
        except OSError as error:
            raise UserError(f"MC_OTEL_ENDPOINT: cannot write to {path} ({error.strerror})") from error
        self.head, self.path = head, path

    def _event(self, name, attributes, seconds):
        self._write({"event": name, "seconds": seconds, **attributes})

    def _metrics(self, record):
        self._write({"metrics": record})

    def _write(self, record):
        if self.file is None:
            return
        try:
            self.file.write(json.dumps({"time": time.time(), **self.head, **record}) + "\n")
        except OSError as error:  # a full disk, most likely: the run goes on without
            warnings.warn(f"MC_OTEL_ENDPOINT: no more telemetry, {self.path}: {error.strerror}", stacklevel=2)
            self.close()

    def close(self):
        file, self.file = self.file, None
        if file:
            with contextlib.suppress(OSError):  # what could not be written before cannot be flushed now
                file.close()
