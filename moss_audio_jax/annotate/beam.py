"""Annotation on Apache Beam (Dataflow, Flink, Spark, or Beam's own runner on one machine).

example:
  python -m moss_audio_jax.annotate.beam --shards 100 --input recordings --output annotated \\
      -- --runner=FlinkRunner --flink_master=HOST:8081

Every shard is a Beam element: a process `moss-audio-jax annotate --shard I/N` on a machine that
Beam chooses. All machines must see the paths --input and --output. Beam repeats a failed shard,
which then continues with the missing files. At the end this process joins the shards. Options
before `--` are those of `moss-audio-jax annotate`; options after it are Beam's. Needs apache-beam
here and on the workers.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from moss_audio_jax import command
from moss_audio_jax.annotate.__main__ import main as annotate
from moss_audio_jax.errors import UsageError, extra

COMMAND = (sys.executable, "-m", "moss_audio_jax.annotate")
_DONE = (0, 1)  # 1: some files could not be used; dropped-*.jsonl names them


def run_shard(shard: str, words: Sequence[str]) -> tuple[str, int]:
    """Annotates one shard, such as "3/100", in a new process; returns (shard, exit code).

    Raises:
      RuntimeError: the process failed for another reason than unusable files; Beam tries again.
    """
    ended = subprocess.run([*COMMAND, *words, "--shard", shard], capture_output=True, text=True)
    if ended.returncode not in _DONE:
        raise RuntimeError(f"shard {shard}: exit code {ended.returncode}: {ended.stderr[-2000:]}")
    return shard, ended.returncode


def main(argv: Sequence[str]) -> int:
    here, beams = list(argv), []
    if "--" in here:
        cut = here.index("--")
        here, beams = here[:cut], here[cut + 1 :]
    options = command.parser("annotate.beam", __doc__)
    options.add_argument("--shards", type=command.positive, required=True, metavar="N")
    args, words = options.parse_known_args(here)
    if any(word.split("=")[0] == "--shard" for word in words):
        raise UsageError("Beam chooses --shard: give only --shards")
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UsageError(f"annotate.beam needs Apache Beam: {extra('beam')}") from None

    with apache_beam.Pipeline(options=PipelineOptions(beams)) as pipeline:
        shards = [f"{i}/{args.shards}" for i in range(args.shards)]
        _ = (
            pipeline
            | apache_beam.Create(shards)
            | apache_beam.Reshuffle()  # otherwise one worker would get all shards
            | apache_beam.Map(run_shard, words)
        )
    return annotate(words)  # every record exists, so this only joins them


if __name__ == "__main__":
    sys.exit(command.run(main))
