"""A real server on loopback that speaks OpenAI's chat completions and answers as a test tells it to."""

import json
import re
import threading
from collections.abc import Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import NamedTuple


class Reply(NamedTuple):
    """What is sent instead of an answer."""

    status: int
    content: str = "{}"
    headers: Mapping[str, str] = MappingProxyType({"Retry-After": "0"})


@contextmanager
def chat_server(answer):
    """Serve answers; yield the address, and the requests so far, each with its headers under "headers".

    answer: of the text that was asked, what the model says, a whole message, or a Reply.
    """
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({**body, "headers": dict(self.headers), "path": self.path})
            said = answer(body["messages"][-1]["content"])
            if not isinstance(said, Reply):
                message = said if isinstance(said, dict) else {"role": "assistant", "content": said}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
                told = {"object": "chat.completion", "model": body["model"], "choices": [choice], "usage": usage}
                said = Reply(200, json.dumps(told), {})
            self.send_response(said.status)
            for name, value in {**said.headers, "Content-Length": str(len(said.content.encode()))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(said.content.encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", requests
        finally:
            server.shutdown()


def longer(asked):
    """Judge by length, whatever the order; say yes to everything else."""
    if "<answer_a>" not in asked:
        return "Yes."
    a, b = (re.search(f"<answer_{each}>\n(.*)\n</answer_{each}>", asked, re.S)[1] for each in "ab")
    return f"The longer one. [[{'C' if len(a) == len(b) else 'A' if len(a) > len(b) else 'B'}]]"
