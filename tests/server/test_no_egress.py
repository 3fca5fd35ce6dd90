"""`scripts/no_egress`: what it reads in a trace, and that it sees whoever tries to leave."""

import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/no_egress"


def load_script() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("no_egress", str(SCRIPT))
    spec = importlib.util.spec_from_loader("no_egress", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules["no_egress"] = module
    wrote, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    loader.exec_module(module)
    sys.dont_write_bytecode = wrote
    return module


no_egress = load_script()

QUIET = [
    '7  connect(3, {sa_family=AF_UNIX, sun_path="/var/run/nscd/socket"}, 110) = -1 ENOENT (No such file or directory)',
    '7  connect(3, {sa_family=AF_INET, sin_port=htons(8000), sin_addr=inet_addr("127.0.0.1")}, 16) = 0',
    '7  connect(3, {sa_family=AF_INET, sin_port=htons(8000), sin_addr=inet_addr("127.3.2.1")}, 16 <unfinished ...>',
    "7  <... connect resumed>) = -1 EINPROGRESS (Operation now in progress)",
    '7  connect(3, {sa_family=AF_INET6, sin6_port=htons(1), sin6_flowinfo=htonl(0), inet_pton(AF_INET6, "::1", '
    "&sin6_addr), sin6_scope_id=0}, 28) = 0",
    "7  connect(3, {sa_family=AF_INET6, sin6_port=htons(1), sin6_flowinfo=htonl(0), inet_pton(AF_INET6, "
    '"::ffff:127.0.0.1", &sin6_addr), sin6_scope_id=0}, 28) = 0',
    '7  connect(3, {sa_family=AF_INET, sin_port=htons(80), sin_addr=inet_addr("0.0.0.0")}, 16) = 0',
    "7  connect(3, {sa_family=AF_UNSPEC, sa_data=...}, 16) = 0",
    "7  sendto(3, [{nlmsg_len=20, nlmsg_type=RTM_GETADDR}], 20, 0, {sa_family=AF_NETLINK, nl_pid=0}, 12) = 20",
    '7  sendto(9, "GET http://192.0.2.1/ HTTP/1.1\\r\\n", 31, 0, NULL, 0) = 31',
    '7  sendmsg(9, {msg_name=NULL, msg_namelen=0, msg_iov=[{iov_base="x", iov_len=1}]}, 0) = 1',
    '7  execve("/bin/true", ["sin_addr=inet_addr(\\"192.0.2.1\\")"], 0x7f) = 0',
    "7  +++ exited with 0 +++",
]
LOUD = {
    '7  connect(3, {sa_family=AF_INET, sin_port=htons(80), sin_addr=inet_addr("192.0.2.1")}, 16) = -1 ENETUNREACH': (
        "192.0.2.1 is another machine"
    ),
    '7  connect(3, {sa_family=AF_INET, sin_port=htons(80), sin_addr=inet_addr("10.0.0.1")}, 16 <unfinished ...>': (
        "10.0.0.1 is another machine"
    ),
    '7  connect(3, {sa_family=AF_INET6, sin6_port=htons(443), sin6_flowinfo=htonl(0), inet_pton(AF_INET6, "2001:db8::1"'
    ", &sin6_addr), sin6_scope_id=0}, 28) = -1 EADDRNOTAVAIL": "2001:db8::1 is another machine",
    "7  connect(3, {sa_family=AF_INET6, sin6_port=htons(443), sin6_flowinfo=htonl(0), inet_pton(AF_INET6, "
    '"::ffff:192.0.2.1", &sin6_addr), sin6_scope_id=0}, 28) = 0': "::ffff:192.0.2.1 is another machine",
    '7  connect(3, {sa_family=AF_INET, sin_port=htons(53), sin_addr=inet_addr("127.0.0.53")}, 16) = 0': (
        "port 53 is of DNS"
    ),
    '7  sendto(3, "", 0, 0, {sa_family=AF_INET, sin_port=htons(5353), sin_addr=inet_addr("224.0.0.1")}, 16) = 2': (
        "224.0.0.1 is another machine"
    ),
    '7  sendmsg(3, {msg_name={sa_family=AF_INET, sin_port=htons(9), sin_addr=inet_addr("255.255.255.255")}, '
    "msg_namelen=16, msg_iov=[]}, 0) = 0": "255.255.255.255 is another machine",
    "7  connect(3, {sa_family=AF_VSOCK, svm_cid=0x2, svm_port=0x3e8}, 16) = 0": "a socket of AF_VSOCK",
    "7  connect(3, {sa_family=AF_INET, 0x7ffd}, 16) = 0": "an address that can't be read",
    '7  connect(3, {sa_family=AF_INET, sin_port=htons(9), sin_addr=inet_addr("nowhere")}, 16) = 0': (
        "an address that can't be read"
    ),
}


def test_P1_calls_that_stay_here_are_no_attempts() -> None:
    assert no_egress.attempts(QUIET) == []
    assert no_egress.count_calls(QUIET) == 10


@pytest.mark.parametrize(("line", "why"), LOUD.items())
def test_P1_calls_that_leave_or_ask_for_names_are(line: str, why: str) -> None:
    assert no_egress.attempts([*QUIET, line]) == [no_egress.Attempt(line, why)]


def test_P1_every_peer_of_one_call_counts() -> None:
    peers = ", ".join(
        f'{{msg_name={{sa_family=AF_INET, sin_port=htons({port}), sin_addr=inet_addr("{host}")}}}}'
        for host, port in (("192.0.2.1", 9), ("127.0.0.1", 53), ("127.0.0.1", 9))
    )
    found = no_egress.attempts([f"7  sendmmsg(3, [{peers}], 3, 0) = 3"])
    assert [attempt.why for attempt in found] == ["192.0.2.1 is another machine", "port 53 is of DNS"]


def traced(code: str) -> "subprocess.CompletedProcess[str]":
    if why := no_egress.missing():
        pytest.skip(why)
    command = [sys.executable, str(SCRIPT), "--", sys.executable, "-S", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


_IN_A_GRANDCHILD = "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {code!r}])"
_LEAVES = {
    "192.0.2.1": "import socket; socket.socket().connect_ex(('192.0.2.1', 80))",
    "2001:db8::1": "import socket; socket.socket(socket.AF_INET6).connect_ex(('2001:db8::1', 80))",
    "192.0.2.2": "import socket\ntry: socket.socket(2, 2).sendto(b'x', ('192.0.2.2', 9))\nexcept OSError: pass",
    "htons(53)": "import socket\ntry: socket.getaddrinfo('name.invalid', 80)\nexcept OSError: pass",
}


@pytest.mark.parametrize(("shown", "code"), _LEAVES.items(), ids=_LEAVES.keys())
def test_P1_whoever_tries_to_leave_is_seen(shown: str, code: str) -> None:
    for planted in (code, _IN_A_GRANDCHILD.format(code=code)):
        ended = traced(planted)
        assert ended.returncode == 1, ended.stderr
        assert shown in ended.stderr
        assert "meant to leave this machine" in ended.stderr


def test_P1_loopback_works_and_the_status_is_the_commands() -> None:
    code = (
        "import socket, sys\n"
        "for family, host in ((socket.AF_INET, '127.0.0.1'), (socket.AF_INET6, '::1')):\n"
        "    with socket.socket(family) as listener, socket.socket(family) as client:\n"
        "        listener.bind((host, 0)); listener.listen(); client.connect(listener.getsockname()[:2])\n"
        "sys.exit(7)\n"
    )
    ended = traced(code)
    assert ended.returncode == 7, ended.stderr
    assert "None of 2 traced calls" in ended.stdout


def test_what_is_missing_is_said_with_what_to_do(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), "--", "true"], capture_output=True, text=True, env={"PATH": str(tmp_path)}
    )
    assert ended.returncode == 2
    assert "apt-get install util-linux" in ended.stderr
