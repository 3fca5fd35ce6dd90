"""Run as a program inside a network namespace: serves the smallest model, has one chat with it, and tells the answer.

Knows a folder, which is all that the server has for a home. Its last line is the answer's JSON.
"""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from PIL import Image

URL = "http://127.0.0.1:8321"


def call(path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(URL + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def main(folder: Path) -> int:
    home, temporary = folder / "home", folder / "tmp"
    home.mkdir()
    temporary.mkdir()
    # Nothing says that this machine is offline: the server must not need to be told.
    kept = {"PATH", "PYTHONPATH", "OMP_NUM_THREADS", "LD_LIBRARY_PATH"}
    environment = {name: value for name, value in os.environ.items() if name in kept}
    environment |= {"HOME": str(home), "TMPDIR": str(temporary)}
    arguments = ["serve", "--random", "tiny", "--port", "8321", *sys.argv[2:]]
    server = subprocess.Popen(
        [sys.executable, "-m", "sightline_server.cli.main", *arguments], env=environment, stdout=sys.stderr
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                call("/ready")
                break
            except (OSError, urllib.error.URLError):
                assert server.poll() is None, server.returncode
                assert time.monotonic() < deadline, "the server never got ready"
                time.sleep(0.2)
        picture = io.BytesIO()
        Image.new("RGB", (40, 30), "teal").save(picture, "PNG")
        url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
        body = {"model": "random-tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 5}
        answer = call("/v1/chat/completions", body | {"ignore_eos": True})
    finally:
        server.send_signal(signal.SIGTERM)
        status = server.wait(30)
    print(json.dumps(answer))
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
