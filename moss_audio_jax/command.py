"""Shared by the verbs of the command line: a model's options, one-line errors, exit codes.

Exit codes: 0 done; 1 some input could not be used (a line names each); 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from moss_audio_jax import bucket_clients, libtpu
from moss_audio_jax.buckets import as_path
from moss_audio_jax.config import DEFAULT_CHECKPOINT, QUANTIZE
from moss_audio_jax.errors import InputError, UsageError, out_of_memory
from moss_audio_jax.files import reason, shown
from moss_audio_jax.generate.options import BATCHES_AT_ONCE
from moss_audio_jax.runtime import INTERRUPTED, keep_compiled, keep_memory, run_as_process

if TYPE_CHECKING:
    from moss_audio_jax.api import MossAudio

T, R = TypeVar("T"), TypeVar("R")

SMALL_MODEL = (
    "note: the bundled small model answers; it knows only synthetic sound, but answers fluently "
    "about any (use another with --checkpoint)"
)


class _Parser(argparse.ArgumentParser):
    """An option that takes several values may be given several times; another one only once."""

    def __init__(self, **about: Any) -> None:
        super().__init__(**about)
        self.register("action", None, _Store)
        self.given: set[str] = set()

    def parse_known_args(self, *args: Any, **more: Any) -> Any:
        self.given = set()
        return super().parse_known_args(*args, **more)

    def error(self, message: str) -> NoReturn:  # argparse would print the whole usage and exit
        raise UsageError(f"{message} ({self.prog} --help shows how)")


class _Store(argparse.Action):
    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, name: str | None = None
    ) -> None:
        if self.dest in parser.given:
            if self.nargs not in ("+", "*"):
                raise argparse.ArgumentError(self, "was given twice; expected it once")
            values = [*getattr(namespace, self.dest), *values]
        parser.given.add(self.dest)
        setattr(namespace, self.dest, values)


def parser(verb: str, doc: str) -> argparse.ArgumentParser:
    """A parser whose --help shows the module's docstring, including the example.

    Its `parse_args` raises UsageError for wrong options.
    """
    return _Parser(
        prog=f"moss-audio-jax {verb}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model_options(options: argparse.ArgumentParser, lora: bool = True) -> None:
    """The options that select a model.

    Args:
      lora: whether `--lora DIR` merges adapters into it.
    """
    group = options.add_argument_group("model")
    group.add_argument(
        "--checkpoint",
        default=DEFAULT_CHECKPOINT,
        type=as_path,
        metavar="DIR",
        help="checkpoint folder, official or native, or OWNER/NAME[@REVISION] on the Hugging Face "
        "hub; default the bundled small model",
    )
    if lora:
        group.add_argument("--lora", type=as_path, metavar="DIR", help="LoRA adapters to merge")
    else:
        options.set_defaults(lora=None)
    group.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of weights and compute; default bfloat16, of small models on CPUs float32",
    )
    group.add_argument(
        "--mesh",
        type=mesh_sizes,
        metavar="AXIS=N,...",
        help="devices to use, e.g. data=2,tensor=4; default one",
    )
    group.add_argument(
        "--encoder-attention",
        choices=("chunked", "full", "sliding"),
        help="default chunked, as in the official code",
    )
    group.add_argument(
        "--quantize",
        choices=QUANTIZE,
        help="store the decoder's weights, or also keys and values, as int8: half the "
        "memory, answers may differ; default none, or on a CPU weights if only those fit",
    )


def load_model(args: argparse.Namespace, mesh: Any = None) -> MossAudio:
    """Loads the model that the options of `add_model_options` select.

    Prints a note if its answers mean little, which is so for the small model and random weights.

    Args:
      mesh: replaces args.mesh, if several processes had to agree on one.

    Raises:
      InputError: the checkpoint cannot be used, or has no tokenizer, which every verb needs.
    """
    import jax

    from moss_audio_jax.api import MossAudio

    if args.checkpoint == DEFAULT_CHECKPOINT and jax.process_index() == 0:
        say(SMALL_MODEL)
    keep_memory()
    if args.lora is not None:
        from moss_audio_jax.weights.adapters import describe
        from moss_audio_jax.weights.opening import read_config

        found = describe(args.lora, read_config(args.checkpoint))  # before weights are read
        if jax.process_index() == 0:
            say(found)
    model = MossAudio.load(
        args.checkpoint,
        args.dtype,
        args.mesh if mesh is None else mesh,
        args.encoder_attention,
        args.lora,
        args.quantize,
        progress=sys.stderr.isatty(),
    )
    if model.tokenizer is None:
        raise InputError(
            f"{args.checkpoint}: no tokenizer; put tokenizer.json, or vocab.json and merges.txt, "
            "or a SentencePiece *.model into it"
        )
    if model.random_weights and jax.process_index() == 0:
        say("note: this checkpoint has random weights; its answers are noise")
    return model


def join_processes() -> None:
    """Joins the other processes of the run, if a launcher says that there are any."""
    import jax

    keep_compiled()
    # A process that is silent for so long is lost, and ends the others.
    limits = {}
    if seconds := os.environ.get("MOSS_AUDIO_JAX_HEARTBEAT"):
        limits["heartbeat_timeout_seconds"] = int(seconds)
    if "MOSS_AUDIO_JAX_COORDINATOR" in os.environ:  # launch/local_processes.py
        jax.distributed.initialize(
            os.environ["MOSS_AUDIO_JAX_COORDINATOR"],
            int(os.environ["MOSS_AUDIO_JAX_PROCESSES"]),
            int(os.environ["MOSS_AUDIO_JAX_PROCESS"]),
            **limits,
        )
    elif "MOSS_AUDIO_JAX_DISTRIBUTED" in os.environ:  # TPU pods, SLURM, GKE: JAX finds them
        jax.distributed.initialize(**limits)


def mesh_sizes(text: str) -> dict[str, int]:
    """{"data": 2, "tensor": 4} from "data=2,tensor=4"."""
    parts = [part.split("=") for part in text.split(",")]
    try:
        sizes = {axis: int(size) for axis, size in parts}
    except ValueError:
        sizes = {}
    if len(sizes) != len(parts):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected AXIS=N,... like data=2,tensor=4, each axis once"
        )
    return sizes


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def say(message: str) -> None:
    """Prints a message to stderr, so that stdout contains only the answer."""
    print(message, file=sys.stderr)


def run(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Runs a verb. An error that the user can correct becomes a line on stderr and an exit code.

    Without `argv` the verb gets this process's command line, and the process ends with the exit
    code.
    """
    if argv is None:
        run_as_process(lambda: run(main, sys.argv[1:]))
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names need not be valid UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    libtpu.quieten()
    with _progress(), warnings.catch_warnings():
        # Two parts of a verb that look at one file may say the same of it.
        told = functools.cache(say)
        warnings.showwarning = lambda message, *_, **__: told(_line("warning", message))
        try:
            code = main(argv)
            return code if _flushed() else 1
        except SystemExit as stop:  # --help
            return int(stop.code or 0) if _flushed() else 1
        except UsageError as error:
            say(_line("error", error))
            return 2
        except BrokenPipeError as error:
            _not_written(error)
            return 1
        except (InputError, OSError) as error:
            if _flushed():  # if not, the failed flush was the error
                say(_line("error", error))
            return 1
        except KeyboardInterrupt:
            say("interrupted")
            return INTERRUPTED
        except Exception as error:
            if bucket_clients.is_ours(error):
                say(_line("error", bucket_clients.told(error)))
                return 1
            if (advice := out_of_memory(error)) is None:
                raise
            say(_line("error", advice))
            return 2


class _Say(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


@contextlib.contextmanager
def _progress() -> Iterator[None]:
    """Prints the log messages of this package. As a library the package prints nothing."""
    log, handler = logging.getLogger("moss_audio_jax"), _Say()
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # otherwise the root's handlers would print it again
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]


def _flushed() -> bool:
    """Whether all of stdout could be written. If not, prints why."""
    try:
        sys.stdout.flush()
        return True
    except OSError as error:
        _not_written(error)
        return False


def _not_written(error: OSError) -> None:
    """Prints why stdout was not written, unless its reader has ended (`| head`).

    Afterwards Python does not try again when it ends.
    """
    if not isinstance(error, BrokenPipeError):
        say(f"error: stdout: not written: {reason(error)}")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def usable(items: Iterable[T], read: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """(item, read(item)) of each item; a line on stderr if that raises InputError."""
    for item in items:
        try:
            yield item, read(item)
        except InputError as error:
            say(_line("error", error))


def shares(
    items: Sequence[T], prepare: Callable[[T], Sequence[R]], batch_size: int, progress: bool
) -> Iterator[list[tuple[T, Sequence[R]]]]:
    """`usable` items with their prompts, in lists for one call of the engine each.

    So memory does not hold the sound of all items, and what is answered can be written before more
    is read. `progress` shows a bar while reading.
    """
    from tqdm import tqdm

    read = 0
    while read < len(items):
        share: list[tuple[T, Sequence[R]]] = []
        count = 0
        with tqdm(
            items[read:], "reading", len(items), initial=read, leave=False, disable=not progress
        ) as bar:
            for item in bar:
                read += 1
                share += usable([item], prepare)
                count = sum(len(prompts) for _, prompts in share)
                if count >= BATCHES_AT_ONCE * batch_size:
                    break
        if share:
            yield share


def writes_unicode() -> bool:
    """Whether stdout takes every character. If not, Python escapes some, and not as JSON does."""
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"


def distinct(output: str | os.PathLike[str], *inputs: str | os.PathLike[str] | None) -> None:
    """Raises UsageError if a verb would write over a file that it reads."""
    place = os.path.realpath(output)
    if place in [os.path.realpath(each) for each in inputs if each is not None]:
        raise UsageError(f"{shown(output)}: is the output and also an input; choose another output")


def look(files: Sequence[str]) -> dict[str, str]:
    """Faults in the first seconds of sound files: {file: message}.

    For verbs that then load a model, which may take minutes.
    """
    from moss_audio_jax.audio.io import audio_blocks

    wrong = {}
    for file in dict.fromkeys(files):
        try:
            with contextlib.closing(audio_blocks(file)) as blocks:
                next(blocks, None)
        except InputError as error:
            wrong[file] = _line("error", error)
    return wrong


def warn(problems: Iterable[str], name: str | None = None) -> None:
    """Prints a line for each warning. `name` says what they are about, if they do not."""
    for problem in problems:
        say(_line("warning", problem if name is None else f"{name}: {problem}"))


def _line(kind: str, problem: object) -> str:
    if isinstance(problem, OSError) and problem.filename is not None:
        problem = f"{problem.filename}: {problem.strerror}"
    return shown(f"{kind}: {problem}".replace("\n", " "))
