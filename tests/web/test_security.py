"""Requests without the token, from foreign pages, too large, malformed or slow."""

import json
import socket
import threading
import time
from io import BytesIO

import pytest
from PIL import Image

from clipkit.errors import ServeError
from clipkit.tasks.serve import check_address
from clipkit.web import images as uploads
from clipkit.web import security as guard
from clipkit.web import server
from tests.helpers.toys import png, square
from tests.helpers.web_toys import application, build, client, running

TOKEN = "a-token-of-our-own-0123456789"


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return build(tmp_path_factory.mktemp("web"), per_colour=1)


@pytest.fixture(scope="module")
def ask(index):
    with client(index) as asking:
        yield asking


# Who may send requests


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_a_non_loopback_address_requires_a_token(host):
    with pytest.raises(ServeError, match=r"expected a --token to protect it.*create one with"):
        check_address(host, None)
    check_address(host, TOKEN)


@pytest.mark.parametrize("token", ["", "short", "with spaces in it here", "é" * 20, "a\nb" * 9])
def test_a_token_that_can_be_guessed_or_does_not_fit_a_cookie_is_refused(token):
    with pytest.raises(ServeError, match=r"expected 16 to 200"):
        check_address("127.0.0.1", token)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:8000", 200),
        ("evil.example", 421),
        ("evil.example:8000", 421),
        ("127.0.0.1.evil.example", 421),
        ("", 421),
        ("[::1]:8000", 421),
        ("127.0.0.1@evil.example", 421),
    ],
)
def test_only_the_names_of_the_server_are_allowed(ask, host, status):
    assert ask.get("/search", headers={"host": host}).status_code == status


def test_every_loopback_name_fits_where_that_is_meant(index):
    with client(index, hosts=guard.LOOPBACK) as ask:
        for host in ("localhost:1", "LOCALHOST", "[::1]:8000", "[::1]", "127.0.0.1"):
            assert ask.get("/health", headers={"host": host}).status_code == 200
        assert ask.get("/health", headers={"host": "[::2]"}).status_code == 421


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}, 200),
        ({"sec-fetch-site": "none", "sec-fetch-mode": "navigate"}, 200),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "http://127.0.0.1"}, 200),
    ],
)
def test_pages_of_other_sites_cannot_make_it_work(ask, headers, status):
    assert ask.get("/search", headers=headers).status_code == status


def test_every_answer_forbids_foreign_script(ask):
    for answer in (
        ask.get("/"),
        ask.get("/search"),
        ask.get("/nothing"),
        ask.get("/thumb/red/red-0.png"),
        ask.get("/search", headers={"host": "evil"}),
        ask.put("/search"),
    ):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "server" not in answer.headers
        assert "access-control-allow-origin" not in answer.headers
    image = ask.get("/image/red/red-0.png").headers["content-security-policy"]
    assert image == "default-src 'none'; sandbox"


def test_with_a_token_nothing_is_shown_without_it(index):
    with client(index, token=TOKEN, hosts=None) as ask:
        for path in ("/search", "/info", "/metrics", "/openapi.json", "/image/red/red-0.png"):
            assert ask.get(path).status_code == 401
            assert ask.get(path, params={"token": TOKEN}).status_code == 401
            for shown in (TOKEN[:-1], TOKEN + "x", "", "é"):
                bearer = {"authorization": f"Bearer {shown}".encode()}
                assert ask.get(path, headers=bearer).status_code == 401
                cookie = {"cookie": f"{guard.COOKIE}={shown}".encode()}
                assert ask.get(path, headers=cookie).status_code == 401
            assert ask.get(path, headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
        assert ask.post("/search", content=b"x" * 100).status_code == 401
        assert ask.get("/health").status_code == 200
        assert ask.get("/", follow_redirects=False).headers["location"] == "/static/token.html"
        wrong = ask.get("/", params={"token": "wrong"}, follow_redirects=False)
        assert (wrong.headers["location"], "set-cookie" in wrong.headers) == (
            "/static/token.html",
            False,
        )


def test_the_token_in_the_pages_address_becomes_a_cookie(index):
    with client(index, token=TOKEN, hosts=None) as ask:
        answer = ask.get("/", params={"q": "red & blue", "token": TOKEN}, follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, "/?q=red+%26+blue")
        for word in ("HttpOnly", "SameSite=Lax", "Path=/"):
            assert word in answer.headers["set-cookie"]
        assert ask.get("/search", params={"q": "red"}).status_code == 200


# What may be sent


def bomb():
    """A PNG of 90 million pixels in a few kilobytes, as far as its header says."""
    data = bytearray(png(Image.new("1", (8, 8))))
    data[16:24] = (9000).to_bytes(4) + (10_000).to_bytes(4)
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    return bytes(data)


def saved(image, form, **options):
    stream = BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", 415),
        (b"hello", 415),
        (png(square("red"))[:40], 415),
        (b"\xff\xd8\xff\xe0" + bytes(100), 415),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", 415),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", 415),
        (b"%PDF-1.4", 415),
        (b"GIF89a/*<script>alert(1)</script>*/=1;", 415),
        (saved(Image.new("L", (3, 900)), "PNG"), 415),
        (bomb(), 413),
        (png(square("red")) + b"PK\3\4<script>alert(1)</script>", 200),
        (saved(square("red", size=40), "TIFF"), 200),
        (saved(square("red"), "GIF"), 200),
    ],
    ids=lambda value: repr(value[:12]) if isinstance(value, bytes) else "",
)
def test_files_that_are_not_images_are_refused(ask, data, status):
    answer = ask.post("/search", content=data)
    assert answer.status_code == status, answer.text
    if status != 200:
        assert answer.json()["detail"].startswith("cannot search with this image: it ")
    else:  # what is shown of it is made anew, without what hung on it
        jpeg = ask.get(f"/upload/{answer.json()['image']}").content
        assert jpeg.startswith(b"\xff\xd8\xff")
        assert b"script" not in jpeg


def test_the_oldest_uploads_are_dropped(index, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_UPLOADS", 2)
    with client(index) as ask:
        names = [
            ask.post("/search", content=png(square("red", shade))).json()["image"]
            for shade in (0, 20, 40)
        ]
        found = [ask.get("/search", params={"image": name}).status_code for name in names]
        assert found == [404, 200, 200]


def test_giant_requests_are_refused_before_they_are_read(ask, monkeypatch):
    assert ask.post("/search", content=b"x" * (guard.MAX_UPLOAD + 1)).status_code == 413
    assert ask.post("/classify", content=b"x" * (guard.MAX_BODY + 1)).status_code == 413
    assert ask.get("/search", params={"q": "x" * 10_001}).status_code == 422

    def trickle():
        for _ in range(3 * guard.MAX_BODY // 65536):
            yield b"x" * 65536

    assert ask.post("/classify", content=trickle()).status_code == 413  # of no stated length
    monkeypatch.setattr(guard, "MAX_BUFFERED", 10)
    assert ask.post("/search", content=b"x" * 11).status_code == 503
    assert ask.post("/search", content=b"x" * 10).status_code == 415  # nothing is left behind


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"labels": ["a", "\\ud800"], "keys": ["red/red-0.png"]}',
        b'{"labels": ["a", "b"], "keys": "red/red-0.png"}',
        b'{"labels": 1e999, "keys": []}',
        json.dumps({"labels": ["a", "b"], "keys": ["x" * 5000]}).encode(),
        json.dumps({"labels": ["a", "b"], "keys": ["../../etc/passwd"]}).encode(),
    ],
    ids=lambda body: repr(body[:20]),
)
def test_malformed_requests_are_refused(ask, body):
    answer = ask.post("/classify", content=body, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500
    assert isinstance(answer.json()["detail"], str)


def test_script_in_a_query_comes_back_as_data(ask):
    script = "<script>alert(1)</script>"
    for answer in (
        ask.get("/search", params={"where": script}),
        ask.get(f"/thumb/{script}"),
        ask.get("/search", params={"nonsense": script}),
        ask.get("/search", params={"k": script}),
    ):
        assert 400 <= answer.status_code < 500
        assert answer.headers["content-type"] == "application/json"


# How it may be sent


@pytest.fixture
def impatient(index, monkeypatch):
    """A real server that waits half a second; gives a function that connects to it."""
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.5)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.5)
    app, _ = application(index)
    with running(app) as port:

        def connect(data=b""):
            connection = socket.create_connection(("127.0.0.1", port), timeout=10)
            connection.sendall(data)
            return connection

        yield connect


def received(connection):
    with connection:
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
        return b"".join(parts)


def test_a_request_that_trickles_in_is_hung_up_on(impatient):
    connection = impatient(b"GET /health HTTP/1.1\r\n")

    def trickle():
        try:
            for _ in range(100):
                connection.sendall(b"X: y\r\n")
                time.sleep(0.1)
        except OSError:
            pass

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        answer = received(connection)
    except ConnectionError:
        answer = b""
    thread.join()
    assert answer == b""
    assert received(impatient()) == b""  # one who says nothing at all


def test_an_image_that_trickles_in_is_refused(impatient):
    head = b"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n"
    answer = received(impatient(head + b"x"))
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"send it faster" in answer


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil\r\n\r\n",
        b"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=lambda data: repr(data[:24]),
)
def test_invalid_http_is_refused(impatient, data):
    assert b" 4" in received(impatient(data))[:13]


def test_a_path_that_is_not_utf8_is_not_found(impatient):
    request = b"GET /thumb/%ff%fe.png HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    assert received(impatient(request)).startswith(b"HTTP/1.1 404")


def test_slow_clients_do_not_hold_up_others(impatient):
    slow = [impatient(b"GET /se") for _ in range(50)]
    request = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    assert received(impatient(request)).startswith(b"HTTP/1.1 200")
    for connection in slow:
        connection.close()
