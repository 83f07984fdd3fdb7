"""Scenes that tools/small/train.py joins end to end: answers about them stay true."""

import re

import numpy as np

from moss_audio_jax import world
from moss_audio_jax.data.records import encode_record, parse_row


def test_joined_sounds_are_where_they_were(monkeypatch):
    from tools.small import train as train_small

    labels = [world.scene(i, content="sound", max_seconds=4).labels for i in range(8)]
    frames = [round(100 * each["duration"]) for each in labels]
    rows = [
        parse_row(
            encode_record(world.record(each, "a.wav"), [np.full((128, count), number, np.float32)])
        )
        for number, (each, count) in enumerate(zip(labels, frames, strict=True))
    ]
    groups = list(train_small.grouped(iter(rows), 1000))
    assert sorted(row.id for group in groups for row in group) == sorted(row.id for row in rows)
    assert len(groups) < len(rows)
    for group in groups:
        made = parse_row(train_small._join_sounds(group))
        at, expected = 0, []
        for row in group:
            number = next(i for i, other in enumerate(rows) if other is row)
            part = np.asarray(made.clips[0])[:, at : at + frames[number]]
            assert (part == number).all()  # whose sound it is
            expected += [
                (e["start"] + at / 100, e["end"] + at / 100) for e in labels[number]["events"]
            ]
            at += frames[number]
        assert at == made.clips[0].shape[1] <= 1000
        (timeline,) = (b.messages[1]["content"] for b in made.branches if b.task == "events")
        found = [
            tuple(map(float, re.findall(r"[\d.]+", line)[:2])) for line in timeline.split("\n")
        ]
        assert len(found) == len(expected)
        np.testing.assert_allclose(sorted(found), sorted(expected), atol=0.0051)
        tags = [tag for tag in made.tags if tag.text.startswith("sound:")]
        np.testing.assert_allclose([tag[1:] for tag in tags], expected, atol=0.002)
        assert not {b.task for b in made.branches} & {"asr", "caption", "loudness", "any_music"}
