"""Labels written as words: clauses, time spans, what sounds when; for captions and questions."""

from __future__ import annotations

from typing import Any

from moss_audio_jax.text.labels import ALL_KINDS, INSTRUMENTS, KINDS, SAMPLED_INSTRUMENTS, Kind
from moss_audio_jax.text.phrases import capitalised, joined, span, stamped, times

Labels = dict[str, Any]

LANGUAGES = {
    "en": "English",
    "zh": "Mandarin",
    "es": "Spanish",
    "fr": "French",
    "it": "Italian",
    "ru": "Russian",
}


def transcript(labels: Labels) -> str:
    return ("" if labels["language"] == "zh" else " ").join(s["text"] for s in labels["sentences"])


def words(labels: Labels) -> list[dict[str, Any]]:
    """The words whose times are known."""
    return [word for sentence in labels["sentences"] for word in sentence["words"] or ()]


def timed(labels: Labels) -> bool:
    """Whether the times of all words are known; those of some recordings are not."""
    return all(sentence["words"] is not None for sentence in labels["sentences"])


def kinds(labels: Labels) -> list[str]:
    """The kinds of sound, each once, in the order in which they first start."""
    return list(dict.fromkeys(event["kind"] for event in labels["events"]))


def of_kind(labels: Labels, kind: str) -> list[dict[str, Any]]:
    return [event for event in labels["events"] if event["kind"] == kind]


def countable(labels: Labels, kind: str) -> bool:
    """Whether all units of a kind are known; of most recordings they are not."""
    known = all(event["onsets"] for event in of_kind(labels, kind))
    return ALL_KINDS[kind].unit is not None and known


def possible_kinds(labels: Labels) -> dict[str, Kind]:
    """The kinds of sound that the scene's world has."""
    return ALL_KINDS if recorded(labels) else KINDS


def possible_instruments(labels: Labels) -> tuple[str, ...]:
    """The melodic instruments that the scene's world has."""
    return SAMPLED_INSTRUMENTS if recorded(labels) else INSTRUMENTS


def recorded(labels: Labels) -> bool:
    """Whether the scene belongs to the world of recordings."""
    return "sources" in labels


def person(speaker: dict[str, Any]) -> str:
    return "man" if speaker["sex"] == "male" else "woman"


def music_name(labels: Labels) -> str:
    """ "piano music" """
    return f"{labels['music']['parts'][0]} music"


def sources(labels: Labels) -> list[tuple[str, dict[str, Any]]]:
    """(name in a timeline, span) of everything that sounds, in order of start."""
    found = [(ALL_KINDS[e["kind"]].label, e) for e in labels["events"]]
    for sentence in labels["sentences"]:
        who = person(speaker_of(labels, sentence))
        found.append((f"{who} speaking", sentence))
    if labels["music"]:
        found.append((f"{music_name(labels)} playing", labels["music"]))
    return sorted(found, key=lambda item: (item[1]["start"], item[0]))


def speaker_of(labels: Labels, sentence: dict[str, Any]) -> dict[str, Any]:
    return labels["speakers"][sentence["speaker"]]


def clear_time(labels: Labels, time: float, margin: float = 0.15) -> bool:
    """Whether nothing begins or ends within `margin` seconds of a time."""
    return margin <= time <= labels["duration"] - margin and all(
        abs(time - item[edge]) >= margin for _, item in sources(labels) for edge in ("start", "end")
    )


def sounding_at(labels: Labels, time: float) -> list[str]:
    """The names, as in a timeline, of everything that sounds at a time, in order of start."""
    return list(
        dict.fromkeys(n for n, item in sources(labels) if item["start"] <= time <= item["end"])
    )


def notes(labels: Labels) -> str:
    """All that sounds, in writing: a timeline, who says what and when, the music's beats."""
    lines = [f"A clip of {labels['duration']:.2f} s."]
    for event in labels["events"]:
        kind = ALL_KINDS[event["kind"]]
        line = f"{span(event)}: {kind.label}"
        if kind.unit and event["onsets"]:
            line += f" ({kind.unit[1]} at {times(event['onsets'])})"
        lines.append(line)
    for sentence in labels["sentences"]:
        speaker = speaker_of(labels, sentence)
        lines.append(f'{span(sentence)}: {person(speaker)} speaking, "{sentence["text"]}"')
        if sentence["words"]:
            lines.append(stamped(sentence["words"]))
    for speaker in labels["speakers"]:
        lines.append(capitalised(speaker_phrase(labels, speaker)) + ".")
    if music := labels["music"]:
        beats = times(music["beats"])
        lines.append(f"{span(music)}: {music_name(labels)} playing, beats at {beats}")
        lines.append(music_caption(labels))
    return "\n".join(lines)


_LEVELS = {"quiet": "quiet", "normal": "of normal level", "loud": "loud"}


# --- captions ------------------------------------------------------------------------------------


def speaker_phrase(labels: Labels, speaker: dict[str, Any], with_accent: bool = True) -> str:
    """ "a man with a low voice, speaking fast, in a lively tone, with a Scottish accent" """
    if speaker["whispered"]:
        return f"a {person(speaker)} whispering at a {speaker['speed']} speed"
    tone = {"flat": "in a flat tone", "normal": None, "lively": "in a lively tone"}
    pitch, speed, accent = speaker["pitch"], speaker["speed"], speaker["accent"]
    parts = [  # what is not known of a recorded speaker is None
        f"a {person(speaker)} with a {pitch} voice" if pitch else f"a {person(speaker)}",
        f"speaking at a {speed} speed" if speed else "speaking",
        tone[speaker["intonation"] or "normal"],
    ]
    if labels["language"] != "en":
        parts.append(f"in {LANGUAGES[labels['language']]}")
    elif with_accent and accent:
        parts.append(f"with {'an' if accent[0] in 'AEIOU' else 'a'} {accent} accent")
    return ", ".join(part for part in parts if part)


def speech_caption(labels: Labels) -> str:
    lines = []
    for number, speaker in enumerate(labels["speakers"]):
        said = [s["text"] for s in labels["sentences"] if speaker_of(labels, s) is speaker]
        quoted = joined([f'"{text}"' for text in said])
        opening = (
            "First" if number == 0 and len(labels["speakers"]) > 1 else "Then" if number else ""
        )
        phrase = speaker_phrase(labels, speaker)
        phrase = f"{opening} {phrase}" if opening else capitalised(phrase)
        lines.append(f"{phrase}, says {quoted}.")
    return " ".join(lines)


def sound_caption(labels: Labels) -> str:
    phrases: list[str] = []
    before = None
    for event in labels["events"]:
        kind = ALL_KINDS[event["kind"]]
        phrase = kind.clause
        if kind.unit and event["onsets"]:
            count = len(event["onsets"])
            phrase += f" ({count} {kind.unit[count > 1]})"
        if before is not None:
            phrase = f"{'while' if event['start'] < before['end'] else 'then'} {phrase}"
        phrases.append(phrase)
        if before is None or event["end"] > before["end"]:
            before = event
    return capitalised(", ".join(phrases)) + "."


def music_caption(labels: Labels) -> str:
    music = labels["music"]
    lead, *others = music["parts"]
    pace = {"slow": "Slow", "moderate": "Moderately paced", "fast": "Fast"}[music["pace"]]
    backing = f" with {joined(others)}" if others else " alone"
    return (
        f"{pace} music in {music['tonic']} {music['mode']} at {music['tempo']:.0f} beats per "
        f"minute, played by {lead}{backing}."
    )


def recording_caption(labels: Labels) -> str:
    """Level, noise, room and line, in one sentence."""
    parts = [f"The recording is {_LEVELS[labels['loudness']['level']]}"]
    if labels["loudness"]["peak_dbfs"] is None:
        return "The recording is silent."
    if labels["background"]:
        parts.append(f"with {labels['background']['kind']} in the background")
    if labels["room"] and labels["room"]["rt60"] > 0.4:
        parts.append("in an echoing room")
    if labels["band"]:
        parts.append("over a telephone" if labels["band"] == "telephone" else "muffled")
    return ", ".join(parts) + "."


def caption(labels: Labels) -> str:
    """The whole caption: speech, sounds, music and recording."""
    parts = []
    if labels["sentences"]:
        parts.append(speech_caption(labels))
    if labels["events"]:
        parts.append(sound_caption(labels))
    if labels["music"]:
        parts.append(music_caption(labels))
    if not parts and labels["background"]:
        parts.append(f"Nothing but {labels['background']['kind']}.")
    return " ".join([*parts, recording_caption(labels)])
