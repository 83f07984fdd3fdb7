"""Buckets on loopback: real servers of both protocols, and a proxy between that breaks answers."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import mmap
import os
import random
import socket
import struct
import threading
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

BUCKET = "bucket-of-tests"
FAULTS = ("busy", "reset", "lost", "truncated", "slow")


@contextlib.contextmanager
def servers(folder: str | None = None) -> Iterator[dict[str, str]]:
    """{"gs": url, "s3": url} of a Cloud Storage emulator and of moto, each with one bucket.

    Args:
      folder: where the former keeps objects that are too large for memory; default: in memory.
    """
    from gcp_storage_emulator.server import create_server
    from moto.server import ThreadedMotoServer

    for name in ("werkzeug", "gcp_storage_emulator"):  # a line or more for each request
        logging.getLogger(name).setLevel(logging.CRITICAL)
    google = create_server(
        "127.0.0.1", 0, in_memory=folder is None, data_dir=folder, default_bucket=BUCKET
    )
    if folder is not None:
        _take_large_objects(google._storage)
    google.start()
    amazon = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    amazon.start()
    try:
        ports = google._api._httpd.server_port, amazon.get_host_and_port()[1]
        make = http.client.HTTPConnection("127.0.0.1", ports[1], timeout=120)
        make.request("PUT", f"/{BUCKET}", headers={"Host": "127.0.0.1"})
        assert make.getresponse().status == 200
        yield {"gs": f"http://127.0.0.1:{ports[0]}", "s3": f"http://127.0.0.1:{ports[1]}"}
    finally:
        google.stop()
        amazon.stop()


def _take_large_objects(storage: Any) -> None:
    """The emulator reads a whole object for each range of it, and each piece of an upload makes it
    write all pieces again. Here it maps objects, appends pieces and renames what is complete. It
    also forgets deleted objects at once, and leaves out MD5, as Cloud Storage may."""
    import google_crc32c
    from gcp_storage_emulator.exceptions import BadRequest
    from gcp_storage_emulator.handlers import objects
    from gcp_storage_emulator.storage import RESUMABLE_DIR

    files = storage._store
    write, place = files.write_bytes, files._disk_path

    def read(name: str) -> bytes | mmap.mmap:
        with open(place(name), "rb") as file:
            empty = not os.fstat(file.fileno()).st_size
            return b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def add(
        upload: str,
        content: bytes,
        total_size: int | None = None,
        expected_start: int | None = None,
    ) -> bytes | mmap.mmap | None:
        name = f"{RESUMABLE_DIR}/{storage.safe_id(upload)}"
        place(name).parent.mkdir(parents=True, exist_ok=True)
        with open(place(name), "ab") as file:
            if expected_start not in (None, file.tell()):
                raise BadRequest(f"expected {file.tell()}, got {expected_start}")
            file.write(content)
            size = file.tell()
        return None if total_size is None or size < total_size else read(name)

    def create(
        bucket: str, name: str, content: Any, about: dict, upload: str | None = None
    ) -> None:
        target = f"{bucket}/{name}"
        if upload is None:
            write(target, content)
        else:
            place(target).parent.mkdir(parents=True, exist_ok=True)
            place(f"{RESUMABLE_DIR}/{storage.safe_id(upload)}").rename(place(target))
            storage.delete_resumable_file_obj(upload)
        storage.objects.setdefault(bucket, {})[name] = about

    def checksum(content: Any) -> str:
        crc = google_crc32c.Checksum()  # it takes bytes alone
        for at in range(0, len(content), 1 << 24):
            crc.update(bytes(content[at : at + (1 << 24)]))
        return b64encode(crc.digest()).decode()

    objects._crc32c, objects._md5 = checksum, lambda _: None
    files.read_bytes, storage.add_to_resumable_upload, storage.create_file = read, add, create
    storage._write_config_to_file = lambda: None
    storage.buckets[BUCKET]["softDeletePolicy"] = {"retentionDurationSeconds": "0"}


@contextlib.contextmanager
def proxies() -> Iterator[dict[str, Proxy]]:
    """A proxy before each of the servers."""
    with servers() as urls, Proxy(urls["gs"]) as google, Proxy(urls["s3"]) as amazon:
        yield {"gs": google, "s3": amazon}


def environment(urls: dict[str, str]) -> dict[str, str]:
    """The variables by which a user names an endpoint of their own, and made-up credentials."""
    return {
        "STORAGE_EMULATOR_HOST": urls["gs"],
        "TENSORSTORE_GCS_HTTP_URL": urls["gs"],
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": urls["gs"],
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "AWS_ENDPOINT_URL": urls["s3"],
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


class Proxy:
    """Forwards to a server, and breaks a share of the answers.

    busy: 503 before the server hears of it. reset: the same, with the connection cut. lost: the
    server did it, but the connection is cut before the answer. truncated: half of the answer's body
    comes. slow: it comes in ten pieces.

    It also does what Cloud Storage does and the emulator does not: it keeps to ifGenerationMatch,
    tells the generation of what is read, and answers a repeated last piece of an upload as before.

    Attributes:
      share: of requests, 0 to 1; it may be changed at any time.
      done: how often each fault came.
    """

    def __init__(self, upstream: str, share: float = 0.0, seed: int = 0):
        self.upstream = upstream.partition("://")[2]
        self.share, self.done = share, Counter()
        self.answers: dict[str, tuple] = {}  # to the last pieces of uploads
        self.writing = threading.Lock()
        self.requests: list[tuple[str, str, str]] = []  # method, path, Range
        self._draw, self._lock = random.Random(seed), threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault(self) -> str | None:
        with self._lock:
            if self._draw.random() >= self.share:
                return None
            kind = self._draw.choice(FAULTS)
            self.done[kind] += 1
            return kind


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Proxy

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):
            return super().handle_one_request()
        self.close_connection = True

    def __getattr__(self, name: str):
        if name.startswith("do_"):
            return self._forward
        raise AttributeError(name)

    def log_message(self, *_: object) -> None:
        pass

    def _forward(self) -> None:
        body = self._body()
        self.owner.requests.append((self.command, self.path, self.headers.get("Range", "")))
        kind = self.owner.fault()
        if kind == "reset":
            return self._reset()
        if kind == "busy":
            return self._answer(503, [("Retry-After", "0")], b"busy")
        query = parse_qs(urlsplit(self.path).query)
        if self.path in self.owner.answers:
            return self._answer(*self.owner.answers[self.path])
        with self.owner.writing if "ifGenerationMatch" in query else contextlib.nullcontext():
            name = "".join(query.get("name", []))
            wanted = query.get("ifGenerationMatch", [None])[0]
            if wanted is not None and self._generation(quote(name, safe="")) != wanted:
                return self._answer(412, [], b'{"error": {"code": 412, "message": "no match"}}')
            status, headers, data = self._upstream(self.command, self.path, body)
        media = "alt=media" in self.path and status in (200, 206)
        if media and not any(name.lower() == "x-goog-generation" for name, _ in headers):
            name = urlsplit(self.path).path.rpartition("/o/")[2]
            headers.append(("x-goog-generation", self._generation(name)))
        if "upload_id" in query and self.command != "DELETE" and status == 200:
            self.owner.answers[self.path] = status, headers, data
        if kind == "lost":
            return self._reset()
        self._answer(status, headers, data, kind)

    def _upstream(self, method: str, path: str, body: bytes = b"") -> tuple[int, list, bytes]:
        upstream = http.client.HTTPConnection(self.owner.upstream, timeout=60)
        sent = {k: v for k, v in self.headers.items() if k.lower() not in _HOP}
        with contextlib.closing(upstream):
            upstream.request(method, path, body, sent)
            response = upstream.getresponse()
            return response.status, response.getheaders(), response.read()

    def _generation(self, name: str) -> str:
        """An object's generation; "0" if there is none."""
        bucket = urlsplit(self.path).path.partition("/b/")[2].partition("/")[0]
        status, _, data = self._upstream("GET", f"/storage/v1/b/{bucket}/o/{name}")
        return json.loads(data)["generation"] if status == 200 else "0"

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, headers: list, data: bytes, kind: str | None = None) -> None:
        self.send_response_only(status)
        length = str(len(data))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            elif name.lower() not in _HOP:
                self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", length)
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind == "truncated" and len(data) > 1:
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            return self._reset()
        if kind == "slow":
            for at in range(0, len(data), max(1, len(data) // 10)):
                self.wfile.write(data[at : at + max(1, len(data) // 10)])
                self.wfile.flush()
                time.sleep(0.02)
            return
        self.wfile.write(data)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


_HOP = ("connection", "transfer-encoding", "content-length", "keep-alive", "date", "server")


def fill(folder: Path, target: str) -> None:
    """Copies a local folder into a bucket, by fsspec and not by the code that is tested."""
    import fsspec

    fs, root = fsspec.core.url_to_fs(target)
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            fs.pipe_file(f"{root}/{file.relative_to(folder)}", file.read_bytes())


def objects(target: str) -> dict[str, bytes]:
    """{name: contents} of what lies below an address, read by fsspec."""
    import fsspec

    fs, root = fsspec.core.url_to_fs(target)
    fs.invalidate_cache()
    return {name.removeprefix(f"{root}/"): fs.cat_file(name) for name in fs.find(root)}
