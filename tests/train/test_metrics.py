"""The metrics in a run's files. Not covered: how TensorBoard reads them."""

import json
import struct

from tensorboardX.proto.event_pb2 import Event

from moss_audio_jax.train.metrics import Metrics


def scalars(folder) -> list[tuple[int, str, float]]:
    """(step, tag, value) of all event files: records of length, checksum, bytes, checksum."""
    found = []
    for file in sorted(folder.iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            at += 16 + size
    return found


def test_a_continued_run_reports_each_step_once(tmp_path):
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        metrics = Metrics(tmp_path, start, 4, 0.0)
        for step in steps:
            metrics.write(step, {"loss": step / 2, "bad": float("nan"), "name": "text"})
        metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"], row["bad"]) for row in rows] == [
        (step, step / 2, None) for step in (1, 2, 3, 4)
    ]
    drawn = scalars(tmp_path / "tensorboard")
    assert [(step, value) for step, tag, value in drawn if tag == "loss"] == [
        (1, 0.5),
        (2, 1.0),
        (3, 1.5),
        (3, 1.5),
        (4, 2.0),  # TensorBoard drops the first 3 itself
    ]
    assert "name" not in {tag for _, tag, _ in drawn}
