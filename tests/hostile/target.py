"""A true server under attack: what is sent to it, what it may answer, and what it must be like afterwards.

Knows raw requests, keys by their holders' names, the demo model and its figures. Knows no attack.
"""

import base64
import io
import json
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
from hostile.answers import RawResponse, exchange, problem_with
from hostile.chats import chat_body
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

CHAT = "/v1/chat/completions"
MODEL = "sightline-demo"


@dataclass
class Target:
    server: Any
    picture: str
    keys: dict[str, str]
    canaries: set[str] = field(default_factory=set)

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.server.url)
        return url.host, url.port or 0

    def send(self, raw: bytes, **how: Any) -> RawResponse:
        answer = exchange(self.address, raw, **{"timeout_s": 30.0} | how)
        assert problem_with(answer) is None
        return answer

    def head(self, line: str, *headers: str, key: str = "", host: str = "localhost") -> bytes:
        bearer = [f"Authorization: Bearer {self.keys.get(key, key)}"] if key else []
        return "\r\n".join([f"{line} HTTP/1.1", f"Host: {host}", *bearer, *headers, "", ""]).encode()

    def post(
        self, content: bytes, *headers: str, key: str = "mallory", path: str = CHAT, host: str = "localhost"
    ) -> bytes:
        length = f"Content-Length: {len(content)}"
        return (
            self.head(f"POST {path}", "Content-Type: application/json", length, *headers, key=key, host=host) + content
        )

    def ask(self, body: dict[str, Any], **how: Any) -> RawResponse:
        return self.send(self.post(json.dumps(body).encode(), **how))

    def chat(self, text: str, *urls: str, key: str = "mallory", **fields: Any) -> dict[str, Any]:
        """The answer to a question that must be answered."""
        answer = self.ask(chat_body(MODEL, text, *urls, temperature=0, **fields), key=key)
        assert answer.status == 200, answer.body[:300]
        made: dict[str, Any] = json.loads(answer.body)
        return made

    def refused(self, body: dict[str, Any], **how: Any) -> tuple[int | None, str, str]:
        """Status, code and place of a refusal, of which the engine never hears."""
        before = self.figures()["sightline_prompt_tokens_total"]
        answer = self.ask(body, **how)
        error = json.loads(answer.body)["error"]
        assert self.figures()["sightline_prompt_tokens_total"] == before
        return answer.status, error["code"], error["param"]

    def refused_undecoded(self, *urls: str) -> str:
        """The code of a refusal before any picture is decoded."""
        before = self.figures()["sightline_images_decoded_total"]
        status, code, _ = self.refused(chat_body(MODEL, "Hi", *urls))
        assert (status, self.figures()["sightline_images_decoded_total"]) == (400, before)
        return code

    def figures(self) -> dict[str, float]:
        answer = self.send(self.head("GET /metrics", key="admin"))
        families = text_string_to_metric_families(answer.body.decode())
        return {
            sample.name + str(sample.labels or ""): sample.value for family in families for sample in family.samples
        }

    def canary(self) -> str:
        asked = {"max_tokens": 24, "logprobs": True, "top_logprobs": 3}
        return json.dumps(self.chat("Describe the picture.", self.picture, key="alice", **asked)["choices"])

    def processes(self) -> set[int]:
        root = psutil.Process(self.server.process.pid)
        return {root.pid, *(child.pid for child in root.children(recursive=True))}

    def is_busy(self, figures: dict[str, float]) -> bool:
        return bool(figures["sightline_requests_running"] or figures["sightline_requests_waiting"])


def png_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def url_of(image: Image.Image, **how: Any) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", **how)
    return png_url(file.getvalue())


def image_of(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def image_tokens(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["image_tokens"])
