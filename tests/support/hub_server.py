"""A hub on loopback: the part of its protocol by which huggingface_hub downloads a model.

    GET  /api/models/ID/revision/REV   the commit and its files
    HEAD /ID/resolve/REV/FILE          ETag, size and commit of a file
    GET  /ID/resolve/REV/FILE          its bytes, all or from a Range on

Names of headers, codes and the forms of ETags are those of the hub: a large file has its SHA-256,
others Git's SHA-1.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class HubServer:
    """Serves the files of a folder as one commit of one model. A context manager.

    Attributes:
      url: the endpoint.
      requests: (method, path, headers) of every request so far.
      faults: {file: [fault, ...]}; each GET of a file takes its next fault. "broken" is a 500,
        "truncated" half of the bytes, "stalled" the same, but the connection stays open until
        `resume` is set, "corrupted" as many other bytes, "forbidden" a 403. The file "api" is the
        answer about the model. Refusals quote the token that they got.
      sizes: {file: bytes} that the answer about the model states instead of the true ones.
      gated, token: the model is behind a gate; the token that is let in.
      commit: what `main` means; older commits stay.
    """

    def __init__(self, folder: Path, name: str = "org/tiny", commit: str = "a" * 40) -> None:
        self.name, self.commit = name, commit
        self.commits = {commit: {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}}
        self.requests: list[tuple[str, str, Mapping[str, str]]] = []
        self.faults: dict[str, list[str]] = {}
        self.sizes: dict[str, int] = {}
        self.gated, self.token = False, ""
        self.resume = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> HubServer:
        self._http.handle_error = lambda *_: None  # a client that was killed or gave up
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.resume.set()
        self._http.shutdown()
        self._http.server_close()

    def fetched(self) -> list[str]:
        """Files whose bytes were sent, with the range if one was asked for."""
        return [
            " ".join(filter(None, (path.rpartition("/")[2], headers.get("Range"))))
            for method, path, headers in self.requests
            if method == "GET" and "/resolve/" in path
        ]

    def resolve(self, revision: str) -> str | None:
        commit = self.commit if revision == "main" else revision
        return commit if commit in self.commits else None

    def model(self, commit: str) -> dict[str, Any]:
        siblings = []
        for file, content in self.commits[commit].items():
            size = self.sizes.get(file, len(content))
            siblings.append({"rfilename": file, "size": size, "blobId": git_sha1(content)})
            if is_large(file):
                lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": size}
                siblings[-1]["lfs"] = lfs | {"pointerSize": 134}
        return {"id": self.name, "modelId": self.name, "sha": commit, "siblings": siblings}


def is_large(file: str) -> bool:
    return file.endswith(".safetensors")


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, dict(self.headers)))
            api = path.startswith("/api/")
            start = f"/api/models/{hub.name}/revision/" if api else f"/{hub.name}/resolve/"
            if not path.startswith(start):
                return self._refuse(401, "RepoNotFound")
            if hub.gated and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self._refuse(403, "GatedRepo")
            revision, _, file = path.removeprefix(start).partition("/")
            commit = hub.resolve(revision)
            if commit is None:
                return self._refuse(404, "RevisionNotFound")
            faults = hub.faults.get("api" if api else file, []) if body else []
            fault = faults.pop(0) if faults else ""
            if fault in ("broken", "forbidden"):
                return self._refuse(500 if fault == "broken" else 403, "")
            if api:
                return self._send(200, json.dumps(hub.model(commit)).encode(), {}, body)
            if file not in hub.commits[commit]:
                return self._refuse(404, "EntryNotFound")
            content = hub.commits[commit][file]
            large = is_large(file)
            etag = hashlib.sha256(content).hexdigest() if large else git_sha1(content)
            headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes", "ETag": f'"{etag}"'}
            if large:
                headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(content))}
            if fault == "corrupted":
                content = bytes(9) + content[9:]
            first = int((self.headers.get("Range") or "bytes=0-")[6:].rstrip("-"))
            if first:
                whole = len(content)
                headers["Content-Range"] = f"bytes {first}-{whole - 1}/{whole}"
            self._send(206 if first else 200, content[first:], headers, body, fault)

        def _send(self, status, content, headers, body, fault="") -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if not body:
                return
            half = len(content) // 2
            self.wfile.write(content[:half])
            if fault == "truncated":
                self.close_connection = True
                return
            if fault == "stalled":
                hub.resume.wait()
            self.wfile.write(content[half:])

        def _refuse(self, status: int, code: str) -> None:
            headers = {"X-Error-Message": f"refused: {self.headers.get('Authorization')}"}
            headers |= {"X-Error-Code": code} if code else {}
            self._send(status, b"{}", headers, self.command == "GET")

    return Handler
