"""A small stub of /v1 for the chat client: answers as planned, and remembers what it was asked.

Knows the wire. Knows nothing of the client under test.
"""

import json
import select
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def chunk(text=None, *, finish=None, **more):
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return "data: " + json.dumps({"choices": [choice], **more}) + "\n\n"


def reply(*pieces, finish="stop", cached=0):
    usage = {
        "prompt_tokens": 40,
        "completion_tokens": len(pieces) + 1,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    last = "data: " + json.dumps({"choices": [], "usage": usage}) + "\n\n"
    return [*(chunk(piece) for piece in pieces), chunk(finish=finish), last, "data: [DONE]\n\n"]


class Stub:
    """A /v1 of one model. ``replies`` are served in turn: a list of events (a float pauses), or (status, body)."""

    def __init__(self):
        self.replies = []
        self.asked = []
        self.headers = []
        self.models = (200, {"object": "list", "data": [{"id": "stub-1"}, {"id": "stub-2"}]})
        self.closed_early = threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                stub.headers.append(dict(self.headers))
                self.answer(*stub.models) if self.path == "/v1/models" else self.answer(404, "nothing here")

            def do_POST(self):
                stub.headers.append(dict(self.headers))
                stub.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                planned = stub.replies.pop(0)
                if isinstance(planned, tuple):
                    self.answer(*planned)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                try:
                    for event in planned:
                        if isinstance(event, float):
                            self.pause(event)
                        else:
                            self.wfile.write(event.encode())
                except (BrokenPipeError, ConnectionResetError):
                    stub.closed_early.set()

            def pause(self, seconds):
                """Wait, unless the client leaves meanwhile."""
                if select.select([self.connection], [], [], seconds)[0]:
                    raise BrokenPipeError

            def answer(self, status, body, **headers):
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                if status == 503:
                    self.send_header("Retry-After", "7")
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
