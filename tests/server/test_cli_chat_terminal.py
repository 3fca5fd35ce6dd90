"""`sightline chat` as a person meets it: a pseudo terminal, keys in, screen out."""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from chat_stub import Stub, chunk, reply
from PIL import Image

AT_TERMINAL = """
import argparse, fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from sightline_server.cli import chat
parser = argparse.ArgumentParser()
chat.add_parser(parser.add_subparsers())
sys.exit(chat.run(parser.parse_args(["chat", *sys.argv[1:]])))
"""


def wait_until_it_listens():
    """A Ctrl-C between what is printed and the wait for keys or bytes is held back until the next of them comes."""
    time.sleep(0.3)


@pytest.fixture
def stub():
    server = Stub()
    yield server
    server.close()


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (8, 8), "red").save(path)
    return path


class Terminal:
    """A person at a pseudo terminal: types, and waits for what should appear."""

    def __init__(self, *words, cwd):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        environment = {**os.environ, "TERM": "xterm", "HOME": str(cwd), "INPUTRC": "/dev/null"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", AT_TERMINAL, *words],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True, cwd=cwd, env=environment,
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def expect(self, pattern, timeout=20.0):
        """Wait until ``pattern`` appears in what came after the last match; returns what led up to its end."""
        end = time.monotonic() + timeout
        while not (match := re.search(pattern, self.seen)):
            left = end - time.monotonic()
            assert left > 0, f"{pattern!r} never appeared in {self.seen!r}"
            if select.select([self.master], [], [], left)[0]:
                try:
                    data = os.read(self.master, 65536)
                except OSError:  # the other end is closed
                    data = b""
                assert data, f"ended before {pattern!r}: {self.seen!r}"
                self.seen += data.decode()
        text, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return text

    def type(self, text):
        os.write(self.master, text.encode())

    def end(self):
        with contextlib.suppress(OSError):
            while select.select([self.master], [], [], 10)[0] and os.read(self.master, 65536):
                pass
        return self.process.wait(timeout=20)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(stub, picture, tmp_path):
    person = Terminal("--url", stub.url, cwd=tmp_path)
    person.expect(r"stub-1 at .*\n")
    person.expect(r"> ")
    yield person
    person.close()


def test_a_whole_conversation(stub, terminal, tmp_path):
    stub.replies = [[0.5, *reply("Red.")], reply("Still ", "\x1b[31mred."), (400, {"error": {"message": "Too long."}})]
    terminal.type("/image red.png\n")
    terminal.expect(r"attached red.png")
    terminal.expect(r"\[1 picture\] > ")
    terminal.type("What colour?\n")
    terminal.expect(r"Red\.\r\n")
    terminal.expect(r"2 tokens · first word after 0\.[5-9]\d s · 0 of 40 prompt tokens cached")
    terminal.expect(r"> ")
    terminal.type("/system Be kind.\nAnd now?\n")
    shown = terminal.expect(r"red\.\r\n")
    assert "\x1b[31m" not in shown
    second = stub.asked[1]["messages"]
    assert [message["role"] for message in second] == ["system", "user", "assistant", "user"]
    assert second[1]["content"][0]["type"] == "image_url"
    assert second[2]["content"] == "Red."
    terminal.type("third\n")
    terminal.expect(r"Too long\.")
    terminal.type("/images\n")
    terminal.expect(r"sent +red.png")
    terminal.type("/save talk.json\n")
    terminal.expect(r"Saved 2 turns")
    terminal.type("/save talk.json\n")
    terminal.expect(r"exists already")
    terminal.type("/help\n")
    terminal.expect(r"/clear.* start a new conversation")
    terminal.type("/nonsense\n")
    terminal.expect(r"no command /nonsense")
    terminal.expect(r"> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved["model"] == "stub-1"
    assert [message["role"] for message in saved["messages"]] == ["system", "user", "assistant", "user", "assistant"]


def test_path_in_the_text_and_clear(stub, terminal):
    stub.replies = [reply("Red."), reply("Hello.")]
    terminal.type("What is in red.png?\n")
    terminal.expect(r"attached red.png")
    terminal.expect(r"Red\.\r\n")
    assert stub.asked[0]["messages"][0]["content"][1]["text"] == "What is in red.png?"
    terminal.type("./gone.png what?\n")
    terminal.expect(r"no file ./gone.png, so nothing was sent")
    terminal.type("/clear\nhello\n")
    terminal.expect(r"Hello\.\r\n")
    assert stub.asked[1]["messages"] == [{"role": "user", "content": "hello"}]
    terminal.type("/quit\n")
    assert terminal.end() == 0


def test_history_brings_a_line_back_and_tab_completes(stub, terminal):
    stub.replies = [reply("One."), reply("Two.")]
    terminal.type("first question\n")
    terminal.expect(r"One\.\r\n")
    terminal.expect(r"> ")
    terminal.type("\x1b[A\n")
    terminal.expect(r"Two\.\r\n")
    assert stub.asked[1]["messages"][-1]["content"] == "first question"
    terminal.type("/image re\t\n")
    terminal.expect(r"attached red.png")


def test_ctrl_c_stops_the_answer_and_closes_the_stream(stub, terminal):
    stub.replies = [[chunk("Once upon"), 30.0], reply("Fine.")]
    terminal.type("a story\n")
    terminal.expect(r"Once upon")
    wait_until_it_listens()
    terminal.type("\x03")
    terminal.expect(r"stopped")
    assert stub.closed_early.wait(10)
    terminal.expect(r"> ")
    terminal.type("go on\n")
    terminal.expect(r"Fine\.\r\n")
    assert [message["content"] for message in stub.asked[1]["messages"]] == ["a story", "Once upon", "go on"]
    terminal.expect(r"> ")
    wait_until_it_listens()
    terminal.type("\x03")
    terminal.expect(r"Ctrl-D or /quit leaves")
    terminal.expect(r"> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_ctrl_c_in_a_single_question_exits_130(stub, tmp_path):
    stub.replies = [[chunk("Once upon"), 30.0]]
    person = Terminal("--url", stub.url, "a story", cwd=tmp_path)
    try:
        person.expect(r"Once upon")
        wait_until_it_listens()
        os.killpg(person.process.pid, signal.SIGINT)
        assert person.end() == 130
        assert stub.closed_early.wait(10)
    finally:
        person.close()


def test_a_terminal_without_a_server(tmp_path):
    person = Terminal("--url", "127.0.0.1:9", cwd=tmp_path)
    try:
        person.expect(r"error: `sightline serve` is not running")
        assert person.end() == 1
    finally:
        person.close()
