"""Finds evidence that comes only from the small model, for sound that this model does not know.

The small model answers fluently about anything. A segment is doubtful if the encoder finds the
sound unlike its training world (`generate.familiarity`), or if the model's two transcripts have
almost nothing in common. Evidence from the user's own experts and detectors is never doubtful.
"""

from __future__ import annotations

from collections.abc import Iterable

from moss_audio_jax.annotate.record import Record

OWN = ("decoder", "ctc")  # the small model's two transcription systems
_MIXED = "signal, tags"  # the system of a profile made from both


def why(record: Record, most: float) -> str | None:
    """Why the small model cannot be trusted with a segment; None if it can.

    Args:
      most: from this WER on, its two transcripts count as having nothing in common.
    """
    heard = record["familiarity"]
    if heard and heard["unfamiliar"]:
        return f"unlike the sound that the model knows: {heard['reason']}"
    systems = {one["system"] for one in record["asr"]}
    rate = record["wer_agreement"]
    if systems == {*OWN} and rate is not None and rate >= most:
        return f"the model's own systems hear different words: WER {rate:.2f}"
    return None


def doubtful(record: Record) -> list[str]:
    """The fields of a record that come only from the small model."""
    told = {each["field"]: each["system"] for each in record["provenance"]}  # the last one counts
    systems = {one["system"] for one in record["asr"]}
    gated = told.get("profile") == _MIXED  # the profile decides which branches run
    experts_heard = bool(record["transcript"]) and not systems <= {*OWN}
    words = told.get("words") == "ctc"
    own = {
        "profile": gated,
        "absent": gated,
        "events": told.get("events") == "tags",
        "transcript": not experts_heard,
        "words": words,
        "sentences": words,
        "speakers": gated and not experts_heard,
        "music": gated and told.get("music") == "librosa",
    }
    own["captions.speech"] = own["speakers"] or words
    own["captions.music"] = own["music"]
    own["captions.sound"] = own["events"]
    captions = [f"captions.{name}" for name, text in record["captions"].items() if text]
    own["unified"] = any(own[name] for name in captions) if captions else gated
    return sorted(name for name, is_own in own.items() if is_own)


def trusted(fields: str, of: Iterable[str]) -> bool:
    """Whether a row that uses these fields, such as "events+music", uses no doubtful one."""
    return not set(fields.split("+")) & set(of)
