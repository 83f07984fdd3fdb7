"""Fetches sound from the hosts that the operator allows, and from nowhere else.

A client's URL makes this server open a connection, which may reach what the client cannot. So the
host must be in the list; every address that it resolves to must be public, and the connection goes
to such an address, not to a second resolution; redirections are refused; time and size are limited.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
import urllib.parse
from collections.abc import Collection

from moss_audio_jax.errors import InputError

_PIECE = 1 << 16
_PORTS = {"http": 80, "https": 443}


def fetch(url: str, hosts: Collection[str], max_bytes: int, seconds: float) -> bytes:
    """The body of an http or https URL.

    Args:
      hosts: allowed hosts, "cdn.example.com" or with a port of its own "cdn.example.com:8443".
      max_bytes: a longer body is refused.
      seconds: for all of it.

    Raises:
      InputError: the URL is not allowed, or cannot be fetched.
    """
    until = time.monotonic() + seconds
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        raise InputError("is not a URL") from None
    if parts.scheme not in _PORTS or not url.isascii() or not url.isprintable() or " " in url:
        raise InputError("is not an http or https URL; expected one, or data:audio/...;base64,...")
    if parts.username is not None or parts.password is not None:
        raise InputError("holds a user name or a password, which are not sent")
    usual = port == _PORTS[parts.scheme]
    if not hosts or not ((host in hosts and usual) or f"{host}:{port}" in hosts):
        raise InputError(
            "its host is not one that this server may fetch from (--allow-audio-host); send the "
            "sound itself, as input_audio or a data: URL"
        )
    address = _public(host, port)
    path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    connection = _Connection(address, host, port, parts.scheme == "https", until)
    try:
        connection.request("GET", path, headers={"Accept": "audio/*, video/*, */*;q=0.1"})
        response = connection.getresponse()
        if response.status != 200:
            raise InputError(f"cannot be fetched (HTTP {response.status}; redirects are refused)")
        body = bytearray()
        while piece := response.read1(_PIECE):
            body += piece
            if len(body) > max_bytes:
                raise InputError(f"holds more than {max_bytes / 1e6:g} MB, the limit")
            connection.sock and connection.sock.settimeout(_left(until))
        return bytes(body)
    except (OSError, http.client.HTTPException) as error:
        raise InputError(f"cannot be fetched ({type(error).__name__})") from None
    finally:
        connection.close()


def is_public(address: str) -> bool:
    """Whether an IP address is of the public internet, also where it stands within an IPv6 one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    within = [ip]
    if ip.version == 6:
        within += filter(None, (ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())))
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            within.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    return all(each.is_global and not each.is_multicast for each in within)


def _public(host: str, port: int) -> str:
    """An address of the host. Raises InputError if one of its addresses is not public."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise InputError("its host is not known") from None
    addresses = [str(each[4][0]) for each in found]
    if not addresses or not all(map(is_public, addresses)):
        raise InputError("its host has an address that is not public")
    return addresses[0]


class _Connection(http.client.HTTPConnection):
    """Connects to one address; the host is named in the request and in the certificate."""

    def __init__(self, address: str, host: str, port: int, secure: bool, until: float) -> None:
        super().__init__(host, port)
        self.default_port = _PORTS["https" if secure else "http"]
        self._address, self._secure, self._until = address, secure, until

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), _left(self._until))
        if self._secure:
            context = ssl.create_default_context()
            self.sock = context.wrap_socket(self.sock, server_hostname=self.host)
        self.sock.settimeout(_left(self._until))


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
