"""Speed of the procedural world on one core: seconds of sound made in a second.

    python tools/bench/world.py [--scenes 200] [--split train]

Prints one JSON line: the real-time factor of all scenes and of each content, by wall clock and by
processor time (espeak's process included, so that a busy machine does not count), of scenes with
their log-mel, and of the training rows (rows a second). Set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict

from moss_audio_jax import world
from moss_audio_jax.audio.features import log_mel
from moss_audio_jax.audio.lengths import SAMPLE_RATE


def processor_seconds() -> float:
    """Of this process and of its children: those that ended, and espeak's that still runs."""
    t = os.times()
    total = t.user + t.system + t.children_user + t.children_system
    tick = os.sysconf("SC_CLK_TCK")
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/children", encoding="ascii") as file:
            children = file.read().split()
        for child in children:
            with open(f"/proc/{child}/stat", encoding="ascii") as file:
                fields = file.read().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15])) / tick  # its own time and its children's
    return total


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--scenes", type=int, default=200)
    options.add_argument("--split", choices=tuple(world.SPLITS), default="train")
    args = options.parse_args()

    for index in range(10):  # espeak starts, filters are designed
        world.scene(index, args.split, seed=1)
    sound: dict[str, float] = defaultdict(float)
    wall: dict[str, float] = defaultdict(float)
    made = []
    processor = processor_seconds()
    for index in range(args.scenes):
        start = time.perf_counter()
        one = world.scene(index, args.split)
        content = one.labels["content"]
        wall[content] += time.perf_counter() - start
        sound[content] += len(one.wav) / SAMPLE_RATE
        made.append(one)
    processor = processor_seconds() - processor

    start = time.perf_counter()
    for one in made:
        log_mel(one.wav)
    mel = time.perf_counter() - start
    start = time.perf_counter()
    rows = sum(len(world.rows(one.labels, "x.wav")) for one in made)
    asked = time.perf_counter() - start
    seconds, spent = sum(sound.values()), sum(wall.values())
    print(
        json.dumps(
            {
                "scenes": args.scenes,
                "mean_seconds": round(seconds / args.scenes, 2),
                "real_time_factor": round(seconds / spent, 1),
                "real_time_factor_processor": round(seconds / processor, 1),
                "with_log_mel": round(seconds / (spent + mel), 1),
                "by_content": {name: round(sound[name] / wall[name], 1) for name in sorted(sound)},
                "rows_a_scene": round(rows / args.scenes, 1),
                "rows_a_second": round(rows / asked),
                "load_average": round(os.getloadavg()[0], 1),
            }
        )
    )


if __name__ == "__main__":
    main()
