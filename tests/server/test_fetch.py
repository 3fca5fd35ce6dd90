"""Image URLs: what a data: URL holds is read strictly, everything else is refused with a way out."""

import base64
import binascii
from urllib.parse import quote_from_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline_models.images import ImageError
from sightline_server.chat import fetch
from sightline_server.chat.fetch import read_image_url

LIMIT = 1000
DATA = bytes(range(256))
B64 = base64.b64encode(DATA).decode()


def read(url: str, max_bytes: int = LIMIT) -> bytes:
    return read_image_url(url, max_bytes=max_bytes).data


def refused(url: str, max_bytes: int = LIMIT) -> ImageError:
    with pytest.raises(ImageError) as caught:
        read(url, max_bytes)
    assert url[:40] not in caught.value.message or len(url) < 9
    return caught.value


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{B64}",
        f"DATA:image/png;BASE64,{B64}",
        f"data:;base64,{B64}",
        f"data:image/png;charset=utf-8;base64,{B64}",
        f"data:text/html;base64,{B64}",
        f"data:image/png ; base64,{B64}",
        f"  data:image/png;base64,{B64}",
        f"data:image/png;base64, {B64[:20]} {B64[20:40]}\r\n\t{B64[40:]}\n",
        f"data:image/png;base64,{B64.replace('+', '%2B').replace('/', '%2F').replace('=', '%3D')}",
        f"data:image/png;base64,{B64.replace('+', '%2b').replace('/', '%2f').replace('=', '%3d%0D%0a')}%20",
        f"data:image/png,{quote_from_bytes(DATA)}",
        f"data:,{quote_from_bytes(DATA)}",
    ],
)
def test_I14_I15_what_rfc_2397_allows(url: str) -> None:
    assert read(url) == DATA


@pytest.mark.parametrize(
    "payload",
    [
        B64.rstrip("="),
        B64 + "=",
        B64[:-3] + "=",
        B64.replace("+", "-").replace("/", "_"),
        B64[:30] + "!" + B64[30:],
        B64[:30] + "=" + B64[30:],
        B64[:30] + "é" + B64[30:],
        B64[:30] + "\x00" + B64[30:],
        B64[:30] + "%zz" + B64[30:],
        B64[:30] + "%41" + B64[30:],
        B64[:30] + "\ud800" + B64[30:],
        "=",
        "====",
        "A",
    ],
)
def test_I15_base64_that_is_not_quite(payload: str) -> None:
    error = refused(f"data:image/png;base64,{payload}")
    assert error.code == "invalid_base64_image"
    assert "padding" in error.message


def test_I1_nothing_is_no_error_here() -> None:
    # An empty file is refused where files are decoded, in the same words for every source.
    assert read("data:image/png;base64,") == b""
    assert read("data:,") == b""


def test_I15_a_data_url_needs_its_comma() -> None:
    assert refused("data:image/gif;base64").code == "invalid_image_url"


@pytest.mark.parametrize(
    "url", ["http://example.com/a.png", "https://example.com/a.png", "HTTPS://x", " http://127.0.0.1/", "http:"]
)
def test_remote_images_are_refused_with_the_setting_to_come(url: str) -> None:
    error = refused(url)
    assert error.code == "invalid_image_url"
    assert "--allow-image-hosts" in error.message
    assert "data:image/png;base64," in error.message


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "FILE:/etc/passwd", "ftp://x/y", "gopher://x", "//host/a.png", "/etc/passwd", "a.png"),
        *("\\\\host\\share\\a.png", "", ":", "blob:https://x", "javascript:alert(1)", "data", "dat\na:,x", B64),
    ],
)
def test_every_other_source_is_refused(url: str) -> None:
    error = refused(url)
    assert error.code == "invalid_image_url"
    assert "data:image/png;base64," in error.message


def test_I16_the_limit_counts_decoded_bytes() -> None:
    assert read(f"data:;base64,{B64}", 256) == DATA
    assert read(f"data:,{quote_from_bytes(DATA)}", 256) == DATA
    for url in (f"data:;base64,{B64}", f"data:,{quote_from_bytes(DATA)}"):
        error = refused(url, 255)
        assert error.code == "image_file_too_large"
        assert "256 bytes" in error.message
        assert "255" in error.message


def test_I15_megabytes_of_nonsense_are_refused() -> None:
    assert refused("data:;base64," + "=" * 6_000_000, 1 << 20).code == "image_file_too_large"
    assert refused("data:;base64," + "=" * 4_000_000, 1 << 24).code == "invalid_base64_image"
    assert refused("data:," + "%41" * 400_000, 1 << 24).code == "invalid_image_url"
    assert read("data:,\ud800x") == b"?x"
    assert refused("data:;base64," + " " * 9_000_000, 1 << 20).code == "image_file_too_large"


@given(st.binary(max_size=300), st.text(" \t\r\n", max_size=5), st.integers(0, 400))
def test_I15_base64_comes_back_whatever_the_spaces(data: bytes, space: str, place: int) -> None:
    text = base64.b64encode(data).decode()
    assert read(f"data:image/webp;base64,{text[:place]}{space}{text[place:]}") == data


@given(st.text(max_size=40))
def test_I15_any_text_is_data_or_an_image_error(payload: str) -> None:
    url = f"data:;base64,{payload}"
    try:
        made = read(url)
    except ImageError as error:
        made = str(error).encode()
        payload = "refused"
    assert payload == "refused" or len(made) <= len(payload) * 3 // 4


@pytest.mark.parametrize("piece", range(1, 14))
def test_I15_pieces_join_without_a_seam(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "UNDONE_AT_ONCE", piece)
    spaced = B64.replace("A", "A \n").replace("+", "%2B").replace("/", "%2f").replace("=", "%3D%20")
    for length in range(12):
        text = base64.b64encode(DATA[:length]).decode()
        assert read(f"data:;base64,{text}") == DATA[:length]
    assert read(f"data:;base64,{spaced}") == DATA
    for wrong in ("QQ==QQ==", "QQ=Q", "QQ", "QUJ", "QUJD=", "QUJDRA=", "QUJD%3", "QUJD%", "=QUJD", "QUJD%%"):
        assert refused(f"data:;base64,{wrong}").code == "invalid_base64_image"
    assert refused(f"data:;base64,{B64}", 255).code == "image_file_too_large"


def test_I16_a_large_picture_is_undone_in_pieces_with_a_pause_after_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else in the process runs while one is undone, so none may take more than about a millisecond."""
    undone, pauses = [], []
    undo = binascii.a2b_base64

    def noted(text: bytes, **options: bool) -> bytes:
        undone.append(len(text))
        return undo(text, **options)

    monkeypatch.setattr(fetch.binascii, "a2b_base64", noted)
    monkeypatch.setattr(fetch.time, "sleep", pauses.append)
    data = bytes(range(256)) * 60_000
    assert read("data:;base64," + base64.b64encode(data).decode(), 1 << 24) == data
    assert max(undone) <= 1 << 18
    assert len(pauses) > 70
