"""The README's examples, as a reader would run them, against the true server: they print what the README says."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from client_environments import CLIENTS, client_python
from PIL import Image, ImageDraw

ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text(encoding="utf-8")


def block(readme: str, language: str, holding: str = "") -> str:
    blocks = re.findall(rf"^```{language}\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)
    return next(text for text in blocks if holding in text)


def test_two_commands_set_everything_up(readme: str) -> None:
    commands = re.findall(r"^```bash\n(make \w+)\n```", readme, flags=re.MULTILINE)
    assert commands == ["make serve", "make test"]


@pytest.mark.parametrize("client", CLIENTS)
def test_python_example(readme: str, demo_server: Any, tmp_path: Path, client: str) -> None:
    example = block(readme, "python")
    assert ADDRESS in example
    script = tmp_path / "example.py"
    script.write_text(example.replace(ADDRESS, demo_server.url), encoding="utf-8")
    done = subprocess.run([client_python(client), script], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == block(readme, "text").strip()


def test_curl_example(readme: str, demo_server: Any, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    picture = Image.new("RGB", (192, 192), "white")
    ImageDraw.Draw(picture).ellipse((30, 70, 75, 115), fill="red")
    picture.save(tmp_path / "picture.png")
    command = block(readme, "bash", holding="curl ").replace(ADDRESS, demo_server.url)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert re.search(r'"content":\s*" ?1"', done.stdout), done.stdout + done.stderr
