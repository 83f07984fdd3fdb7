"""Makes captions from evidence, and checks every word of them against the record.

Only times have two decimals in captions, such as 3.20. A language model writes no times but
placeholders such as [1], which code replaces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from moss_audio_jax.annotate.record import Record, schema_problems, spans, times
from moss_audio_jax.annotate.sound import clause, kinds_by_label
from moss_audio_jax.text.labels import DRUMS, INSTRUMENTS
from moss_audio_jax.text.phrases import capitalised, joined, span

BRANCHES = {
    "speech": ("speech", "human voice", "singing"),
    "music": ("music",),
    "sound": ("natural sound", "sounds of things", "environment", "animal"),
}
PACES = ((0.0, "Slow"), (84.0, "Moderately paced"), (120.0, "Fast"))
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
_TIME = re.compile(r"\d+\.\d\d(?![.,:]?\d)")
_QUOTE = re.compile(r'"[^"]*"')
_SLOT = re.compile(r"\[(\d+)\]")
_SPEECH_WORDS = r"speech|speak\w*|spoken|voices?|says?|said|talk\w*|convers\w*|dialogue"
_MUSIC_WORDS = r"music\w*|songs?|melod\w*|tunes?"


# --- templates -----------------------------------------------------------------------------------


def quoted(text: str) -> str:
    plain = text.replace('"', "'")
    return f'"{plain}"'


def _during(items: Sequence[Mapping[str, Any]]) -> str:
    return f"({joined([span(item) for item in items])} s)"


def speech_caption(record: Record) -> str | None:
    """Who speaks, how, what is said and when; None without speakers."""
    lines = []
    for number, speaker in enumerate(record["speakers"]):
        said = [s for s in record["sentences"] if s["speaker"] == speaker["speaker"]]
        voice = f"a {speaker['pitch']} voice" if speaker["pitch"] else "a voice"
        if number:
            voice = voice.replace("a ", "another ", 1)
        how = [f"at a {speaker['rate']} rate" if speaker["rate"] else ""]
        how.append({"quiet": "quietly", "loud": "loudly"}.get(speaker["loudness"], ""))
        how = [part for part in how if part]
        phrase = f"{voice}, speaking {' and '.join(how)}," if how and said else voice
        if said:
            quotes = [f"{quoted(s['text'])} {_during([s])}" for s in said]
            lines.append(f"{capitalised(phrase)} says {joined(quotes)}.")
        else:
            manner = f" {' and '.join(how)}" if how else ""
            turns = speaker["turns"]
            whole = {"start": turns[0]["start"], "end": turns[-1]["end"]}
            lines.append(f"{capitalised(voice)} speaks{manner} {_during([whole])}.")
    return " ".join(lines) or None


def music_caption(record: Record) -> str | None:
    music = record["music"]
    if not music:
        return None
    tempo = music.get("tempo")
    pace = next((w for least, w in reversed(PACES) if tempo >= least), "") if tempo else ""
    parts = [f"{pace} music" if pace else "Music"]
    if music.get("key"):
        parts.append(f"in {music['key']}")
    if tempo:
        parts.append(f"at {round(tempo)} beats per minute")
    if music.get("instruments"):
        parts.append(f"with {joined(music['instruments'])}")
    text = f"{' '.join(parts)} {_during([music])}."
    if music.get("lyrics"):
        text += f" The lyrics are {quoted(music['lyrics'])}."
    return text


def sound_caption(record: Record) -> str | None:
    """Events in order of start; neighbours with the same label are joined."""
    groups: list[list[dict[str, Any]]] = []
    for event in record["events"]:
        if groups and groups[-1][0]["label"] == event["label"]:
            groups[-1].append(event)
        else:
            groups.append([event])
    phrases, until = [], 0.0
    for group in groups:
        link = "" if not phrases else "while " if group[0]["start"] < until else "then "
        phrases.append(f"{link}{clause(group[0]['label'])} {_during(group)}")
        until = max(until, *(event["end"] for event in group))
    return capitalised(", ".join(phrases)) + "." if phrases else None


def ordered(record: Record) -> list[str]:
    """The branches with evidence, in the order of the profile's scores."""
    prior = {b: max(record["profile"][name] for name in names) for b, names in BRANCHES.items()}
    told = [branch for branch in BRANCHES if record["captions"][branch]]
    return sorted(told, key=lambda branch: -prior[branch])


def unified_caption(record: Record) -> str:
    """The branches' captions in the profile's order, and the dominant sound; never empty."""
    told = ordered(record)
    if record["level"]["silent"]:
        return "Silence."
    if not told:
        best = max(record["profile"], key=record["profile"].get)
        return f"Sound without clear events; most like {best}."
    parts = [record["captions"][branch] for branch in told]
    if len(told) > 1 and record["anchor"]:
        parts.insert(0, f"Mostly {record['anchor']}.")
    return " ".join(parts)


# --- language models -----------------------------------------------------------------------------


def slots(record: Record, branches: Sequence[str]) -> list[dict[str, Any]]:
    """The facts that a caption may report, each with the placeholder of its time."""
    facts: list[dict[str, Any]] = []
    for branch in branches:
        if branch == "speech":
            facts += [{"said": s["text"], "item": s} for s in record["sentences"]]
            if not record["sentences"]:
                turns = [turn for speaker in record["speakers"] for turn in speaker["turns"]]
                facts += [{"what": "a voice speaks", "item": turn} for turn in turns]
        elif branch == "music" and record["music"]:
            caption = music_caption({**record, "music": record["music"]})
            facts.append({"what": re.sub(r" \([^)]*\)", "", caption), "item": record["music"]})
        elif branch == "sound":
            facts += [{"what": clause(e["label"]), "item": e} for e in record["events"]]
    return [{"slot": f"[{number}]", **fact} for number, fact in enumerate(facts, 1)]


def filled(text: str, facts: Sequence[Mapping[str, Any]], record: Record) -> tuple[str, list[str]]:
    """(the text with placeholders replaced by times, what is wrong with it)."""
    known = {fact["slot"]: fact["item"] for fact in facts}
    problems = []
    outside = _QUOTE.sub('""', text)
    used = {f"[{number}]" for number in _SLOT.findall(outside)}
    bare = _SLOT.sub("", outside)
    tempo = record["music"].get("tempo")
    allowed = {str(round(tempo))} if tempo else set()
    for number in _NUMBER.findall(bare):
        if number not in allowed:
            problems.append(f"the number {number}, which is not in the evidence")
    problems += [f"the slot {slot}, which does not exist" for slot in sorted(used - set(known))]
    problems += [f"the slot {slot} is missing" for slot in known if slot not in used]
    if problems:
        return text, problems
    done = _outside_quotes(text, lambda part: _SLOT.sub(lambda m: f"{span(known[m[0]])} s", part))
    return done, list(caption_problems(done, record))


def _outside_quotes(text: str, change: Callable[[str], str]) -> str:
    parts, at = [], 0
    for match in _QUOTE.finditer(text):
        parts += [change(text[at : match.start()]), match[0]]
        at = match.end()
    return "".join([*parts, change(text[at:])])


def relative(text: str, start: float) -> str:
    """A caption with its times counted from the segment's start, as rows need it."""
    return _outside_quotes(
        text, lambda part: _TIME.sub(lambda m: f"{round(float(m[0]) - start, 2) + 0.0:.2f}", part)
    )


# --- checking ------------------------------------------------------------------------------------


def check(record: Record) -> list[str]:
    """All contradictions in a record, one line each; [] if there are none."""
    problems = schema_problems(record)
    return problems if problems else list(_contradictions(record))


def _contradictions(record: Record) -> Iterator[str]:
    start, end = record["start"], record["end"]
    if not start < end:
        yield f"the segment runs from {start} to {end}"
    for where, item in spans(record):
        if not start <= item["start"] <= item["end"] <= end:
            yield f"{where} ({span(item)}) lies outside the segment ({span(record)})"
    for beat in record["music"].get("beats", ()):
        if not start <= beat <= end:
            yield f"a beat at {beat:.2f} lies outside the segment"
    for key in ("words", "sentences", "events"):
        at = [item["start"] for item in record[key]]
        if at != sorted(at):
            yield f"{key} are not in order"
    said = "".join(w["text"] for w in record["words"])
    for name, text in (
        ("sentences", "".join(s["text"] for s in record["sentences"])),
        ("transcript", record["transcript"] or ""),
    ):
        if record["words"] and _plain(text) != _plain(said):
            yield f"words and {name} differ"
    known = {speaker["speaker"] for speaker in record["speakers"]}
    if any(sentence["speaker"] not in known for sentence in record["sentences"]):
        yield "a sentence has a speaker that is not listed"
    silent = record["level"]["silent"]
    if silent and (record["words"] or record["events"] or record["music"] or record["speakers"]):
        yield "a silent segment has evidence"
    evidence = {
        "speech": bool(record["speakers"]),
        "music": bool(record["music"]),
        "sound": bool(record["events"]),
    }
    for branch, there in evidence.items():
        if bool(record["captions"][branch]) != there:
            yield f"the {branch} caption {'is missing' if there else 'has no evidence'}"
    here = {event["label"] for event in record["events"]}
    if here & set(record["absent"]):
        yield "a label is both heard and absent"
    for name, text in [*record["captions"].items(), ("unified", record["unified"])]:
        for problem in caption_problems(text or "", record):
            yield f"{name}: {problem}"


def caption_problems(text: str, record: Record) -> Iterator[str]:
    """Times, numbers, quotes, sounds, speech and music in a caption that the record lacks."""
    known = {f"{time:.2f}" for time in times(record)}
    tempo = record["music"].get("tempo")
    counts = {str(round(tempo))} if tempo else set()
    outside = _QUOTE.sub('""', text)
    for number in _NUMBER.findall(outside):
        if number not in known and number not in counts:
            yield f"{number} is in no field"
    if outside.count('"') % 2:
        yield "a quote does not end"
    quotes = {quoted(s["text"]) for s in record["sentences"]}
    quotes |= {quoted(record["music"]["lyrics"])} if record["music"].get("lyrics") else set()
    for quote in _QUOTE.findall(text):
        if quote not in quotes:
            yield f"{quote:.60} was not said"
    yield from _invented(outside.lower(), record)


def _invented(text: str, record: Record) -> Iterator[str]:
    labels = [event["label"] for event in record["events"]]
    instruments = record["music"].get("instruments", [])
    # Words of measured labels are allowed: "piano music" allows "piano" and "music".
    own = " ".join([*labels, *map(clause, labels), *instruments, *_LITERAL]).lower()
    for label, kind in kinds_by_label().items():
        for name in {label, kind.clause, label.split()[0]}:
            if re.search(rf"\b{re.escape(name)}s?\b", text) and name not in own:
                yield f"{label} was not heard"
                break
    for name in (*INSTRUMENTS, *DRUMS, "drums"):
        if re.search(rf"\b{re.escape(name)}\b", text) and name not in own:
            yield f"{name} was not heard"
    if not record["speakers"] and not re.search(_SPEECH_WORDS, own):
        found = re.search(rf"\b(?:{_SPEECH_WORDS})\b", _profiled(text))
        if found:
            yield f"{found[0]!r}, but there is no speech"
    if not record["music"] and not re.search(_MUSIC_WORDS, own):
        found = re.search(rf"\b(?:{_MUSIC_WORDS})\b", _profiled(text))
        if found:
            yield f"{found[0]!r}, but there is no music"


# First words of labels that name no sound by themselves.
_LITERAL = ("person", "crowd", "hands", "water", "heart", "typing", "glass", "car")


def _profiled(text: str) -> str:
    """The text without the template's sentence about the profile."""
    return re.sub(r"most like [a-z -]+\.", "", text)


def _plain(text: str) -> str:
    return "".join(text.split())


# --- repairing -----------------------------------------------------------------------------------


def repair(record: Record, silent: Callable[[float, float], bool]) -> list[tuple[str, str]]:
    """Removes impossible evidence from a record, in place, before captions are made.

    Args:
      silent: whether there is no sound between two times.

    Returns:
      (field, reason) of everything that was moved or dropped.
    """
    notes: list[tuple[str, str]] = []
    start, end = record["start"], record["end"]
    kept = []
    for event in record["events"]:
        if event["end"] <= start or event["start"] >= end:
            notes.append(("events", f"dropped: {event['label']} lies outside its segment"))
            continue
        first, last = max(event["start"], start), min(event["end"], end)
        if (first, last) != (event["start"], event["end"]):
            notes.append(("events", f"repaired: {event['label']} reached beyond its segment"))
        if silent(first, last):
            notes.append(("events", f"dropped: {event['label']} during silence"))
        else:
            kept.append({**event, "start": first, "end": last})
    record["events"] = sorted(kept, key=lambda e: (e["start"], e["end"], e["label"]))
    words = record["words"]
    if any(w["start"] < start or w["end"] > end for w in words):
        notes.append(("words", "dropped: words outside their segment"))
        words = []
    if words and any(silent(w["start"], w["end"]) for w in words):
        notes.append(("words", "dropped: words during silence"))
        words = []
    if record["level"]["silent"] and (record["transcript"] or record["speakers"]):
        notes.append(("speech", "dropped: speech in silence"))
        record["transcript"], record["speakers"], words = None, [], []
    if not words:
        record["words"], record["sentences"] = [], []
    if record["level"]["silent"] and record["music"]:
        notes.append(("music", "dropped: music in silence"))
        record["music"] = {}
    here = {event["label"] for event in record["events"]}
    record["absent"] = [label for label in record["absent"] if label not in here]
    return notes
