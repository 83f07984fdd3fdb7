"""Serves a model over HTTP in the form of OpenAI's API: chat about sound, transcriptions.

example:
  moss-audio-jax serve --checkpoint DIR --port 8000 --api-key-file keys

Clients then use http://127.0.0.1:8000/v1. SIGTERM lets running answers end, for --drain-seconds.
Several processes (launch/) serve together if --mesh spans all of them: each gets the same command,
and process 0 listens.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, so that Ctrl-C ends those too
    from moss_audio_jax import cli

    cli.run_verb("serve")

import asyncio
import atexit
import contextlib
import ipaddress
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moss_audio_jax import command, hub
from moss_audio_jax.errors import InputError, UsageError, extra
from moss_audio_jax.files import read_text, reason, shown
from moss_audio_jax.generate.options import BATCH_SIZE
from moss_audio_jax.serve.adapters import add_adapters, check, start
from moss_audio_jax.serve.limits import Limits, add_limits, limits_from

KEY = "MOSS_AUDIO_JAX_API_KEY"
_GRACE = 2  # seconds in which clients are told that their answers were ended
_TRIM_TICKS = 100  # of a tenth of a second


def main(argv: Sequence[str]) -> int:
    options = command.parser("serve", __doc__)
    command.add_model_options(options, lora=False)
    add_adapters(options)
    options.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1, this machine"
    )
    options.add_argument(
        "--port", type=int, default=8000, metavar="N", help="default 8000; 0 takes a free one"
    )
    options.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"keys of clients, one a line; or one key in {KEY}",
    )
    options.add_argument(
        "--no-api-key", action="store_true", help="let everyone in who reaches another --host"
    )
    options.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="without keys, a name that requests may call this server by, besides localhost",
    )
    options.add_argument(
        "--model-name",
        action="append",
        metavar="NAME",
        help="what clients call the model; may be repeated; default the folder's name",
    )
    options.add_argument(
        "--allow-audio-host",
        action="append",
        default=[],
        metavar="HOST",
        help="a host that audio_url may be fetched from; may be repeated; default none",
    )
    options.add_argument(
        "--slots",
        type=command.positive,
        default=BATCH_SIZE,
        metavar="N",
        help=f"answers that are written together; default {BATCH_SIZE}",
    )
    options.add_argument(
        "--cache-tokens",
        type=command.positive,
        metavar="N",
        help="tokens of prompts and answers for which the cache has room; default 32768",
    )
    options.add_argument(
        "--compile",
        choices=("start", "demand"),
        default="start",
        help="compile all programs before the first request, or each when a request needs it; "
        "default start",
    )
    add_limits(options)
    args = options.parse_args(argv)
    if not 0 <= args.port < 2**16:
        raise UsageError(f"--port {args.port}: expected a port from 0 to 65535")
    keys = _keys(args.api_key_file)
    local = _is_loopback(args.host)
    if not local and not keys and not args.no_api_key:
        raise UsageError(
            f"--host {args.host} can be reached by others; give --api-key-file, or --no-api-key to "
            "let everyone in"
        )
    limits = limits_from(vars(args))
    try:
        from moss_audio_jax.serve.app import LOOPBACK, make_app
        from moss_audio_jax.serve.state import State
    except ModuleNotFoundError as error:
        raise InputError(f"serve needs {error.name}: {extra('serve')}") from None

    names = args.model_name or [hub.title(args.checkpoint)]
    check(args.adapters, names, args.checkpoint)
    size = {"slots": args.slots, "max_new_tokens": limits.max_new_tokens}
    if args.cache_tokens is not None:
        size["cache_tokens"] = args.cache_tokens
    import jax

    command.join_processes()
    mesh = _mesh(args.mesh, argv)
    if mesh.is_multi_process and args.adapters:
        raise UsageError(
            "--lora NAME=DIR needs a server of one process; merge the adapters into a checkpoint "
            "(convert --merge-lora) and serve that"
        )
    if jax.process_index() > 0:
        with _ends_at_once(mesh):
            model = command.load_model(args, mesh)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # process 0 says when it ends
            untold = None if args.compile == "demand" else lambda *_: None  # process 0 shows a bar
            model.follow(**size, compiling=untold)
        return 0
    with _ends_at_once(mesh), _listening(args.host, args.port) as listening:
        model = command.load_model(args, mesh)
        hosts = () if keys or not local else {*LOOPBACK, args.host, *args.allow_host}
        with _compiling(args.compile) as compiling:
            service = model.service(**size, compiling=compiling)
        with contextlib.ExitStack() as engines:
            engines.enter_context(service)
            adapters = start(model, service, args.adapters, size, engines)
            state = State(model, service, names, limits, args.allow_audio_host, adapters=adapters)
            engines.callback(state.close)
            _serve(make_app(state, keys, hosts), state, listening, limits)
        if mesh.is_multi_process and (service.dead is not None or service.stuck):
            raise InputError("the engine answers no more; start all processes again")
    return 0


def _mesh(sizes: dict[str, int] | None, argv: Sequence[str]) -> Any:
    """The mesh that --mesh asks for, of the devices of all processes.

    Raises:
      UsageError: it does not span them, or they were started differently.
    """
    import jax

    from moss_audio_jax.runtime import code_version, from_all
    from moss_audio_jax.sharding import as_mesh

    mesh, count = as_mesh(sizes), jax.process_count()
    # JAX takes SIGTERM as a note for trainers, and process 1 of a container would not heed it.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    if count == 1:
        return mesh
    spanned = len({device.process_index for device in mesh.devices.flat})
    if spanned < count:
        raise UsageError(
            f"--mesh has devices of {spanned} of the {count} processes; expected of all, such as "
            f"--mesh tensor={jax.device_count()}"
        )
    started = from_all([code_version(), *argv])
    if any(each != started[0] for each in started):
        raise UsageError(
            "the processes have different commands or code; start all of them with the same"
        )
    return mesh


@contextlib.contextmanager
def _ends_at_once(mesh: Any) -> Iterator[None]:
    """Of several processes, one that fails ends at once, and JAX ends the others.

    At its exit JAX would wait for the others for minutes, and they for it.
    """

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    try:
        yield
    except BaseException:
        if mesh.is_multi_process:
            atexit.register(leave)
        raise


def _serve(app: Any, state: Any, listening: socket.socket, limits: Limits) -> None:
    """Answers until SIGTERM, and then until what runs has ended or the deadline is over."""
    import uvicorn

    from moss_audio_jax.runtime import trim_memory
    from moss_audio_jax.serve.realtime import socket_options

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            def stop(*_: object) -> None:
                state.draining = self.should_exit = True

            before = signal.signal(signal.SIGTERM, stop)
            try:  # SIGINT stays that of every verb
                yield
            finally:
                signal.signal(signal.SIGTERM, before)

        async def shutdown(self, sockets: Any = None) -> None:
            # After the deadline the engines end their answers, each of which is told so.
            for service in state.services.values():
                end = threading.Thread(target=service.close, daemon=True)
                asyncio.get_running_loop().call_later(limits.drain_seconds, end.start)
            # uvicorn closes sockets at once; these end by themselves when they have answered.
            for server in self.servers:
                server.close()
            latest = time.monotonic() + limits.drain_seconds + _GRACE
            while state.sockets and time.monotonic() < latest:
                await asyncio.sleep(0.1)
            await super().shutdown(sockets)

        async def on_tick(self, counter: int) -> bool:
            # Long-lived small objects between large buffers that were freed keep those resident.
            if counter % _TRIM_TICKS == _TRIM_TICKS - 1:
                threading.Thread(target=trim_memory, name="trim", daemon=True).start()
            # Of several processes none can go on without the others, so all start again.
            if state.model.mesh.is_multi_process and state.service.dead is not None:
                self.should_exit = True
            return await super().on_tick(counter)

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            host, port = listening.getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            command.say(f"serving {', '.join(state.served)} at http://{host}:{port}/v1")

    config = uvicorn.Config(
        app,
        http="h11",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        log_level="warning",  # uvicorn would log the addresses of those who open sockets
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=round(limits.drain_seconds) + _GRACE,
        **socket_options(limits),
    )
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    try:
        listening.listen()
    except OSError as error:  # another program took it while the model was loaded
        host, port = listening.getsockname()[:2]
        raise InputError(f"cannot listen on {host}:{port} ({reason(error)})") from None
    Server(config).run([listening])


def _is_news(record: logging.LogRecord) -> bool:
    """False for what uvicorn adds when Ctrl-C ends an answer, or when `Gate` refused a socket."""
    error = record.exc_info[1] if record.exc_info else None
    refused = "without completing handshake" in record.getMessage()
    return not (refused or isinstance(error, asyncio.CancelledError | KeyboardInterrupt))


@contextlib.contextmanager
def _compiling(when: str) -> Iterator[Callable[[int, int], None] | None]:
    """What is told of the programs that are compiled at the start: a bar."""
    if when == "demand":
        yield None
        return
    ready = 0
    with tqdm(desc="compiling", unit="program", leave=False, disable=None) as bar:

        def told(number: int, count: int) -> None:
            nonlocal ready
            bar.total = count
            bar.update(number - ready)
            ready = number

        yield told
        command.say(f"{ready} programs are ready")


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that has its port before a model is loaded for minutes; it listens afterwards."""
    with contextlib.ExitStack() as sockets:
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listening = sockets.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            if sys.platform == "linux":
                # There two such sockets may have one port until one of them listens. So another
                # name, which only one can have, stands for this one.
                taken = sockets.enter_context(socket.socket(socket.AF_UNIX))
                taken.bind(f"\0moss-audio-jax {listening.getsockname()[:2]}")
        except (OSError, OverflowError, UnicodeError) as error:
            raise UsageError(f"cannot listen on {host}:{port} ({reason(error)})") from None
        yield listening


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _keys(file: Path | None) -> list[str]:
    """The keys of clients. Raises InputError if the file holds none."""
    keys = [os.environ[KEY]] if os.environ.get(KEY) else []
    if file is not None:
        lines = [line.strip() for line in read_text(file, "a file of API keys").splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise InputError(f"{shown(file)}: holds no key; expected one a line")
        keys += found
    if any(not re.fullmatch(r"[\x21-\x7e]{8,}", key) for key in keys):
        raise InputError("an API key is too short or holds spaces; expected 8 or more characters")
    return keys
