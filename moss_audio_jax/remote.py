"""An HTTP client for models behind OpenAI's API, and `redact`, which hides secrets.

A server may redirect, send slowly, send too much or answer nonsense. In every case a question keeps
its limits of time and bytes, and ends with an answer or one InputError.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import email.utils
import http.client
import io
import json
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any, ClassVar

from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.files import brief, parse_json

REPLY_BYTES = 1 << 22  # the most bytes of a reply, including its head
_CONNECT_SECONDS = 10.0  # timeout of a connection attempt to one address
_POLL_SECONDS = 0.5  # `stop` is noticed within this time
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


# --- secrets -------------------------------------------------------------------------------------

HIDDEN = "***"
# Names whose values are secrets, if found at the end of a name or anywhere in it.
_NAME = (
    r"[\w.-]*(?:api[-_.]?key|[-_.a-z]key|token|signature|auth|authorization|cookie|[-_.]sig)"
    r"|[\w.-]*(?:secret|passw|passphrase|credential)[\w.-]*"
    r"|x-(?:amz|goog)-[\w-]+|pwd"
)
_SHORT = "key|sig|pass|jwt|sas"  # names of secrets if "=" follows them
_QUERY = f"{_SHORT}|code|session"  # secrets in a URL's query
_VALUE = r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^\s&"'<>,;)}\]]*[^\s&"'<>,;:.)}\]])"""
_KEY_LIKE = re.compile(rf"(?:{_NAME}|{_QUERY})", re.IGNORECASE)
_OPTION = re.compile(rf"--?(?:{_NAME}|{_QUERY}|u|user)", re.IGNORECASE)
_RULES = [
    (re.compile(pattern, re.IGNORECASE), put)
    for pattern, put in (
        # user:password@ of a URL; a slash is allowed in the password, if somebody did not quote it
        (
            r"(:/{1,3})(?:[^\s/@\"'<>,]{0,99}:[^\s@\"'<>,]{0,299}|[^\s/?#@\"'<>,]{1,299})@",
            rf"\1{HIDDEN}@",
        ),
        (rf"([?&;](?:{_QUERY})=){_VALUE}", rf"\1{HIDDEN}"),
        (rf"((?<![\w.-])--?(?:{_NAME}|{_QUERY})(?:\s+|=)){_VALUE}", rf"\1{HIDDEN}"),
        (
            rf"((?<![\w.-])[\"']?(?:{_NAME})[\"']?\s*[=:]\s*)(?:(?:Bearer|Basic|Token)\s+)?{_VALUE}",
            rf"\1{HIDDEN}",
        ),
        (rf"((?<![\w.-])(?:{_SHORT})=){_VALUE}", rf"\1{HIDDEN}"),
        (r"(\bBearer\s+)[\w.~+/=-]{4,}", rf"\1{HIDDEN}"),
        # tokens that have a known form
        (
            r"\b(?:sk|pk|hf|ghp|gho|glpat|xox[bp])[-_][\w-]{16,}|\bAKIA[0-9A-Z]{16}\b"
            r"|\beyJ[\w-]{10,}\.[\w-]+\.[\w-]*",
            HIDDEN,
        ),
    )
]


def redact(value: Any, secrets: Iterable[str] = ()) -> Any:
    """A JSON value without the secrets in it, for everything that is written or shown.

    "***" replaces user:password@ in URLs, values of names like api_key, token, signature or
    password (in queries, headers, mappings, KEY=VALUE and command arguments, with `--api-key X` in
    one string or in two), and each of `secrets`.
    """
    if isinstance(value, str):
        value = _without(value, secrets)
        for pattern, put in _RULES:
            value = pattern.sub(put, value)
        return value
    if isinstance(value, Mapping):
        return {
            redact(name, secrets): HIDDEN
            if isinstance(name, str) and _KEY_LIKE.fullmatch(name) and each not in (None, "")
            else redact(each, secrets)
            for name, each in value.items()
        }
    if isinstance(value, list | tuple):
        hidden, before = [], None
        for each in value:
            named = isinstance(before, str) and _OPTION.fullmatch(before)
            before = each
            if named and isinstance(each, str | int | float) and not str(each).startswith("--"):
                hidden.append(HIDDEN)
            else:
                hidden.append(redact(each, secrets))
        return type(value)(hidden) if type(value) in (list, tuple) else hidden
    return value


def _without(text: str, secrets: Iterable[str]) -> str:
    for secret in secrets:
        if len(secret) >= 3:  # shorter ones would match in most texts
            text = text.replace(secret, HIDDEN)
    return text


def secrets_of(words: Sequence[str]) -> tuple[str, ...]:
    """The secrets in a command's words, which are hidden in its output."""
    found = []
    for word, shown in zip(words, redact(list(words)), strict=True):
        name, _, assigned = word.partition("=")
        if word != shown:
            is_named = assigned and _KEY_LIKE.fullmatch(name.lstrip("-"))
            found.append(assigned if is_named else word)
    return tuple(filter(None, found))


def variable(name: str) -> str:
    """Checks the name of an environment variable. Raises UsageError, which does not show the name:

    somebody may give the key itself instead of the variable's name, and a key must not be printed.
    """
    if not _VARIABLE.fullmatch(name) or redact(name) != name:
        raise UsageError(
            "key-from is not the name of an environment variable; expected one like "
            "OPENAI_API_KEY, which holds the key"
        )
    return name


# --- asking --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chat:
    """A model behind an OpenAI-compatible endpoint.

    Attributes:
      url: the part before /chat/completions; user:password@ in it is sent as Basic authorization.
      model: the model's name at the endpoint.
      key: sent as a bearer token, only to that server; never written anywhere.
      timeout: seconds for one question, including all attempts and waits.
      attempts: the most attempts if the endpoint is busy (408, 429, 5xx) or unreachable.
      wait: seconds before the second attempt, doubled before each further one. A waiting time from
        the server takes precedence.
    """

    url: str = dataclasses.field(repr=False)
    model: str
    key: str | None = dataclasses.field(default=None, repr=False)
    timeout: float = 120.0
    attempts: int = 5
    wait: float = 1.0
    _stop: threading.Event = dataclasses.field(
        default_factory=threading.Event, repr=False, compare=False
    )
    role: ClassVar[str] = "model"  # its name in messages

    def __post_init__(self) -> None:
        shown = redact(self.url)
        try:
            parts = urllib.parse.urlsplit(self.url)
            fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # no such port, or a broken IPv6 address
            fine = False
        if not fine or not self.url.isascii() or re.search(r"[\s\x00-\x20\x7f]", self.url):
            raise UsageError(f"{self.role} url {shown!r}: expected http://... or https://...")
        if self.key and not re.fullmatch(r"[\x21-\x7e]+", self.key.strip()):
            raise UsageError(f"the key for {shown} contains spaces or characters that no key has")
        if not 0 < self.timeout < float("inf"):
            raise UsageError(f"{self.role} timeout {self.timeout}: expected seconds above 0")

    @property
    def secrets(self) -> tuple[str, ...]:
        """Every text that must be hidden, both as given and decoded."""
        parts = urllib.parse.urlsplit(self.url)
        found = [self.key.strip() if self.key else "", parts.password or "", self._basic]
        found += [v for n, v in urllib.parse.parse_qsl(parts.query) if _KEY_LIKE.fullmatch(n)]
        found += [urllib.parse.unquote(text) for text in found]
        return tuple(sorted({f for f in found if f}, key=len, reverse=True))

    @property
    def _basic(self) -> str:
        """The header value of HTTP's Basic authorization from the URL's user:password, or ""."""
        user = urllib.parse.urlsplit(self.url).netloc.rpartition("@")[0]
        return base64.b64encode(urllib.parse.unquote_to_bytes(user)).decode()

    @property
    def identity(self) -> dict[str, Any]:
        """Names the endpoint and its model, without secrets."""
        return {"url": redact(self.url, self.secrets), "model": self.model, "temperature": 0}

    def stop(self) -> None:
        """Soon ends all running questions, in all threads, with CancelledError."""
        self._stop.set()

    def ask(self, prompt: str) -> str:
        """The model's answer at temperature 0. Secrets in it are hidden.

        Raises:
          InputError: the server refused, answered nonsense, or could not be reached in time.
        """
        until = time.monotonic() + self.timeout
        for attempt in range(1, self.attempts + 1):
            try:
                said = _without(_content(self._posted(prompt, until)), self.secrets)
                return said.encode("utf-8", "replace").decode()  # lone surrogates become "?"
            except _Failure as failure:
                problem = str(failure)
                pause = self.wait * 2 ** (attempt - 1) if failure.after is None else failure.after
                left = until - time.monotonic()
                if not failure.again or attempt == self.attempts or pause >= left:
                    break
                if self._stop.wait(pause):
                    raise CancelledError from None
        where = f"{self.role} {self.model} at {self.url}"
        raise InputError(brief(redact(f"{where}: {problem}", self.secrets), 400))

    def _posted(self, prompt: str, until: float) -> bytes:
        """The body of the reply. Raises _Failure for anything else from the server."""
        parts = urllib.parse.urlsplit(self.url)
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
        }
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key.strip()}"
        elif self._basic:
            headers["Authorization"] = f"Basic {self._basic}"
        path = f"{parts.path.rstrip('/')}/chat/completions"
        host = parts.netloc.rpartition("@")[2]
        url = urllib.parse.urlunsplit((parts.scheme, host, path, parts.query, ""))
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with _opener(until, self._stop).open(request) as response:
                body = response.read(REPLY_BYTES + 1)  # the reader raises before that
                if response.length:
                    raise _Failure(f"the reply ends early: {response.length} bytes are missing")
                return body
        except urllib.error.HTTPError as error:
            raise _refused(error) from None
        except (_Failure, CancelledError):
            raise
        except Exception as error:  # a server can make Python's client raise many types
            cause = getattr(error, "reason", error)
            if isinstance(cause, TimeoutError) and time.monotonic() >= until:
                raise _Failure(f"took longer than {self.timeout:g} s") from None
            again = isinstance(cause, ConnectionError | TimeoutError)
            told = isinstance(cause, OSError) and not isinstance(cause, http.client.HTTPException)
            said = str(cause) if told else f"no valid HTTP ({type(cause).__name__}: {cause})"
            raise _Failure(brief(said), again) from None


class _Failure(Exception):
    """An attempt without an answer. `again`: whether another may get one, `after` seconds."""

    def __init__(self, problem: str, again: bool = False, after: float | None = None):
        super().__init__(problem)
        self.again, self.after = again, after


def _content(body: bytes) -> str:
    try:
        content = parse_json(body, "it")["choices"][0]["message"]["content"]
        if not isinstance(content, str):
            raise TypeError
        return content
    except (InputError, KeyError, IndexError, TypeError) as error:
        why = f" ({error})" if isinstance(error, InputError) else ""
        said = body[:100].decode(errors="replace")
        raise _Failure(f"the reply is not a chat completion{why}: {said}") from None


def _refused(error: urllib.error.HTTPError) -> _Failure:
    """The failure for a status other than success. Redirections are not followed but fail."""
    said = ""
    with contextlib.suppress(Exception), error:  # only the status matters
        said = error.read(300).decode(errors="replace")
    if 300 <= error.code < 400:
        target = error.headers.get("Location", "nowhere")
        said = f"redirects to {brief(redact(target), 100)}; give that URL if you trust it"
    again = error.code in (408, 429) or error.code >= 500
    return _Failure(f"HTTP {error.code} {brief(said)}".strip(), again, _after(error))


def _after(error: urllib.error.HTTPError) -> float | None:
    """Seconds that the server asks to wait, from a number or a date; None if it does not ask."""
    given = (error.headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"\d{1,9}", given):
        return float(given)
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return max(email.utils.parsedate_to_datetime(given).timestamp() - time.time(), 0.0)
    return None


# --- HTTP within a time and a size ---------------------------------------------------------------


class _Reader(io.RawIOBase):
    """Reads from a socket up to a deadline and a size; a timeout per `recv` would limit neither."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, until: float, stop: threading.Event):
        self._raw, self._sock, self._until, self._stop = raw, sock, until, stop
        self._left = REPLY_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        if self._left <= 0:
            raise _Failure(f"the reply is longer than {REPLY_BYTES} bytes")
        while True:
            if self._stop.is_set():
                raise CancelledError
            self._sock.settimeout(min(_left(self._until), _POLL_SECONDS))
            try:
                count = self._sock.recv_into(buffer, min(len(buffer), self._left))
            except TimeoutError:
                continue
            self._left -= count
            return count

    def close(self) -> None:
        self._raw.close()  # closes the socket when its connection is closed too
        super().close()


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def _opener(until: float, stop: threading.Event) -> urllib.request.OpenerDirector:
    """Opens HTTP and HTTPS through the environment's proxies.

    It does not follow redirections, because their target may be anyone.
    """

    class Bounded:
        def connect(self):
            self.timeout = min(_left(until), _CONNECT_SECONDS)
            super().connect()
            self.sock.settimeout(_left(until))

        def response_class(self, sock, *args, **kwargs):
            response = http.client.HTTPResponse(sock, *args, **kwargs)
            raw = response.fp.detach()
            response.fp = io.BufferedReader(_Reader(raw, sock, until, stop))
            return response

    class Plain(Bounded, http.client.HTTPConnection):
        pass

    class Secure(Bounded, http.client.HTTPSConnection):
        pass

    class Handler(urllib.request.HTTPHandler):
        def http_open(self, request):
            return self.do_open(Plain, request)

    class SecureHandler(urllib.request.HTTPSHandler):
        def https_open(self, request):
            return self.do_open(Secure, request, context=ssl.create_default_context())

    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        Handler(),
        SecureHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
    ):
        opener.add_handler(handler)
    return opener
