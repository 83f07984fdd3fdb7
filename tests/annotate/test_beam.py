"""Shards on Beam's own runner give the result of one run; needs apache-beam."""

import sys

import annotate_runs as runs
import pytest
import soundfile

from moss_audio_jax import command, world
from moss_audio_jax.annotate import beam

LIGHT = ("--config.checkpoint=", "--config.speech.systems=()")  # no small model


@pytest.fixture
def recordings(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(3):
        made = world.scene(i, content="sound", max_seconds=4)
        soundfile.write(folder / f"{i}.wav", made.wav, 16_000)
    return folder


def test_beam_makes_what_one_run_makes(recordings, tmp_path):
    pytest.importorskip("apache_beam")
    asked = ("--input", str(recordings), *LIGHT)
    together = tmp_path / "beam"
    words = ["--shards", "2", *asked, "--output", str(together), "--", "--runner=DirectRunner"]
    assert command.run(beam.main, words) == 0
    assert (together / "rows-00001-of-00002.jsonl").is_file()
    one = tmp_path / "one"
    assert command.run(beam.annotate, [*asked, "--output", str(one)]) == 0
    found = {k: v for k, v in runs.files(together).items() if "-of-" not in k}
    assert found == runs.files(one)


def test_a_shard_that_fails_is_tried_again(monkeypatch):
    script = "import sys; print('no disk', file=sys.stderr); sys.exit({})"

    def ends(code):
        monkeypatch.setattr(beam, "COMMAND", (sys.executable, "-c", script.format(code)))
        return beam.run_shard("1/2", [])

    assert ends(0) == ("1/2", 0)
    assert ends(1) == ("1/2", 1)  # unusable files: another try does not help
    with pytest.raises(RuntimeError, match="shard 1/2: exit code 137: no disk"):
        ends(137)


def test_bad_use(capsys):
    assert command.run(beam.main, ["--shards", "2", "--input", ".", "--shard", "0/2"]) == 2
    assert command.run(beam.main, ["--input", "."]) == 2
    assert "--shards" in capsys.readouterr().err
