"""What the verbs of the command line share: a model's options, errors as one line, exit codes.

Exit codes: 0 done; 1 some input could not be used (each is named); 2 bad use.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from moss_audio_jax import libtpu
from moss_audio_jax.config import QUANTIZE
from moss_audio_jax.errors import InputError, UsageError, out_of_memory

if TYPE_CHECKING:
    from moss_audio_jax.api import MossAudio


# The small model of this project, which it trained itself (docs/small_model.md).
DEFAULT_CHECKPOINT = Path(__file__).parent / "assets" / "small"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse would print the whole usage and exit
        raise UsageError(f"{message} ({self.prog} --help shows how)")


def parser(verb: str, doc: str) -> argparse.ArgumentParser:
    """A parser whose --help is the module's docstring, example included.

    Its `parse_args` raises UsageError for bad use.
    """
    return _Parser(
        prog=f"moss-audio-jax {verb}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model_options(options: argparse.ArgumentParser) -> None:
    group = options.add_argument_group("model")
    group.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT, type=Path, metavar="DIR",
                       help="checkpoint folder, official or native; default the bundled small "
                            "model")  # fmt: skip
    group.add_argument("--lora", type=Path, metavar="DIR", help="LoRA adapters to fold in")
    group.add_argument("--dtype", choices=("bfloat16", "float32"),
                       help="weights and compute; default bfloat16, on CPUs float32")  # fmt: skip
    group.add_argument("--mesh", type=mesh_sizes, metavar="AXIS=N,...",
                       help="devices to use, e.g. data=2,tensor=4; default one")  # fmt: skip
    group.add_argument("--encoder-attention", choices=("chunked", "full", "sliding"),
                       help="default chunked, as the official code")  # fmt: skip
    group.add_argument("--quantize", choices=QUANTIZE, default="none",
                       help="int8 weights of the decoder, and int8 keys and values: half the "
                            "memory, answers may differ; default none")  # fmt: skip


def load_model(args: argparse.Namespace, mesh: Any = None) -> MossAudio:
    """The model that `add_model_options` describes; warns where its weights are random.

    Args:
      mesh: instead of args.mesh, where several processes had to agree on one.

    Raises:
      InputError: a checkpoint that cannot be used, or has no tokenizer: every verb needs text.
    """
    import jax

    from moss_audio_jax.api import MossAudio

    keep_compiled()
    keep_memory()
    if args.lora is not None:
        from moss_audio_jax.weights.adapters import describe
        from moss_audio_jax.weights.convert import read_config

        found = describe(args.lora, read_config(args.checkpoint))  # before weights are read
        if jax.process_index() == 0:
            say(found)
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    model = MossAudio.load(
        args.checkpoint,
        dtype,
        args.mesh if mesh is None else mesh,
        args.encoder_attention,
        args.lora,
        args.quantize,
    )
    if model.tokenizer is None:
        raise InputError(
            f"{args.checkpoint}: no tokenizer; put tokenizer.json, or vocab.json and merges.txt, "
            "or a SentencePiece *.model into it"
        )
    if model.random_weights and jax.process_index() == 0:
        say("note: this checkpoint has random weights; whatever it answers is noise")
    return model


def join_processes() -> None:
    """Joins the other processes of the run where a launcher says that there are any."""
    import jax

    keep_compiled()
    if "MOSS_AUDIO_JAX_COORDINATOR" in os.environ:  # launch/local_processes.py
        jax.distributed.initialize(
            os.environ["MOSS_AUDIO_JAX_COORDINATOR"],
            int(os.environ["MOSS_AUDIO_JAX_PROCESSES"]),
            int(os.environ["MOSS_AUDIO_JAX_PROCESS"]),
        )
    elif "MOSS_AUDIO_JAX_DISTRIBUTED" in os.environ:  # TPU pods, SLURM, GKE: JAX finds them
        jax.distributed.initialize()


def keep_compiled() -> None:
    """Compile once, not once a command, unless JAX was told where to keep programs."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(cache / "moss_audio_jax" / "xla"))
        # Also what compiles in less than JAX's one second: generation has dozens of such programs.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def keep_memory() -> None:
    """On CPUs: memory that was freed stays with this process.

    The C library gives large buffers back at once, and the system clears each of their pages for
    the next step anew.
    """
    import jax

    if jax.default_backend() != "cpu" or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's, malloc.h
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)


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
    """For people: to stderr, so that stdout holds the answer alone."""
    print(message, file=sys.stderr)


def run(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Runs a verb; what the user can mend becomes one line on stderr and an exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names need not be valid UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    libtpu.quieten()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(_line("warning", message))
        try:
            code = main(sys.argv[1:] if argv is None else argv)
            sys.stdout.flush()
            return code
        except SystemExit as stop:  # --help
            return int(stop.code or 0)
        except UsageError as error:
            say(_line("error", error))
            return 2
        except BrokenPipeError:  # whoever read stdout has left; nor may the last flush complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except (InputError, OSError) as error:
            say(_line("error", error))
            return 1
        except KeyboardInterrupt:
            say("interrupted")
            return 130
        except Exception as error:
            if (advice := out_of_memory(error)) is None:
                raise
            say(_line("error", advice))
            return 2


def collect(items: Sequence[Any], prepare: Callable[[Any], Any]) -> tuple[list[Any], int]:
    """prepare(item) for each; None and a line on stderr where it raised InputError.

    Returns:
      (results, how many failed).
    """
    results: list[Any] = []
    for item in items:
        try:
            results.append(prepare(item))
        except InputError as error:
            say(_line("error", error))
            results.append(None)
    return results, sum(result is None for result in results)


def _line(kind: str, problem: object) -> str:
    if isinstance(problem, OSError) and problem.filename is not None:
        problem = f"{problem.filename}: {problem.strerror}"
    return f"{kind}: {problem}".replace("\n", " ")
