"""A stand-in of W&B's server: what its client, unchanged, is answered while it sends runs."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HISTORY = "wandb-history.jsonl"


@dataclass
class WandbServer:
    """What has arrived.

    Attributes:
        url: of the server.
        streams: lines of each run's streamed files, by run and file.
        configs: the last configuration of each run.
        uploaded: names of files.
        unknown: operations that it answered with an error.
    """

    url: str = ""
    streams: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    uploaded: set[str] = field(default_factory=set)
    unknown: list[str] = field(default_factory=list)

    def history(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.streams[run][HISTORY]]

    def answer(self, name: str, given: dict[str, Any]) -> dict[str, Any] | None:
        """Data of a GraphQL operation; None for one that is not known here."""
        run = given.get("name") or ""
        if name == "RunResumeStatus":
            return {"model": {"id": "p", "name": given["project"], "bucket": self._resumed(run)}}
        if name == "UpsertBucket":
            if given.get("config"):
                self.configs[run] = json.loads(given["config"])
            entity = {"id": "e", "name": "us"}
            project = {"id": "p", "name": given.get("project"), "entity": entity}
            bucket = {"id": "b", "name": run, "config": "{}", "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if name == "Viewer":
            teams: dict[str, Any] = {"edges": []}
            return {"viewer": {"id": "u", "entity": "us", "username": "us", "teams": teams}}
        if name == "CreateRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.url}/upload/{f}"} for f in given["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        self.unknown.append(name)
        return None

    def _resumed(self, run: str) -> dict[str, Any] | None:
        if run not in self.streams:
            return None
        lines = {name: len(content) for name, content in self.streams[run].items()}
        return {
            "id": "b",
            "name": run,
            "summaryMetrics": "{}",
            "config": "{}",
            "tags": [],
            "historyLineCount": lines.get(HISTORY, 0),
            "eventsLineCount": lines.get("wandb-events.jsonl", 0),
            "logLineCount": 0,
            "historyTail": json.dumps(self.streams[run].get(HISTORY, [])[-1:]),
            "eventsTail": "[]",
            "wandbConfig": '{"t": 1}',
        }

    def stream(self, run: str, files: dict[str, Any]) -> None:
        """Lines take the place of what lies from their offset on, as at W&B."""
        for name, part in files.items():
            lines = self.streams.setdefault(run, {}).setdefault(name, [])
            lines[part["offset"] :] = part["content"]


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    found = WandbServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._say({})

        def do_PUT(self) -> None:
            self._body()
            found.uploaded.add(self.path.removeprefix("/upload/"))
            self._say({})

        def do_POST(self) -> None:
            body = self._body()
            if self.path == "/graphql":
                asked = json.loads(body)
                name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
                data = found.answer(name[1] if name else "", asked.get("variables") or {})
                self._say({"errors": [{"message": "unknown"}]} if data is None else {"data": data})
            elif self.path.endswith("/file_stream"):
                found.stream(self.path.split("/")[-2], json.loads(body).get("files") or {})
                self._say({"exitcode": None, "limits": {}})
            else:
                self._say({})

        def _body(self) -> bytes:
            body = b""
            if self.headers.get("transfer-encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
            return gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body

        def _say(self, answer: dict[str, Any]) -> None:
            text = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that is gone."""

    with Server(("127.0.0.1", 0), Handler) as server:
        found.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()
