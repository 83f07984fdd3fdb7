"""Converts a checkpoint between the official and the native layout.

example:
  moss-audio-jax convert --input DIR --output DIR --format native

To make a new model, --decoder takes the decoder from a plain Qwen3 folder; encoder and adapters are
initialised, with the sizes of --input (4b, 8b, or a folder with a config.json).
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, so that Ctrl-C ends those too
    from moss_audio_jax import cli

    cli.run_verb("convert")

import sys
from collections.abc import Sequence

from moss_audio_jax import command


def main(argv: Sequence[str]) -> int:
    options = command.parser("convert", __doc__)
    options.add_argument("--input", required=True, metavar="DIR")
    options.add_argument("--output", required=True, metavar="DIR")
    options.add_argument("--format", required=True, choices=("native", "official"))
    options.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: unchanged")
    options.add_argument("--decoder", metavar="DIR", help="a Qwen3 checkpoint to start from")
    options.add_argument("--merge-lora", metavar="DIR", help="LoRA adapters to merge into kernels")
    options.add_argument("--overwrite", action="store_true", help="replace --output")
    args = options.parse_args(argv)

    from moss_audio_jax.weights.adapters import describe
    from moss_audio_jax.weights.convert import convert
    from moss_audio_jax.weights.opening import read_config

    convert(
        args.input,
        args.output,
        args.format,
        dtype=args.dtype,
        overwrite=args.overwrite,
        decoder=args.decoder,
        merge_lora=args.merge_lora,
        progress=sys.stderr.isatty(),
    )
    if args.merge_lora is not None:
        command.say(f"merged {describe(args.merge_lora, read_config(args.output))}")
    command.say(f"wrote {args.output} ({args.format})")
    return 0
