"""The branch of speech: transcripts on which systems agree, times of words, sentences, voices."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moss_audio_jax.annotate.align import align, greedy
from moss_audio_jax.annotate.ears import TOKEN, Heard
from moss_audio_jax.annotate.features import FINE, ClipFeatures
from moss_audio_jax.annotate.record import centi
from moss_audio_jax.annotate.segment import quiet_runs
from moss_audio_jax.annotate.speakers import describe_voice
from moss_audio_jax.audio.features import log_mel
from moss_audio_jax.errors import InputError
from moss_audio_jax.evaluate import text_norm
from moss_audio_jax.evaluate.metrics.error_rate import transcript_errors
from moss_audio_jax.text.tokenizer import Tokenizer

Word = dict[str, Any]
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_STOPS = "，。！？、；：…"
_UNIT = re.compile(rf"[{_HAN}]|[{_STOPS}]+|[^\s{_HAN}{_STOPS}]+")
_ENDS = tuple(".!?。！？…")
_REACH = 3  # frames of 10 ms by which the edge of a word may move


def heard_text(heard: Heard, tokenizer: Tokenizer) -> tuple[str, float]:
    """(text, confidence 0..1) of the best path. Pieces are whole words or single letters."""
    pieces, _, sure = greedy(heard.log_probs)
    texts = [tokenizer.decode([piece]).strip() for piece in pieces]
    return joined(_glued([text for text in texts if text])), sure


def _glued(texts: Sequence[str]) -> list[str]:
    """Joins runs of single Latin letters into words; everything else is unchanged."""
    words: list[str] = []
    letters = False
    for text in texts:
        single = len(text) == 1 and (text.isascii() or text == "’")
        if single and letters:
            words[-1] += text
        else:
            words.append(text)
        letters = single
    return words


def units(text: str) -> list[str]:
    """The units that get times: words between spaces, with punctuation; Chinese characters."""
    found: list[str] = []
    for unit in _UNIT.findall(text):
        if found and not any(c.isalnum() for c in unit):
            found[-1] += unit
        else:
            found.append(unit)
    return found


def joined(words: Sequence[str]) -> str:
    """Words in one string, without spaces between Chinese characters."""
    text = " ".join(words)
    return re.sub(rf"(?<=[{_HAN}，。！？、；：]) (?=[{_HAN}])", "", text)


def language(text: str) -> str | None:
    """ "zh" if there are Chinese characters, "en" if all letters are Latin, else None."""
    if re.search(f"[{_HAN}]", text):
        return "zh"
    letters = [c for c in text if c.isalpha()]
    latin = all(unicodedata.name(c, "").startswith("LATIN") for c in letters)
    return "en" if letters and latin else None


def agreement(texts: Sequence[str], spoken: str | None = None) -> float | None:
    """Mean WER (Chinese: CER) over pairs of transcripts, with the longer one as reference.

    None for fewer than two texts. For an empty text and another one it is 1.
    """
    rates = []
    for one, two in itertools.combinations(texts, 2):
        longer, shorter = sorted((one, two), key=len, reverse=True)
        words, _ = transcript_errors(longer, shorter, spoken or language(longer))
        rates.append(words.total / words.reference if words.reference else 0.0)
    return round(float(np.mean(rates)), 4) if rates else None


def choose(
    asr: Sequence[dict[str, Any]], spoken: str | None, threshold: float, min_systems: int
) -> tuple[str | None, float | None, str | None]:
    """(transcript, agreement, why there is none) from the systems' transcripts.

    With two systems, the first one's; with more, the transcript that is nearest to all others.
    """
    texts = [one["text"] for one in asr]
    rate = agreement(texts, spoken)
    if not any(texts):
        return None, rate, None
    if sum(map(bool, texts)) < min_systems:
        return None, rate, f"too few transcripts ({sum(map(bool, texts))}/{min_systems})"
    if rate is not None and rate > threshold:
        return None, rate, f"systems disagree: WER {rate:.2f} above {threshold:g}"
    if len(texts) > 2:
        far = [
            sum(agreement([a, b], spoken) for j, b in enumerate(texts) if j != i)
            for i, a in enumerate(texts)
        ]
        return texts[int(np.argmin(far))] or None, rate, None
    return next(text for text in texts if text), rate, None


def aligned(
    text: str, heard: Heard, tokenizer: Tokenizer, start: float, least: float
) -> list[Word]:
    """Words of a text with times in seconds of the file, by forced alignment.

    Args:
      start: where the clip begins in the file.
      least: the lowest mean log-probability per token of a text that was said.

    Raises:
      InputError: the text does not fit the sound.
    """
    words = units(text)
    ids = [tokenizer.encode("".join(text_norm.plain_units(word)) or word) for word in words]
    found = align(heard.log_probs, [piece for of_word in ids for piece in of_word])
    if found.score < least:
        raise InputError(f"alignment: the text does not fit the sound (score {found.score:.2f})")
    edges = [*heard.starts.tolist(), float(heard.starts[-1]) + TOKEN]
    timed, at = [], 0
    for word, of_word in zip(words, ids, strict=True):
        if not of_word:
            raise InputError(f"alignment: {word!r} has no piece in this tokenizer")
        first, last = found.spans[at][0], found.spans[at + len(of_word) - 1][1]
        # Chunks may be cut short, so a token ends at the latest where the next one starts.
        end = min(edges[last - 1] + TOKEN, edges[last])
        timed.append(
            {"text": word, "start": centi(start + edges[first]), "end": centi(start + end)}
        )
        at += len(of_word)
    return timed


def at_changes(words: Sequence[Word], wav: np.ndarray, start: float) -> list[Word]:
    """Moves the edges of words by up to 30 ms, to where the spectrum changes most.

    Tokens are 80 ms apart, so aligned edges are up to 40 ms wrong. Words that touch stay touching.

    Args:
      wav: float32 at 16 kHz, starting at `start` of the file.
    """
    mel = log_mel(wav).T  # [F, 128], 100 frames per second
    side = 2  # frames compared before and after an edge

    def moved(time: float) -> float:
        at = round(100 * (time - start))
        best, most = time, -np.inf
        for step in range(-_REACH, _REACH + 1):
            before, after = mel[max(at + step - side, 0) : at + step], mel[at + step :][:side]
            if at + step < side or len(after) < side:
                continue
            change = np.abs(after.mean(axis=0) - before.mean(axis=0)).mean()
            # Prefers the aligned edge: a move of 30 ms needs 0.06 more change of log_mel.
            score = change - 0.1 * (step / 4) ** 2
            if score > most:
                best, most = centi(time + step / 100), score
        return best

    edges = {time: moved(time) for word in words for time in (word["start"], word["end"])}
    found: list[Word] = []
    for word in words:
        first = max(edges[word["start"]], found[-1]["end"] if found else 0.0)
        last = max(edges[word["end"]], centi(first + 0.01))
        found.append({**word, "start": first, "end": last})
    return found


def sentences(words: Sequence[Word], pause: float) -> list[Word]:
    """Joins words into sentences, which end at a full stop or at a pause of `pause` seconds."""
    groups: list[list[Word]] = []
    for word in words:
        last = groups[-1][-1] if groups else None
        if last is None or last["text"].endswith(_ENDS) or word["start"] - last["end"] >= pause:
            groups.append([])
        groups[-1].append(word)
    return [
        {
            "text": joined([word["text"] for word in group]),
            "start": group[0]["start"],
            "end": group[-1]["end"],
        }
        for group in groups
    ]


def utterances(features: ClipFeatures, start: float, end: float) -> list[tuple[float, float]]:
    """The spans of sound between two times, separated by pauses of 0.2 s or more."""
    span = features.span(start, end)
    edges, at = [], 0
    for first, last in [*quiet_runs(span), (len(span.energy), len(span.energy))]:
        if first - at >= 0.3 * FINE:
            edges.append((start + at / FINE, min(start + first / FINE, end)))
        at = last
    return [(centi(a), centi(b)) for a, b in edges]


def voices(
    features: ClipFeatures,
    spans: Sequence[tuple[float, float]],
    who: Sequence[int],
    words: Callable[[float, float], int],
) -> list[dict[str, Any]]:
    """Speakers with their turns and the measurements of their voices.

    Args:
      spans, who: (start, end) of sentences or utterances in seconds, and the speaker of each.
      words: the number of words between two times.
    """
    speakers = []
    for speaker in sorted(set(who)):
        own = [span for span, of in zip(spans, who, strict=True) if of == speaker]
        longest = max(own, key=lambda span: span[1] - span[0])
        told = describe_voice(features, *longest, words(*longest) or None)
        speakers.append(
            {
                "speaker": speaker,
                "turns": [{"start": a, "end": b} for a, b in own],
                **told,
            }
        )
    return speakers
