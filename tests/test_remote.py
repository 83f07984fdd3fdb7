"""The HTTP client, with servers on this machine that misbehave; and `redact`."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
import time

import pytest

from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.remote import REPLY_BYTES, Chat, redact, secrets_of, variable

KEY = "sEcReTkEy123"
CHAT = json.dumps({"choices": [{"message": {"content": "hi"}}]}).encode()


def head(body: bytes, status: str = "200 OK", *more: str, length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}"]
    return "\r\n".join([*lines, *more, "", ""]).encode() + body


def chunked(*chunks: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(chunks)


@pytest.fixture
def serve():
    """serve(*replies) -> (url, requests): one reply a connection, the last one again and again.

    A reply is bytes, or an iterator of bytes that are sent one after the other.
    """
    with contextlib.ExitStack() as stack:

        def start(*replies):
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            asked: list[bytes] = []

            def run():
                for number in itertools.count():
                    try:
                        connection, _ = listener.accept()
                    except OSError:
                        return
                    with connection, contextlib.suppress(OSError):
                        data = b""
                        while b'"temperature": 0}' not in data:
                            data += connection.recv(65536)
                        asked.append(data)
                        reply = replies[min(number, len(replies) - 1)]
                        for part in [reply] if isinstance(reply, bytes) else reply():
                            connection.sendall(part)

            thread = threading.Thread(target=run, daemon=True)
            thread.start()

            def end():
                with contextlib.suppress(OSError):
                    listener.shutdown(socket.SHUT_RDWR)
                listener.close()
                thread.join(5)

            stack.callback(end)
            return f"http://127.0.0.1:{listener.getsockname()[1]}/v1", asked

        yield start


def drip(first: bytes):
    def parts():
        yield first
        while True:
            time.sleep(0.05)
            yield b" "

    return parts


def flood(first: bytes):
    def parts():
        yield first
        while True:
            yield b"x" * (1 << 16)

    return parts


def test_a_good_reply(serve):
    for reply in (
        head(CHAT),
        chunked(b"%x\r\n%s\r\n0\r\n\r\n" % (len(CHAT), CHAT)),
        b"HTTP/1.0 200 OK\r\n\r\n" + CHAT,
        b"HTTP/1.1 100 Continue\r\n\r\n" + head(CHAT),
    ):
        url, asked = serve(reply)
        assert Chat(f"{url}?api-version=7", "m", KEY).ask("é\ud800") == "hi"
        assert asked[0].startswith(b"POST /v1/chat/completions?api-version=7 HTTP/1.1\r\n")
        assert f"Authorization: Bearer {KEY}".encode() in asked[0]


NESTED = b'{"choices": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"garbage\r\n\r\n", "no valid HTTP"),
        (b"HTTP/9.9 abc\r\n\r\n", "no valid HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 500 + b"\r\n", "no valid HTTP"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000 + b"\r\n\r\n", "no valid HTTP"),
        (head(CHAT, length=len(CHAT) + 9), "ends early: 9 bytes are missing"),
        (head(CHAT, length=9), "not a chat completion"),
        (head(CHAT, length=10**18), "ends early"),
        (chunked(b"zz\r\n"), "no valid HTTP"),
        (chunked(b"ff\r\nabc"), "no valid HTTP"),
        (chunked(b"%x\r\n%s\r\n" % (len(CHAT), CHAT)), "no valid HTTP"),
        (flood(chunked(b"-1\r\n")), f"longer than {REPLY_BYTES} bytes|no valid HTTP"),
        (flood(b"HTTP/1.1 200 OK\r\n\r\n"), f"longer than {REPLY_BYTES} bytes"),
        (flood(head(b"", length=10**12)), f"longer than {REPLY_BYTES} bytes"),
        (head(b"\xff\xfe{}"), "not valid UTF-8"),
        (head(b"<html>"), "not a chat completion .*not valid JSON"),
        (head(NESTED), "nests too deeply"),
        (head(b"[" + b"9" * 5000 + b"]"), "not usable JSON"),
        (head(b'{"choices": []}'), "not a chat completion"),
        (head(b'{"choices": {"0": 1}}'), "not a chat completion"),
        (head(b'{"choices": [{"message": {"content": null}}]}'), "not a chat completion"),
        (head(b"no key", "401 Unauthorized"), "HTTP 401 no key"),
        (head(b"", "204 No Content"), "not a chat completion"),
        (b"HTTP/1.1 401 No\r\nContent-Length: 99\r\n\r\n", "HTTP 401"),
    ],
)
def test_whatever_a_server_says_is_one_failure(serve, reply, words):
    """None of these is asked again, and each message is one short line without the key."""
    url, asked = serve(reply)
    with pytest.raises(InputError, match=f"model m at {url}: (.*)({words})") as error:
        Chat(url, "m", KEY, timeout=60, wait=0).ask("hello")
    assert len(asked) == 1
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 400
    assert KEY not in str(error.value)


def test_a_deadline_holds_however_slowly_a_server_drips(serve):
    for reply in (
        drip(b"HTTP/1.1 200 OK\r\nx: "),
        drip(b"HTTP/1.1 200 OK\r\n\r\n"),
        drip(chunked(b"1;")),
        drip(head(b"", "500 Slow", length=10**6)),
    ):
        url, _ = serve(reply)
        began = time.monotonic()
        with pytest.raises(InputError, match=r"took longer than 0.6 s|HTTP 500"):
            Chat(url, "m", timeout=0.6, wait=0.4).ask("hello")
        assert time.monotonic() - began < 20  # a guard; each attempt would take for ever


def test_what_is_asked_again(serve):
    url, asked = serve(head(b"", "503 Busy"), head(b"", "429 Slow", "Retry-After: 0"), head(CHAT))
    assert Chat(url, "m", wait=0).ask("hello") == "hi"
    assert len(asked) == 3
    # A wait that exceeds the remaining time is not begun.
    for later in ("999999", "Fri, 31 Dec 2999 23:59:59 GMT"):
        url, asked = serve(head(b"", "429 Slow", f"Retry-After: {later}"), head(CHAT))
        with pytest.raises(InputError, match="HTTP 429"):
            Chat(url, "m", wait=0).ask("hello")
        assert len(asked) == 1
    url, asked = serve(head(b"", "429 Slow", "Retry-After: soon"), head(CHAT))
    assert Chat(url, "m", wait=0).ask("hello") == "hi"
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(InputError, match="refused"):
        Chat(f"http://127.0.0.1:{port}", "m", wait=0, attempts=2).ask("hello")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(serve, status):
    other, heard = serve(head(CHAT))
    url, _ = serve(head(b"", f"{status} Moved", f"Location: {other}?token={KEY}"))
    with pytest.raises(InputError, match=f"HTTP {status} redirects to {other}") as error:
        Chat(url, "m", KEY).ask("hello")
    assert heard == []
    assert KEY not in str(error.value)


def test_a_question_can_be_stopped(serve):
    url, asked = serve(drip(b"HTTP/1.1 200 OK\r\n\r\n"))
    chat, ended = Chat(url, "m", timeout=600), []

    def ask():
        try:
            chat.ask("hello")
        except Exception as error:
            ended.append(type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    while not asked:
        time.sleep(0.01)
    chat.stop()
    thread.join(30)
    assert ended == ["CancelledError"]


def test_nothing_is_sent_or_shown_that_should_not_be(serve):
    echo = json.dumps({"choices": [{"message": {"content": f"You sent Bearer {KEY}. \ud800"}}]})
    url, asked = serve(head(echo.encode()), head(f"bad key {KEY}".encode(), "403 No"))
    secret = url.replace("://", f"://me:{KEY}@") + f"?api_key={KEY}&api-version=2"
    chat = Chat(secret, "m")
    assert chat.ask("x") == "You sent Bearer ***. ?"
    assert b"Authorization: Basic bWU6c0VjUmVUa0V5MTIz" in asked[0]
    assert f"@{url[7:20]}".encode() not in asked[0]
    with pytest.raises(InputError, match=r"://\*\*\*@.*HTTP 403 bad key \*\*\*") as error:
        chat.ask("x")
    for shown in (str(error.value), repr(chat), json.dumps(chat.identity)):
        assert KEY not in shown
    assert chat.identity["url"].endswith("/v1?api_key=***&api-version=2")


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("localhost:8000", None),
        ("ftp://host", None),
        ("http://", None),
        (f"http://u:{KEY}@host:port", None),
        (f"http://u:{KEY}@host/a b\r\nX: y", None),
        (f"http://u:{KEY}@[::1", None),
        ("http://host", f"{KEY}\r\nX-Other: 1"),
        ("http://host", f"{KEY} é"),
    ],
)
def test_what_cannot_be_asked_is_refused_without_its_secret(url, key):
    with pytest.raises(UsageError) as error:
        Chat(url, "m", key)
    assert KEY not in str(error.value)
    assert Chat("http://host", "m", f"{KEY}\n").secrets == (KEY,)  # as files end
    with pytest.raises(UsageError):
        Chat("http://host", "m", timeout=float("nan"))


def test_redact():
    hidden = [
        f"http://me:{KEY}@host/v1",
        f"https://{KEY}@host",
        f"ftp://u:a/{KEY}@host/x",
        f"GET /a?b=1&key={KEY}&c=2",
        f"https://h/?X-Amz-Signature={KEY}",
        f"https://h/?sig={KEY};x",
        f"https://h/?code={KEY}#f",
        f"OPENAI_API_KEY={KEY} python x.py",
        f"HF_TOKEN='a {KEY}'",
        f"Authorization: Bearer {KEY}",
        f"x-api-key: {KEY}",
        f'{{"password": "a \\" {KEY}"}}',
        f"python x.py --api-key {KEY} --n 2",
        f"--token={KEY}",
        f"client_secret={KEY}",
        f"sent Bearer {KEY}.",
        "sk-proj-abcdefghijklmnop1234",
        "see eyJhbGciOiJIUzI1.eyJz.c2ln",
        {"api_key": KEY},
        {"a": [{"AuthToken": KEY}]},
        {"password": 12345678},
        ["x", "--api-key", KEY],
        ("x", f"--token={KEY}"),
        ["curl", "-u", f"me:{KEY}"],
        ["env", f"AWS_SECRET_ACCESS_KEY={KEY}"],
        {"target": ["-H", f"Authorization: token {KEY}"]},
    ]
    for value in hidden:
        said = json.dumps(redact(value))
        assert "***" in said, value
        for secret in (KEY, "12345678", "klmnop1234", "c2ln"):
            assert secret not in said, value
    kept = [
        "http://localhost:8000/v1",
        "max_tokens=64",
        "key is C major",
        "HTTP 500, status code: 3",
        "https://host/a?language=en&n=3",
        {"key_from": "OPENAI_API_KEY", "key_score": 0.6},
        {"tokenizer": "a.json"},
        ["python", "x.py", "--name", "b"],
        7,
        None,
        "a@b.c",
        "/data/caf\udce9/clip one.wav: no such file",
        "a sound: dog barking",
    ]
    for value in kept:
        assert redact(value) == value
    assert redact(f"it said {KEY}", [KEY]) == "it said ***"
    assert redact(("a", ["--key", "b"], {"c": 1})) == ("a", ["--key", "***"], {"c": 1})
    assert secrets_of(["x", "--key", KEY, f"TOKEN={KEY}b"]) == (KEY, f"{KEY}b")
    began = time.process_time()
    redact("a" * 200_000 + ":" * 50_000 + '"' * 50_000 + "http://" * 20_000)
    assert time.process_time() - began < 20  # a guard: not quadratic
    assert variable("OPENAI_API_KEY") == "OPENAI_API_KEY"
    for name in ("sk-abc", "a b", "", "sk_abcdefghijklmnopqrstuvw"):
        with pytest.raises(UsageError):
            variable(name)
