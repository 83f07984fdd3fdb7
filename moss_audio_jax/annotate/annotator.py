"""Makes the records of one file.

They are written completely or not at all; later runs with the same inputs keep them.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
from ml_collections import ConfigDict

from moss_audio_jax import buckets, command, hub
from moss_audio_jax.annotate import boundary, merge
from moss_audio_jax.annotate.branches import Branches
from moss_audio_jax.annotate.defaults import BUNDLED
from moss_audio_jax.annotate.ears import Ears
from moss_audio_jax.annotate.ears import fingerprint as checkpoint_fingerprint
from moss_audio_jax.annotate.features import clip_features
from moss_audio_jax.annotate.posteriors import Posteriors, load_posteriors, segment_posteriors
from moss_audio_jax.annotate.record import Record, centi
from moss_audio_jax.annotate.segment import segment
from moss_audio_jax.annotate.source import Sound, Source
from moss_audio_jax.annotate.spans import SegmentOptions
from moss_audio_jax.annotate.work import Work, new_record
from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.buckets import as_path
from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.errors import InputError
from moss_audio_jax.files import (
    brief,
    disk_is_full,
    not_written,
    open_regular,
    parse_json,
    read_json,
    shown,
)
from moss_audio_jax.journal import write_lines
from moss_audio_jax.remote import redact
from moss_audio_jax.weights.helpers import load_helpers
from moss_audio_jax.weights.opening import read_config

_GROUP_SECONDS = 256.0  # of sound that the branches process together
_CLIPPED = 0.001  # share of samples at full scale from which a file is called clipped
Done = dict[str, Any]


class _Needed(NamedTuple):
    """A source without records: what its records depend on, and the given posteriors."""

    key: str
    content: str
    given: Posteriors | None


def run_fingerprint(config: ConfigDict) -> str:
    """A hash of what decides a record besides its source: config, code, model, replays."""
    digest = hashlib.blake2b(digest_size=12)
    shown = {
        k: v
        for k, v in json.loads(config.to_json_best_effort()).items()
        if k not in ("page_clips", "page_seconds", "rows")
    }
    digest.update(json.dumps(shown, sort_keys=True).encode())
    for file in (*sorted(Path(__file__).parent.glob("*.py")), boundary.NETWORKS):
        digest.update(file.read_bytes())
    if folder := checkpoint_folder(config):
        digest.update(checkpoint_fingerprint(folder).encode())
    for spec in config.experts.values():
        target = spec.get("target")
        if spec.get("kind") == "replay" and target and os.path.isfile(target):
            digest.update(Path(target).read_bytes())
    return digest.hexdigest()


def checkpoint_folder(config: ConfigDict) -> Path | None:
    if not config.checkpoint:
        return None
    if config.checkpoint == BUNDLED:
        return DEFAULT_CHECKPOINT
    return hub.folder_of(config.checkpoint)


def check_parts(config: ConfigDict) -> None:
    """Checks the experts and the model's files before the work, once.

    Raises:
      InputError, UsageError: as Branches and `MossAudio.load` would.
    """
    Branches(config, None)
    if folder := checkpoint_folder(config):
        read_config(folder)
        load_helpers(folder)


class Annotator:
    """Annotates file after file with the small model and the experts.

    The model is loaded when the first file needs it, so not at all if every record exists.

    Args:
      warn: called for the first segment whose sound the model does not know.
      tick: called with the share of a file that is done.
    """

    def __init__(
        self,
        config: ConfigDict,
        out: Path,
        key: str,
        warn: Callable[[str], None],
        tick: Callable[[float], None] = lambda share: None,
    ):
        self._config, self._out, self._key = config, out, key
        self._warn, self._tick = warn, tick
        self._options = SegmentOptions(**config.segment)

    @functools.cached_property
    def _branches(self) -> Branches:
        folder = checkpoint_folder(self._config)
        if not folder:
            return Branches(self._config, None, self._warn)
        command.keep_compiled()
        command.keep_memory()
        return Branches(self._config, Ears.load(folder), self._warn)

    def file(self, source: Source) -> Done | str:
        """The result for a file (see `_write`), or why it could not be used.

        Raises:
          InputError: the model cannot be loaded, or the disk is full, so every file would fail.
        """
        made = self._guarded(self._look, source)
        if isinstance(made, _Needed):
            branches = self._branches
            made = self._guarded(self._make, source, made, branches)
        return made

    def _guarded(self, step: Callable[..., Any], source: Source, *args: Any) -> Any:
        try:
            return step(source, *args)
        except Exception as error:  # one file must not end a run over a million
            full = error if isinstance(error, OSError) else error.__cause__
            if isinstance(full, OSError) and disk_is_full(full):
                # Other files could not be written either.
                raise not_written(self._out, full) from None
            known = isinstance(error, InputError | OSError)
            why = str(error) if known else f"{type(error).__name__}: {error}"
        for name in (source.path, shown(source.path)):
            why = why.removeprefix(f"{name}: ")
        return redact(brief(why, 300))

    def _look(self, source: Source) -> Done | _Needed:
        """The records of an earlier run, or what is needed to make them."""
        if source.problem:
            raise InputError(source.problem)
        with open_regular(source.path, "an audio file") as opened:
            content = hashlib.file_digest(opened, "blake2b").hexdigest()[:24]
        given, given_key = self._given(source)
        made_of = hashlib.blake2b(f"{self._key} {content} {given_key} {source}".encode())
        key = made_of.hexdigest()[:24]
        there = read_done(self._out, source)
        return there if there and there["fingerprint"] == key else _Needed(key, content, given)

    def _make(self, source: Source, needed: _Needed, branches: Branches) -> Done:
        given = needed.given
        sidecar = self._out / "records" / f"{source.id}.json"
        sidecar.unlink(missing_ok=True)
        folder = self._out / "audio" / source.id
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        clipped = _Clipped()
        with Sound(source.path, self._out) as sound:
            try:
                features = clip_features(clipped.counted(sound.blocks()))
                if given is not None:
                    cut = segment_posteriors(given, features.seconds, self._options)
                else:
                    cut = segment(features, self._options, branches.sources(sound))
                works: list[Work] = []
                for group in _groups(_on_grid(cut)):
                    made = [
                        self._work(source, sound, folder, len(works) + i, *span)
                        for i, span in enumerate(group)
                    ]
                    branches.run(made, features, given)
                    for work in made:
                        work.wav, work.heard, work.tags = np.zeros(0, np.float32), None, None
                    works += made
                    self._tick(works[-1].end / features.seconds)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        warnings = []
        if clipped.share >= _CLIPPED:
            warnings.append(f"clipped: {100 * clipped.share:.1f}% of its samples at full scale")
        if all(work.silent for work in works):
            warnings.append("silent throughout")
        return self._write(source, needed, features.seconds, works, warnings)

    def _given(self, source: Source) -> tuple[Posteriors | None, str]:
        """The posteriors of another detector for a file, if there are any."""
        if not self._config.posteriors:
            return None, ""
        path = as_path(source.path)
        try:
            name = self._config.posteriors.format(
                folder=path.parent, stem=path.stem, name=path.name
            )
        except (KeyError, IndexError) as error:
            raise InputError(
                f"posteriors: no {error} in {self._config.posteriors!r}; expected {{folder}}, "
                "{stem} or {name}"
            ) from None
        if not as_path(name).is_file():
            return None, ""
        name = buckets.local_copy(name)
        return load_posteriors(name), hashlib.blake2b(Path(name).read_bytes()).hexdigest()

    def _work(
        self, source: Source, sound: Sound, folder: Path, number: int, start: float, end: float
    ) -> Work:
        wav = sound.read(start, end)
        path = folder / f"{number:04d}.flac"
        soundfile.write(path, np.clip(wav, -1, 1), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        clip = f"audio/{source.id}/{path.name}"
        record = new_record(f"{source.id}/{number:04d}", source.path, clip, start, end)
        return Work(wav, record, os.path.abspath(path))

    def _write(
        self,
        source: Source,
        needed: _Needed,
        seconds: float,
        works: Sequence[Work],
        warnings: list[str],
    ) -> Done:
        records, notes = [], []
        for work in works:
            at = {"audio": source.path, "start": work.start, "end": work.end}
            notes += [{**at, "field": field, "reason": why} for field, why in work.notes]
            problems = merge.check(work.record)
            if problems:  # a bug; the segment stays, without its evidence
                notes.append({**at, "field": "record", "reason": f"dropped: {problems[0]}"})
                work.record = _bare(work.record)
            records.append(work.record)
        done = {
            "fingerprint": needed.key,
            "audio": source.path,
            "content": needed.content,
            "seconds": round(seconds, 3),
            "segments": len(records),
            "warnings": warnings,
            "notes": notes,
        }
        folder = self._out / "records"
        write_lines(folder / f"{source.id}.jsonl", records)
        # Written last, because it shows that the result is complete.
        write_lines(folder / f"{source.id}.json", [done])
        return done


class _Clipped:
    """Counts the share of samples at full scale in blocks that it passes on."""

    def __init__(self) -> None:
        self.full = self.total = 0

    def counted(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for block in blocks:
            self.full += int(np.count_nonzero(np.abs(block) >= 0.999))
            self.total += len(block)
            yield block

    @property
    def share(self) -> float:
        return self.full / max(self.total, 1)


def _bare(record: Record) -> Record:
    keys = ("id", "audio", "clip", "start", "end")
    bare = new_record(*(record[k] for k in ("id", "audio", "clip", "start", "end")))
    bare |= {key: record[key] for key in keys} | {"profile": record["profile"]}
    return bare | {"unified": merge.unified_caption(bare)}


def _on_grid(cut: Sequence[dict[str, float]]) -> list[tuple[float, float]]:
    """Segments whose inner edges are multiples of 10 ms."""
    edges = [0.0, *(centi(each["start"]) for each in cut[1:]), cut[-1]["end"]]
    return list(itertools.pairwise(edges))


def _groups(spans: Sequence[tuple[float, float]]) -> Iterator[list[tuple[float, float]]]:
    group: list[tuple[float, float]] = []
    for span in spans:
        if group and span[1] - group[0][0] > _GROUP_SECONDS:
            yield group
            group = []
        group.append(span)
    yield group


def read_done(out: Path, source: Source) -> Done | None:
    """The records of a source that a run wrote, if they are complete."""
    records = out / "records"
    try:
        done = read_json(records / f"{source.id}.json")
        whole = isinstance(done, dict) and done.get("fingerprint")
        return done if whole and (records / f"{source.id}.jsonl").is_file() else None
    except InputError:
        return None


def read_records(out: Path, source: Source) -> Iterator[Record]:
    path = out / "records" / f"{source.id}.jsonl"
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            yield parse_json(line, f"{shown(path)}, line {number}")
