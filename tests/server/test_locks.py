"""Settings that lock the server can't be given without a lock."""

import os
from pathlib import Path

import pytest

from sightline_server import settings as settings_table
from sightline_server.auth import keys_file
from sightline_server.auth.keyring import Keyring
from sightline_server.auth.principal import Limits, Scope
from sightline_server.settings import Settings, SettingsError


@pytest.mark.parametrize(
    ("flags", "environ"),
    [
        ({"api_key": [""]}, {}),
        ({"api_key": [","]}, {}),
        ({"api_key_file": ""}, {}),
        ({"keys_file": ""}, {}),
        ({}, {"SIGHTLINE_API_KEY": ""}),
        ({}, {"SIGHTLINE_KEYS_FILE": ""}),
    ],
)
def test_K2_an_empty_key_does_not_open_the_server(flags: dict[str, str], environ: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match="would leave the server open"):
        settings_table.load(flags, environ)


def test_K2_a_file_of_keys_that_is_no_text_is_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="can't be read as text"):
        Keyring(Settings(api_key_file=str(file)))


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away, which root alone may")
def test_K14_a_keys_file_stays_its_owners(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    keys_file.create_key(file, "ann", (Scope.CHAT,), Limits())
    os.chown(file, 12345, 23456)
    keys_file.create_key(file, "bob", (Scope.CHAT,), Limits())
    made = file.stat()
    assert (made.st_uid, made.st_gid, made.st_mode & 0o777) == (12345, 23456, 0o600)
