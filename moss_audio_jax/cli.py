"""`moss-audio-jax VERB ...`; each verb is also `python -m moss_audio_jax.VERB`."""

from __future__ import annotations

import importlib
import sys

from moss_audio_jax import __version__, runtime

TYPE_CHECKING = False  # not imported from typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

# verb -> (module with a `main(argv) -> exit code`, what it does)
VERBS = {
    "demo": ("moss_audio_jax.demo", "ask a small model about clips of sound: a table, a page"),
    "generate": ("moss_audio_jax.generate.__main__", "ask a model about sound"),
    "transcribe": ("moss_audio_jax.transcribe", "speech to text, with times: SRT, VTT, TextGrid"),
    "serve": ("moss_audio_jax.serve.__main__", "answer over HTTP in the form of OpenAI's API"),
    "convert": ("moss_audio_jax.convert", "official checkpoint <-> native checkpoint"),
    "world": (
        "moss_audio_jax.world.__main__",
        "make synthetic clips with exact labels and training rows",
    ),
    "annotate": (
        "moss_audio_jax.annotate.__main__",
        "annotate audio: events, transcripts, captions, training rows",
    ),
    "evaluate": ("moss_audio_jax.evaluate.__main__", "benchmarks: infer, score, judge, report"),
    "train": (
        "moss_audio_jax.train.__main__",
        "train, fine-tune, LoRA; continues an interrupted run",
    ),
    "plan": (
        "moss_audio_jax.plan.__main__",
        "whether a run fits a TPU slice, and how fast it would be",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns its exit code; without `argv` the one on this process's command line,
    and then ends the process."""
    if argv is None:
        run_verb()
    from moss_audio_jax import command

    return command.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"moss-audio-jax {__version__}")
        return 0
    if argv[0] not in VERBS:
        from moss_audio_jax.errors import UsageError

        raise UsageError(f"no verb {argv[0]!r}; expected one of {', '.join(VERBS)}")
    return importlib.import_module(VERBS[argv[0]][0]).main(argv[1:])


def run_verb(*verb: str) -> NoReturn:
    """Runs this process as `moss-audio-jax VERB ...`, with the rest of its command line."""
    runtime.run_as_process(lambda: main([*verb, *sys.argv[1:]]))


def _usage() -> str:
    import textwrap

    from moss_audio_jax import config_file

    verbs = "\n".join(f"  {verb:<11} {what}" for verb, (_, what) in VERBS.items())
    return (
        "usage: moss-audio-jax VERB ...\n\n"
        f"{verbs}\n\n"
        "moss-audio-jax VERB --help explains a verb with an example.\n\n"
        f"Configs for --config NAME, in {config_file.FOLDER}:\n"
        f"{textwrap.fill(', '.join(config_file.names()), 78)}"
    )


if __name__ == "__main__":
    run_verb()
