"""Collects the evidence of segments: profile, then speech, music and sound, then captions.

A group of segments is processed together, so that the model and the plug-ins get batches. Each step
asks its plug-in, checks the answer against the record, and falls back on the default's evidence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from moss_audio_jax.annotate import doubt, experts, merge, sound, speech
from moss_audio_jax.annotate.ears import Ears
from moss_audio_jax.annotate.features import ClipFeatures
from moss_audio_jax.annotate.music import describe_music
from moss_audio_jax.annotate.posteriors import Posteriors
from moss_audio_jax.annotate.profile import (
    ProfileOptions,
    profile,
    profile_posteriors,
)
from moss_audio_jax.annotate.record import Record, centi
from moss_audio_jax.annotate.source import Sound
from moss_audio_jax.annotate.spans import SegmentOptions
from moss_audio_jax.annotate.speakers import measured_speakers, told_speakers
from moss_audio_jax.annotate.tags import Sources, hear_sources
from moss_audio_jax.annotate.work import Work, part
from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.audio.windows import quiet_windows
from moss_audio_jax.errors import InputError
from moss_audio_jax.files import shown
from moss_audio_jax.text.tasks import NO_SPEECH

_DECODER_SECONDS = 20.0  # of sound in one prompt of the small model's decoder
_FULL_SCALE = 0.999
# Times in a template; a language model does not get them.
_TIMES = re.compile(r" \([\d., and-]* s\)")


class Branches:
    """The steps with their experts; made once per process.

    Args:
      ears: the small model, or None.
      warn: called for the first segment that the small model does not know.
    """

    def __init__(
        self,
        config: ConfigDict,
        ears: Ears | None,
        warn: Callable[[str], None] = lambda message: None,
    ):
        self.config = config
        self._warn, self._warned = warn, False
        self.ears = ears
        self.experts = {name: experts.make(name, spec) for name, spec in config.experts.items()}
        self.classes = dict(config.classes)

    def sources(self, sound: Sound) -> Sources | None:
        """The small model's tags of a decoded file; None without a model that has tags."""
        return hear_sources(self.ears, sound.read, sound.samples) if self.ears else None

    def run(self, works: Sequence[Work], features: ClipFeatures, given: Posteriors | None) -> None:
        """Fills the records of a group of segments of one file."""
        for work in works:
            self._level(work, features)
        sounding = [work for work in works if not work.silent]
        if self.ears and self.ears.has and sounding:
            for work, heard in zip(
                sounding, self.ears.hear([w.wav for w in sounding]), strict=True
            ):
                work.heard = heard if len(heard.starts) else None
                if (verdict := self.ears.familiarity(heard)) is not None:
                    work.record["familiarity"] = {
                        "score": round(float(verdict.score), 3),
                        "unfamiliar": bool(verdict.unfamiliar),
                        "reason": verdict.reason,
                    }
        for work in sounding:
            if given is not None:
                work.tags = part(given, work.start, work.end)
            elif work.heard is not None and work.heard.tags is not None:
                work.tags = self.ears.posteriors(work.heard, work.end - work.start)
        for work in works:
            self._profile(work, features, given is not None)
        self._events(sounding, given is not None)
        self._transcripts(sounding)
        if self.ears:
            for work in sounding:
                self._doubt(work)
        self._words(sounding)
        for work in sounding:
            self._music(work)
        self._ask_music(sounding)

        def silent(start: float, end: float) -> bool:
            return bool(features.span(start, end).bands.max() < self.config.silence_dbfs)

        for work in works:
            work.notes += merge.repair(work.record, silent)
        self._voices(works, features)
        for work in works:
            work.record["anchor"] = sound.anchor(work.record)
        self._captions(works)
        for work in works:
            if work.record["doubt"]:
                work.record["doubtful"] = doubt.doubtful(work.record)

    def _doubt(self, work: Work) -> None:
        """Marks a segment that the small model does not know. Warns once."""
        record = work.record
        record["doubt"] = doubt.why(record, self.config.speech.doubt)
        if record["doubt"] and not self._warned:
            self._warned = True
            self._warn(
                f"{shown(record['audio'])}, from {record['start']:.2f} s: {record['doubt']}. The "
                "small model only guesses about such sound, so its evidence gives no rows "
                "(--keep-doubtful keeps them)"
            )

    # --- level and profile -----------------------------------------------------------------------

    def _level(self, work: Work, features: ClipFeatures) -> None:
        size = np.abs(work.wav)
        peak = float(size.max(initial=0.0))
        quiet = features.span(work.start, work.end).bands.max() < self.config.silence_dbfs
        work.record["level"] = {
            "peak_dbfs": round(20 * np.log10(peak), 1) if peak > 1e-6 else None,
            "silent": bool(quiet),
            "clipped": round(float(np.mean(size >= _FULL_SCALE)), 4) if len(size) else 0.0,
        }

    def _profile(self, work: Work, features: ClipFeatures, given: bool) -> None:
        options = ProfileOptions(self.config.silence_dbfs)
        signal = profile(features, work.start, work.end, options)
        if work.tags is None or (given and not self.classes):
            work.record["profile"] = signal
            work.told("profile", "signal")
            return
        classes = self.classes if given else sound.tag_classes(work.tags)
        tags = profile_posteriors(work.tags, classes, 0.0, work.end - work.start)
        work.record["profile"] = tags if given else sound.mixed(signal, tags)
        work.told("profile", "posteriors" if given else "signal, tags")

    # --- sound -----------------------------------------------------------------------------------

    def _events(self, works: Sequence[Work], given: bool) -> None:
        c = self.config
        system = "posteriors" if given else "tags"
        for work in works:
            if work.tags is None or not c.sound.events:
                continue
            shown = (
                sound.without_branches(work.tags, self.classes)
                if given
                else sound.tag_events(work.tags)
            )
            if shown.labels:
                voice = work.record["profile"]["speech"] >= c.speech.present
                on = c.sound.over_speech if voice and not given else c.sound.on
                options = SegmentOptions(
                    **{
                        **c.segment,
                        "on": on,
                        "off": min(on, c.segment.off if given else c.sound.off),
                        "event_seconds": c.sound.event_seconds,
                    }
                )
                work.record["events"] = sound.events(shown, work.start, work.last(), options)
                work.record["absent"] = sound.absent(shown, work.record["events"], c.sound.absent)
                work.told("events", system)
        if c.sound.events in self.experts:
            for work, reply in self._ask(c.sound.events, "events", works):
                work.record["events"] = [work.span(event) for event in reply["events"]]
                work.told("events", c.sound.events)

    def _ask(
        self, name: str, step: str, works: Sequence[Work], **evidence: Callable[[Work], Any]
    ) -> list[tuple[Work, dict[str, Any]]]:
        """The segments with a usable reply; the others get a note."""
        requests = [w.request(**{key: of(w) for key, of in evidence.items()}) for w in works]
        found = []
        for work, (reply, problem) in zip(
            works, experts.ask(self.experts[name], step, requests), strict=True
        ):
            if problem is None:
                found.append((work, reply))
            else:
                work.notes.append((step, f"default: {name}: {problem}"))
        return found

    # --- speech ----------------------------------------------------------------------------------

    def _transcripts(self, works: Sequence[Work]) -> None:
        c = self.config.speech
        gated = [w for w in works if self._voice(w) >= c.gate]
        for system in c.systems:
            if system == "ctc":
                for work in gated:
                    if work.heard is not None and work.heard.log_probs is not None:
                        text, sure = speech.heard_text(work.heard, self.ears.tokenizer)
                        _wrote(work, system, text, round(sure, 3))
            elif system == "decoder":
                if self.ears is not None:
                    for work, text in zip(gated, self._decoded(gated), strict=True):
                        _wrote(work, system, text, None)
            else:
                for work, reply in self._ask(system, "transcribe", gated):
                    _wrote(work, system, reply["text"], None)
                    work.record["language"] = work.record["language"] or reply["language"]
        for work in gated:
            record = work.record
            text, rate, why = speech.choose(
                record["asr"], record["language"], c.threshold, c.min_systems
            )
            record["wer_agreement"] = rate
            if why:
                work.notes.append(("transcript", f"dropped: {why}"))
            if text:
                record["transcript"] = text
                record["language"] = record["language"] or speech.language(text)
            else:
                record["language"] = None

    def _voice(self, work: Work) -> float:
        return max(work.record["profile"][name] for name in merge.BRANCHES["speech"])

    def _decoded(self, works: Sequence[Work]) -> list[str]:
        pieces = [
            (i, a, b)
            for i, work in enumerate(works)
            for a, b in quiet_windows(work.wav, _DECODER_SECONDS)
        ]
        texts = self.ears.transcribe([works[i].wav[a:b] for i, a, b in pieces])
        texts = ["" if text == NO_SPEECH else text for text in texts]
        return [
            speech.joined([t for t, (j, _, _) in zip(texts, pieces, strict=True) if j == i and t])
            for i in range(len(works))
        ]

    def _words(self, works: Sequence[Work]) -> None:
        c = self.config.speech
        spoken = [work for work in works if work.record["transcript"]]
        if c.align in self.experts:
            for work, reply in self._ask(
                c.align, "align", spoken, text=lambda w: w.record["transcript"]
            ):
                work.record["words"] = [work.span(word) for word in reply["words"]]
                work.told("words", c.align)
        for work in spoken:
            if work.record["words"] or not c.align:
                continue
            if work.heard is None or work.heard.log_probs is None:
                work.notes.append(("words", "dropped: no model that aligns"))
                continue
            try:
                words = speech.aligned(
                    work.record["transcript"],
                    work.heard,
                    self.ears.tokenizer,
                    work.start,
                    c.align_score,
                )
            except InputError as error:
                work.notes.append(("words", f"dropped: {error}"))
            else:
                words = speech.at_changes(words, work.wav, work.start)
                last = work.last()
                work.record["words"] = [
                    {**w, "start": min(w["start"], last), "end": min(w["end"], last)} for w in words
                ]
                work.told("words", "ctc")

    def _voices(self, works: Sequence[Work], features: ClipFeatures) -> None:
        """Fills in sentences and their speakers; without sentences, the speakers of utterances."""
        voiced = []
        for work in works:
            if not work.silent and (spans := self._spoken(work, features)):
                voiced.append((work, spans))
        who = {id(work): measured_speakers(features, spans) for work, spans in voiced}
        told = {id(work): "measured" for work, _ in voiced}
        if (name := self.config.speech.diarise) in self.experts:
            spoken = {id(work): spans for work, spans in voiced}
            for work, reply in self._ask(name, "diarise", [work for work, _ in voiced]):
                turns = [work.span(turn) for turn in reply["turns"]]
                who[id(work)] = told_speakers(turns, spoken[id(work)])
                told[id(work)] = name
        for work, spans in voiced:
            self._speakers(work, features, spans, who[id(work)])
            work.told("speakers", told[id(work)])

    def _spoken(self, work: Work, features: ClipFeatures) -> list[tuple[float, float]]:
        """(start, end) of each sentence, which is also recorded; without any, of utterances."""
        record = work.record
        record["sentences"] = speech.sentences(record["words"], self.config.speech.pause)
        spans = [(s["start"], s["end"]) for s in record["sentences"]]
        heard = record["profile"]["speech"] >= self.config.speech.present
        if not spans and (record["transcript"] or heard):
            spans = speech.utterances(features, record["start"], work.last())
        return spans

    def _speakers(
        self,
        work: Work,
        features: ClipFeatures,
        spans: Sequence[tuple[float, float]],
        who: Sequence[int],
    ) -> None:
        record = work.record

        def words(start: float, end: float) -> int:
            inside = [w for w in record["words"] if start <= w["start"] and w["end"] <= end]
            return len(inside) if record["language"] == "en" else 0

        record["speakers"] = speech.voices(features, spans, who, words)
        for sentence, speaker in zip(record["sentences"], who, strict=False):
            sentence["speaker"] = speaker
        for speaker in record["speakers"]:
            own = [(t["start"] - work.start, t["end"] - work.start) for t in speaker["turns"]]
            known = work.tags is not None and not record["doubt"]
            speaker["sex"] = sound.tag_sex(work.tags, own) if known else None

    # --- music -----------------------------------------------------------------------------------

    def _music(self, work: Work) -> None:
        c = self.config.music
        if work.record["profile"]["music"] < c.present or work.end - work.start < 2:
            return
        told = describe_music(work.wav)
        if told["key_score"] < c.key_score:
            told["key"] = None
        told["beats"] = [centi(work.start + beat) for beat in told["beats"]]
        told["beats"] = [beat for beat in told["beats"] if beat <= work.last()]
        told["sections"] = [work.span(section) for section in told["sections"]]
        # The beginning and end of the music, without silence at the edges.
        loud = np.flatnonzero(np.abs(work.wav) > 0.02 * np.abs(work.wav).max(initial=0.0))
        edges = (loud[0] / SAMPLE_RATE, (loud[-1] + 1) / SAMPLE_RATE) if len(loud) else (0.0, 0.0)
        work.record["music"] = work.span({"start": edges[0], "end": edges[1]}) | told
        if work.tags is not None and c.instruments > 0:
            names = sound.tag_instruments(work.tags, c.instruments)
            if names:
                work.record["music"]["instruments"] = names
        work.told("music", "librosa")

    def _ask_music(self, works: Sequence[Work]) -> None:
        name = self.config.music.expert
        if name:
            playing = [work for work in works if work.record["music"]]
            for work, reply in self._ask(name, "music", playing):
                work.record["music"] |= reply
                work.told("music", name)

    # --- captions --------------------------------------------------------------------------------

    def _captions(self, works: Sequence[Work]) -> None:
        c = self.config
        for work in works:
            record = work.record
            record["captions"] = {
                "speech": merge.speech_caption(record),
                "music": merge.music_caption(record),
                "sound": merge.sound_caption(record),
            }
            for branch, caption in record["captions"].items():
                if caption:
                    work.told(f"captions.{branch}", "template")
        if c.sound.caption in self.experts:
            told = [work for work in works if work.record["events"]]
            self._written(
                "captions.sound",
                c.sound.caption,
                "caption",
                told,
                lambda record: ["sound"],
                lambda record: record["captions"]["sound"],
            )
        if c.sound.judge:
            self._judged([w for w in works if w.record["events"]])
        for work in works:
            work.record["unified"] = merge.unified_caption(work.record)
            work.told("unified", "template")
        if c.unified in self.experts:
            told = [work for work in works if any(work.record["captions"].values())]
            self._written(
                "unified",
                c.unified,
                "unify",
                told,
                merge.ordered,
                lambda record: record["unified"],
            )

    def _written(
        self,
        field: str,
        name: str,
        step: str,
        works: Sequence[Work],
        branches: Callable[[Record], list[str]],
        template: Callable[[Record], str],
    ) -> None:
        """Takes a language model's caption if it reports all of the evidence and nothing else."""
        facts = {id(work): merge.slots(work.record, branches(work.record)) for work in works}
        for work, reply in self._ask(
            name,
            step,
            works,
            facts=lambda w: [{k: v for k, v in f.items() if k != "item"} for f in facts[id(w)]],
            template=lambda w: _TIMES.sub("", template(w.record)),
        ):
            text, problems = merge.filled(reply["text"], facts[id(work)], work.record)
            if problems:
                work.notes.append((field, f"default: {name}: {problems[0]}"))
                continue
            if field == "unified":
                work.record["unified"] = text
            else:
                work.record["captions"]["sound"] = text
            work.told(field, name)

    def _judged(self, works: Sequence[Work]) -> None:
        c = self.config.sound
        for work, reply in self._ask(
            c.judge,
            "judge",
            works,
            caption=lambda w: w.record["captions"]["sound"],
            events=lambda w: w.record["events"],
        ):
            if reply["score"] < c.judge_score:
                work.notes.append(("captions.sound", f"default: judged {reply['score']} of 5"))
                work.record["captions"]["sound"] = merge.sound_caption(work.record)


def _wrote(work: Work, system: str, text: str, confidence: float | None) -> None:
    work.record["asr"].append({"system": system, "text": text, "confidence": confidence})
    work.told("asr", system)
