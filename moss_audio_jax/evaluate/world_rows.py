"""The benchmark `world`: rows and labels of scenes, as `moss-audio-jax world` writes them."""

from __future__ import annotations

import hashlib
import string
from pathlib import Path
from typing import Any

from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.evaluate.items import Item, Kind, Loaded, Options
from moss_audio_jax.evaluate.manifests import Root, checked_slots
from moss_audio_jax.evaluate.metrics.choice import listed
from moss_audio_jax.evaluate.reading import name_of, read_rows
from moss_audio_jax.files import brief, parse_json
from moss_audio_jax.text.labels import ALL_KINDS
from moss_audio_jax.text.prompt import split_thinking
from moss_audio_jax.text.tasks import NO_SPEECH
from moss_audio_jax.world import describe

_ASKED = ("user", "text")


def load(data: Path, root: Path | None, options: Options) -> Loaded:
    """Reads rows.jsonl and labels.jsonl of `moss-audio-jax world`; rows contain their prompts."""
    if options.prompt is not None:
        raise UsageError("rows of world contain their prompts; leave --prompt out")
    if not data.is_dir():
        raise InputError(f"{data}: expected the folder that moss-audio-jax world wrote")
    by_scene = {name_of(row, "", where): row for where, row in read_rows(data / "labels.jsonl")}
    rows = list(read_rows(data / "rows.jsonl"))
    for where, row in rows:
        if not isinstance(row.get("id"), str) or not isinstance(row.get("task"), str):
            raise InputError(f"{where}: no id or no task; expected a row of moss-audio-jax world")
    known = {row["task"] for _, row in rows}
    if unknown := [task for task in options.tasks if task not in known]:
        raise UsageError(f"no task {unknown[0]!r} in {data}; expected {', '.join(sorted(known))}")
    rows = [
        (where, row) for where, row in rows if not options.tasks or row["task"] in options.tasks
    ]
    if options.per_scene is not None:
        rows = _drawn(rows, options.per_scene)
    items = []
    folder = Root.of(root, data, options.allow_outside)
    for where, row in rows:
        scene = row["id"].rsplit("/", 1)[0]
        if scene not in by_scene:
            raise InputError(f"{where}: scene {scene} is not in {data / 'labels.jsonl'}")
        try:
            items.append(_item(row, by_scene[scene], folder, where))
        except InputError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, StopIteration) as e:
            raise InputError(
                f"{where}: expected a row of moss-audio-jax world ({type(e).__name__}: {brief(e)})"
            ) from None
    return items, []


def _drawn(rows: list[tuple[str, dict]], count: int) -> list[tuple[str, dict]]:
    """`count` rows of each scene, chosen by a hash of their ids, in their old order."""
    ranked = sorted(rows, key=lambda one: hashlib.sha256(one[1]["id"].encode()).digest())
    taken: dict[str, set[str]] = {}
    for _, row in ranked:
        scene = taken.setdefault(row["id"].rsplit("/", 1)[0], set())
        if len(scene) < count:
            scene.add(row["id"])
    kept = set().union(*taken.values())
    return [one for one in rows if one[1]["id"] in kept]


def _item(row: dict[str, Any], labels: dict[str, Any], root: Root, where: str) -> Item:
    messages = row["conversation"]
    audio = tuple(root.place(m["content"], where) for m in messages if m["message_type"] == "audio")
    prompt = next(m["content"] for m in messages if (m["role"], m["message_type"]) == _ASKED)
    task, answer = row["task"], split_thinking(messages[-1]["content"])[1].strip()
    orders = {sentence["order"] for sentence in labels["sentences"]}
    group = {"task": task, "content": labels["content"], "split": labels["split"]}
    if labels["language"]:
        group |= {"language": labels["language"]}
        group |= {"order": orders.pop() if len(orders) == 1 else "mixed"}

    kind: Kind = "open"
    reference: dict[str, Any] = {"answer": answer}
    if task == "asr" and answer != NO_SPEECH:
        kind, reference = "asr", {"text": answer}
    elif task in ("asr_words", "asr_sentences"):
        kind, level = "timestamps", task.removeprefix("asr_").removesuffix("s")
        spans = labels["sentences"] if level == "sentence" else describe.words(labels)
        reference = {"slots": checked_slots(spans, where), "level": level}
    elif task == "events":
        spans = [{**span, "text": name} for name, span in describe.sources(labels)]
        kind, reference = "events", {"events": checked_slots(spans, where)}
    elif task in ("choice_letter", "choice_text"):
        choices = listed(prompt)
        text = choices[string.ascii_uppercase.index(answer)] if task == "choice_letter" else answer
        kind, reference = "choice", {"choices": choices, "answer": text}
    elif task == "caption_speech_json":
        fields = {k: v for k, v in parse_json(answer, where).items() if v is not None}
        kind, reference = "caption", fields
    elif task.startswith("caption"):
        kind, reference = "caption", {"sources": _sources(labels, task)}
    return Item(row["id"], kind, prompt, audio, reference, group)


def _sources(labels: dict[str, Any], task: str) -> list[list[str]]:
    """For each source that a caption should name, the names that it may use."""
    found = []
    if task in ("caption", "caption_speech"):
        names = {"man": ["man", "male"], "woman": ["woman", "female"]}
        found += [names[describe.person(speaker)] for speaker in labels["speakers"]]
    if task in ("caption", "caption_sound"):
        found += [
            [ALL_KINDS[kind].label, ALL_KINDS[kind].clause] for kind in describe.kinds(labels)
        ]
    if task in ("caption", "caption_music") and labels["music"]:
        found += [[part] for part in labels["music"]["parts"]]
    return found
