"""A local server that speaks OpenAI's chat completions, well, badly or not at all."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# A request's body, and how many requests came before it -> text of the answer, or status, headers
# and body; None hangs up.
Answer = str | tuple[int, dict[str, str], str] | None
Behaviour = Callable[[dict[str, Any], int], Answer]


@dataclass
class Server:
    """What a running server was asked.

    Attributes:
        url: as `suite.judge.url` takes it.
        requests: bodies of the completions that were asked for, in order.
        keys: their headers `Authorization`.
        most_at_once: requests that were under way together.
        ended: set when the test is over; a slow answer waits for it.
    """

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most_at_once: int = 0
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def prompts(self) -> list[str]:
        """The user's message of each request."""
        return [request["messages"][-1]["content"] for request in self.requests]


@contextmanager
def judge_server(behaviour: Behaviour, models: Any = ("judge",)) -> Iterator[Server]:
    """A server on a free port of this host.

    Args:
        models: that it lists; a number is the status of that page.
    """
    lock, under_way = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            if isinstance(models, int):
                self.reply(models, {}, "{}")
            else:
                data = [{"id": model} for model in models]
                self.reply(200, {}, json.dumps({"object": "list", "data": data}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions"
            with lock:
                number = len(server.requests)
                server.requests.append(body)
                server.keys.append(self.headers["Authorization"])
                under_way[0] += 1
                server.most_at_once = max(server.most_at_once, under_way[0])
            answer = behaviour(body, number)
            with lock:
                under_way[0] -= 1
            if answer is None:
                self.close_connection = True
            elif isinstance(answer, str):
                self.reply(200, {}, completion(answer))
            else:
                self.reply(*answer)

        def reply(self, status: int, headers: dict[str, str], text: str) -> None:
            try:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # whoever asked has not waited

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server = Server(f"http://127.0.0.1:{http.server_port}/v1")
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        http.shutdown()
        thread.join()
        http.server_close()


def completion(text: str | None, finish_reason: str = "stop") -> str:
    """The body of a chat completion."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return json.dumps({"object": "chat.completion", "model": "judge", "choices": [choice]})
