"""An OpenAI-compatible endpoint on the loopback interface, whose verdicts a test decides."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeJudge(ThreadingHTTPServer):
    """Answers each chat completion with `verdict(text)`; an integer is the HTTP status of a failure."""

    def __init__(self, verdict: Callable[[str], str | int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.verdict = verdict
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, FakeJudge)
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.requests.append(request)
        server.keys.add(self.headers["Authorization"])
        verdict = server.verdict(request["messages"][0]["content"])
        message = {"role": "assistant", "content": verdict}
        body: dict[str, Any] = {"id": "1", "object": "chat.completion", "created": 0, "model": request["model"]}
        body["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
        if isinstance(verdict, int):
            body = {"error": {"message": f"no, not with {self.headers['Authorization']}"}}
        data = json.dumps(body).encode()
        self.send_response(verdict if isinstance(verdict, int) else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def fake_judge(verdict: Callable[[str], str | int]) -> Iterator[FakeJudge]:
    server = FakeJudge(verdict)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
