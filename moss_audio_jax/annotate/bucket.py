"""A folder of annotations in a bucket, worked on in a local one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moss_audio_jax import buckets
from moss_audio_jax.annotate.source import Source
from moss_audio_jax.errors import InputError
from moss_audio_jax.files import read_json


class Mirror:
    """The local folder in which a run works, and its copy in a bucket. A context manager.

    A file's results are copied when it is done, `records/ID.json` last, which shows that they are
    complete. So the same command continues a run that was killed.

    Args:
      out: the folder in the bucket.
      shown: sources whose clips are needed to the end, for the page.
    """

    def __init__(self, out: Any, sources: Sequence[Source], shown: int):
        self._out = out
        self._shown = {source.id for source in sources[:shown]}
        self._sources = sources
        self._kept: dict[str, str] = {}  # the fingerprints in the bucket

    def __enter__(self) -> Mirror:
        self._held = tempfile.TemporaryDirectory(prefix="annotate-")
        self.folder = Path(self._held.name)
        there = buckets.sums(self._out)
        wanted = []
        for source in self._sources:
            pair = [f"records/{source.id}.jsonl", f"records/{source.id}.json"]
            if all(name in there for name in pair):
                wanted += pair
            if source.id in self._shown:
                wanted += [name for name in there if name.startswith(f"audio/{source.id}/")]
        buckets.download(self._out, self.folder, wanted)
        for source in self._sources:
            if found := self._fingerprint(source):
                self._kept[source.id] = found
        return self

    def __exit__(self, *_: object) -> None:
        self._held.cleanup()

    def keep(self, source: Source) -> None:
        """Copies a source's results, unless the bucket has them."""
        if self._kept.get(source.id) == self._fingerprint(source):
            return
        buckets.delete_one(self._out / "records" / f"{source.id}.json")
        audio = self._out / "audio" / source.id
        buckets.delete(audio)
        buckets.upload(self.folder / "audio" / source.id, audio)
        for name in (f"{source.id}.jsonl", f"{source.id}.json"):
            buckets.put(self.folder / "records" / name, self._out / "records" / name)
        if source.id not in self._shown:
            shutil.rmtree(self.folder / "audio" / source.id)

    def finish(self) -> None:
        """Copies the files about all sources, manifest.json last."""
        files = [file for file in self.folder.iterdir() if file.is_file()]
        for file in sorted(files, key=lambda file: file.name.startswith("manifest")):
            buckets.put(file, self._out / file.name)

    def _fingerprint(self, source: Source) -> str | None:
        try:
            return read_json(self.folder / "records" / f"{source.id}.json").get("fingerprint")
        except (InputError, AttributeError):
            return None
