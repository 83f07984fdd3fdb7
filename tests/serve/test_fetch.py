"""Fetching sound: what is refused before a connection, and what a fetched body may be."""

from __future__ import annotations

import http.server
import threading

import pytest

from moss_audio_jax.errors import InputError
from moss_audio_jax.serve import fetch as fetching
from moss_audio_jax.serve.fetch import fetch, is_public

HOSTS = {"cdn.example.com", "localhost"}


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("192.168.0.1", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:a9fe:a9fe", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::a9fe:a9fe", False),
    ],
)
def test_public_addresses(address, public):
    assert is_public(address) is public


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data",
        "http://[::ffff:169.254.169.254]/",
        "http://2852039166/",
        "http://0xa9fea9fe/",
        "http://0251.0376.0251.0376/",
        "http://127.1/",
        "http://evil.example/",
        "http://cdn.example.com.evil.example/",
        "http://evil.example#cdn.example.com",
        "http://evil.example\\@cdn.example.com/",
        "http://user@cdn.example.com/",
        "http://cdn.example.com:22/",
        "http://cdn.example.com:x/",
        "ftp://cdn.example.com/",
        "file:///etc/passwd",
        "gopher://cdn.example.com/",
        "http://cdn.example.com/\r\nX: y",
        "http://cdn.example.com/ a",
        "http://[::1",
        "http://ｅvil.example/",
        "//cdn.example.com/",
        "",
    ],
)
def test_urls_that_are_refused_unasked(url, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a name was resolved")

    monkeypatch.setattr(fetching.socket, "getaddrinfo", never)
    with pytest.raises(InputError):
        fetch(url, HOSTS, 1000, 5)
    with pytest.raises(InputError):
        fetch("http://cdn.example.com/", (), 1000, 5)


@pytest.mark.parametrize("host", ["localhost", "2130706433", "0x7f000001", "127.1", "[::1]"])
def test_an_allowed_name_that_resolves_to_a_private_address(host):
    with pytest.raises(InputError, match=r"not public|not known"):
        fetch(f"http://{host}/", {host.strip("[]")}, 1000, 5)


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/sound")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"x" * (5000 if self.path == "/large" else 500))

    def log_message(self, *_):
        pass


def test_what_is_fetched(monkeypatch):
    """A server here, taken for a public one."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(fetching, "is_public", lambda _: True)
    host = f"localhost:{server.server_port}"
    try:
        assert fetch(f"http://{host}/sound", {host}, 1000, 5) == b"x" * 500
        with pytest.raises(InputError, match="more than"):
            fetch(f"http://{host}/large", {host}, 1000, 5)
        with pytest.raises(InputError, match="HTTP 302"):
            fetch(f"http://{host}/moved", {host}, 1000, 5)
        with pytest.raises(InputError, match="cannot be fetched"):
            fetch(f"https://{host}/sound", {host}, 1000, 5)
    finally:
        server.shutdown()
        server.server_close()
