"""Evaluates a model: asks it the questions of a benchmark, and scores its answers.

example:
  moss-audio-jax evaluate infer --benchmark mmau-mini --data mmau-test-mini.json \\
      --checkpoint DIR --output predictions.jsonl
  moss-audio-jax evaluate score --benchmark mmau-mini --data mmau-test-mini.json \\
      --predictions predictions.jsonl --output score.json

infer    writes a model's predictions, one JSON line each; run it again to continue
score    scores predictions by the official rule and by a strict one
judge    asks a model behind an OpenAI-compatible endpoint to judge captions and open answers
export   writes predictions in the form that a benchmark's official script reads
report   writes score files as one page, in HTML and Markdown

moss-audio-jax evaluate VERB --help explains one with an example.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, so that Ctrl-C ends those too
    from moss_audio_jax import cli

    cli.run_verb("evaluate")

import importlib
from collections.abc import Sequence

from moss_audio_jax.errors import UsageError

VERBS = {  # verb -> module with a `main(argv) -> exit code`
    "infer": "moss_audio_jax.evaluate.infer",
    "score": "moss_audio_jax.evaluate.score",
    "judge": "moss_audio_jax.evaluate.judge",
    "export": "moss_audio_jax.evaluate.official_files",
    "report": "moss_audio_jax.evaluate.report",
}


def main(argv: Sequence[str]) -> int:
    if not argv:
        raise UsageError(f"a verb of evaluate is required: one of {', '.join(VERBS)}")
    if argv[0] in ("-h", "--help"):
        print(__doc__.rstrip())
        return 0
    if argv[0] not in VERBS:
        raise UsageError(f"no verb {argv[0]!r} of evaluate; expected one of {', '.join(VERBS)}")
    return importlib.import_module(VERBS[argv[0]]).main(argv[1:])
