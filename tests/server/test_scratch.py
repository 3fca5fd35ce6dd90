"""Folders that a killed server leaves behind, and those that are none of our business."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sightline_server.scratch import LEAST_AGE_S, ScratchFolder, sweep


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def age(path: Path) -> None:
    seen = path.stat()
    os.utime(path, (seen.st_atime, seen.st_mtime - LEAST_AGE_S - 1))


def test_a_folder_is_private_and_removed_once(base: Path) -> None:
    with ScratchFolder("random") as path:
        (path / "file").touch()
        assert path.parent == base
        assert path.name.startswith("sightline-random-")
        assert path.stat().st_mode & 0o777 == 0o700
    assert not path.exists()
    folder = ScratchFolder("sockets")
    folder.remove()
    folder.path.mkdir()
    folder.remove()
    assert folder.path.exists()


def test_E5_what_a_killed_process_left_behind_is_swept_and_what_a_living_one_has_is_not(base: Path) -> None:
    script = (
        "import os, signal\nfrom sightline_server.scratch import ScratchFolder\n"
        "folder = ScratchFolder('sockets')\n(folder.path / 'reports').touch()\n"
        "print(folder.path, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = dict(os.environ, TMPDIR=str(base))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    left = Path(done.stdout.strip())
    assert left.is_dir(), done.stderr
    # So young, it might be another server's that is about to lock it.
    assert sweep() == []
    with ScratchFolder("sockets") as mine:
        age(mine)
        age(left)
        assert sweep() == [left]
        assert mine.is_dir()
    assert not left.exists()


def test_only_private_folders_of_our_own_names_are_swept(base: Path) -> None:
    readable, other, real = base / "sightline-sockets-readable", base / "sightline-mine", base / "elsewhere"
    for path, mode in ((readable, 0o755), (other, 0o700), (real, 0o700)):
        path.mkdir(mode)
        age(path)
    (base / "sightline-sockets-link").symlink_to(real)
    (base / "sightline-sockets-file").touch(0o700)
    age(base / "sightline-sockets-file")
    assert sweep() == []
    assert len(list(base.iterdir())) == 5
