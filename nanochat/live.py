"""
A web page with the curves of all training logs, without W&B or Grafana:

    python -m nanochat.report live      # then open the address that it prints; Ctrl-C ends it

It draws every number in $NANOCHAT_BASE_DIR/logs/*.jsonl and updates itself every few seconds.
"""

import json
import math
import signal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from nanochat.common import UserError, get_base_dir
from nanochat.plots import STAGE_TITLES, read_log

PAGE = Path(__file__).with_name("live.html")
POINTS = 500  # per curve, as many as a screen can show


def thinned(records, points=POINTS) -> dict[str, list]:
    """
    Records as columns of at most `points` values: key → values, None where there is none.

    Neighbouring records are merged: the last position (step, total_…), the mean of everything else.
    """
    size = math.ceil(len(records) / points) or 1
    parts = [records[i : i + size] for i in range(0, len(records), size)]

    def value(part, key):
        numbers = [r[key] for r in part if isinstance(r.get(key), int | float) and math.isfinite(r[key])]
        if not numbers:
            return None
        is_position = key == "step" or key.startswith("total_")
        return float(f"{numbers[-1] if is_position else sum(numbers) / len(numbers):.7g}")

    keys = dict.fromkeys(key for record in records for key in record)
    columns = {key: [value(part, key) for part in parts] for key in keys}
    return {key: values for key, values in columns.items() if any(v is not None for v in values)}


class Logs:
    """The logs in a folder. Files that have not changed are not read again."""

    def __init__(self, folder):
        self.folder, self.known = Path(folder), {}

    def runs(self) -> list[dict]:
        """{"name", "stage", "changed" (seconds since the epoch), "columns" or "error"} of each log, newest first."""
        runs = []
        for path in self.folder.glob("*.jsonl"):
            stat = path.stat()
            mark = stat.st_mtime_ns, stat.st_size
            if self.known.get(path, (None,))[0] != mark:
                self.known[path] = mark, self._read(path, stat.st_mtime)
            runs.append(self.known[path][1])
        return sorted(runs, key=lambda run: (-run["changed"], run["name"]))

    @staticmethod
    def _read(path, changed):
        stage = path.stem.partition("_")[0]
        run = {"name": path.stem, "stage": STAGE_TITLES.get(stage, stage), "changed": changed}
        try:
            return {**run, "columns": thinned(read_log(path))}
        except UserError as error:  # in the log of one run, which must not hide the others
            return {**run, "error": str(error)}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/":
            self._answer("text/html; charset=utf-8", PAGE.read_bytes())
        elif self.path == "/data.json":
            self._answer("application/json", json.dumps(self.server.logs.runs()).encode())
        else:
            self.send_error(404)

    def _answer(self, kind, body):
        self.send_response(200)
        for name, value in (("Content-Type", kind), ("Content-Length", len(body)), ("Cache-Control", "no-store")):
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class LiveServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host, port, logs):
        self.logs = logs
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise UserError(
                f"cannot listen on {host}:{port} ({error.strerror}): choose another --port; 0 is any free one"
            ) from error


def show(host, port):
    """Run `python -m nanochat.report live`: serve until interrupted."""
    logs = Logs(get_base_dir() / "logs")
    with LiveServer(host, port, logs) as server:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it otherwise
        print(f"{logs.folder} is shown at http://{host}:{server.server_port}/ (Ctrl-C ends)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
