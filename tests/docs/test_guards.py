"""The guard that conftest.py puts round every test holds."""

import socket

import pytest


def test_no_test_reaches_another_machine() -> None:
    # An address that is reserved for documentation, should the guard not hold.
    with pytest.raises(PermissionError, match=r"192\.0\.2\.1"):
        socket.create_connection(("192.0.2.1", 80), timeout=0.1)
