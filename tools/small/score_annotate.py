"""Scores `annotate` on clips whose truth is known; writes DIR/scores.json and DIR/scores.md.

    python tools/small/score_annotate.py --output DIR [--scenes 100] [--split test] [--seed 0]
    python tools/small/score_annotate.py --output DIR --split validation --sweep

Boundaries: scenes of `world`, concatenations of five to ten of them, and clips of another generator
(tests/support/patchwork.py), clean and with white noise 10 dB below the clip. Boundaries are
matched one to one within 0.5 s, and compared with windows of 10 s. Sounds: `annotate` runs on the
scenes with its defaults; precision and recall of each label count within its clip, and within 0.2 s
at both ends. --sweep instead tries thresholds of sounds and prints their scores; choose them on
`validation`, report on `test`. Runs from a checkout (it uses tests/support); needs the extras
`annotate` and `world`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))
import boundaries
import patchwork

from moss_audio_jax import world
from moss_audio_jax.annotate import defaults, pipeline, source
from moss_audio_jax.annotate import sound as sounds
from moss_audio_jax.annotate.annotator import checkpoint_folder
from moss_audio_jax.annotate.ears import Ears
from moss_audio_jax.annotate.features import ClipFeatures, clip_features
from moss_audio_jax.annotate.profile import profile, profile_posteriors
from moss_audio_jax.annotate.segment import segment
from moss_audio_jax.annotate.spans import SegmentOptions
from moss_audio_jax.annotate.tags import Sources, hear_sources
from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.text.labels import KINDS

NOISE_DB = 10.0  # signal-to-noise ratio
COLLAR = 0.2  # tolerance in seconds at both ends of a sound
SWEEP = {
    "on": (0.5, 0.6, 0.7, 0.8, 0.9),
    "off": (0.3, 0.5, 0.6, 0.7, 0.8),
    "event_seconds": (0.1, 0.2, 0.3),
    "over_speech": (0.8, 0.9, 0.95),
}
Span = tuple[float, float]

# --- boundaries ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Clip:
    """A waveform, float32 at 16 kHz, with its true boundaries in seconds.

    free: spans in which a cut is neither required nor wrong (`boundaries.optional`).
    sentences: for each sentence the spans of its words.
    """

    wav: np.ndarray
    true: list[float]
    free: list[float] = dataclasses.field(default_factory=list)
    sentences: list[list[Span]] = dataclasses.field(default_factory=list)


def of_scenes(scenes: Sequence[world.Scene]) -> Clip:
    """A clip of scenes, one after another."""
    at, spans, free, sentences = 0.0, [], [], []
    for made in scenes:
        spans += boundaries.blocks(made.labels, at)
        free += boundaries.optional(made.labels, at, [])
        for said in made.labels["sentences"]:
            sentences.append([(at + w["start"], at + w["end"]) for w in said["words"]])
        at += len(made.wav) / SAMPLE_RATE
    free += boundaries.optional({"sentences": []}, 0.0, spans)
    wav = np.concatenate([made.wav for made in scenes])
    return Clip(wav, boundaries.boundaries(spans, at), free, sentences)


def clips(kind: str, count: int, split: str, seed: int) -> Iterator[Clip]:
    """`count` clips: "scenes" or "joined" scenes of a split and seed, or "patchwork".

    Patchwork has no splits; instead, the seeds of train, validation and test are 100,000 apart.
    """
    if kind == "patchwork":
        first = {"train": 1, "validation": 2}.get(split, 0) * 100_000 + seed * 10_000
        for number in range(first, first + count):
            yield Clip(*patchwork.clip(number))
    elif kind == "scenes":
        for index in range(count):
            yield of_scenes([world.scene(index, split, seed)])
    else:
        rng = np.random.default_rng(seed)
        pool = [world.scene(index, split, seed) for index in range(2 * count)]
        for _ in range(count):
            picked = rng.integers(0, len(pool), rng.integers(5, 11))
            yield of_scenes([pool[i] for i in picked])


SETS = ("scenes", "joined", "patchwork")


def featured(
    kind: str, count: int, split: str, seed: int, noise: bool, ears: Ears
) -> Iterator[tuple[Clip, ClipFeatures, Sources | None]]:
    """(clip without waveform, its features, its sources) for `clips`, with or without noise."""
    for number, clip in enumerate(clips(kind, count, split, seed)):
        wav = patchwork.noisy(clip.wav, NOISE_DB, number) if noise else clip.wav
        features, sources = clip_features(wav), heard_in(ears, wav)
        yield dataclasses.replace(clip, wav=wav[:0]), features, sources


def heard_in(ears: Ears, wav: np.ndarray) -> Sources | None:
    def read(start: float, end: float) -> np.ndarray:
        return wav[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]

    return hear_sources(ears, read, len(wav))


def score_boundaries(
    found: Sequence[tuple[Clip, ClipFeatures, Sources | None]], options: SegmentOptions
) -> dict:
    """F1, precision, recall of cuts; gaps between segments; sentences with a cut within a word."""
    strict, lenient, fixed, broken, cut, said = [], [], [], 0, 0, 0
    for clip, features, sources in found:
        made = segment(features, options, sources)
        edges = [0.0, *(s["end"] for s in made)]
        whole = (
            edges[:-1] == [s["start"] for s in made] and abs(edges[-1] - features.seconds) < 1e-3
        )
        broken += not whole
        cuts = edges[1:-1]
        strict.append((cuts, clip.true))
        lenient.append(boundaries.lenient(cuts, clip.true, clip.free))
        fixed.append((list(np.arange(10.0, features.seconds, 10.0)), clip.true))
        said += len(clip.sentences)
        cut += sum(any(a < t < b for a, b in words for t in cuts) for words in clip.sentences)
    names = ("f1", "precision", "recall")
    return {
        "clips": len(found),
        "boundaries": sum(len(clip.true) for clip, *_ in found),
        **{name: round(x, 3) for name, x in zip(names, boundaries.f1(strict), strict=True)},
        "f1_lenient": round(boundaries.f1(lenient)[0], 3),
        "f1_fixed_10s": round(boundaries.f1(fixed)[0], 3),
        "not_covered": broken,
        "sentences": said,
        "sentences_cut": cut,
    }


def boundary_table(count: int, split: str, seed: int) -> list[dict]:
    rows, ears = [], Ears.load(checkpoint_folder(defaults.get_config()))
    for kind, noise in itertools.product(SETS, (False, True)):
        data = list(featured(kind, count, split, seed, noise, ears))
        name = f"{kind}, {NOISE_DB:g} dB noise" if noise else kind
        rows.append({"clips_of": name} | score_boundaries(data, SegmentOptions()))
        print(json.dumps(rows[-1]), flush=True)
    return rows


# --- sounds --------------------------------------------------------------------------------------


def true_events(labels: Mapping[str, Any]) -> dict[str, list[Span]]:
    """label -> spans; spans at most 0.5 s apart are joined, as `annotate` joins them."""
    found: dict[str, list[Span]] = defaultdict(list)
    for event in labels["events"]:
        found[KINDS[event["kind"]].label].append((event["start"], event["end"]))
    return {label: one_each(spans, 0.5) for label, spans in found.items()}


def one_each(spans: Sequence[Span], gap: float) -> list[Span]:
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start - merged[-1][1] < gap:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def score_events(clips: Sequence[tuple[dict[str, list[Span]], dict[str, list[Span]]]]) -> dict:
    """Scores (true, found) events of clips: {label or "all": counts, rates, edge errors}."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    edges: dict[str, list[float]] = defaultdict(list)
    for true, found in clips:
        for label in true.keys() | found.keys():
            mine, theirs = found.get(label, []), true.get(label, [])
            each = counts[label]
            each["clips"] += bool(theirs)
            each["clips_found"] += bool(mine)
            each["clips_both"] += bool(mine and theirs)
            each["events"] += len(theirs)
            each["events_found"] += len(mine)
            free = list(theirs)
            for span in mine:
                near = [t for t in free if min(t[1], span[1]) > max(t[0], span[0])]
                if not near:
                    continue
                best = min(near, key=lambda t: abs(t[0] - span[0]) + abs(t[1] - span[1]))
                free.remove(best)
                gaps = [abs(best[i] - span[i]) for i in (0, 1)]
                edges[label] += gaps
                each["events_onset"] += gaps[0] <= COLLAR
                each["events_both"] += max(gaps) <= COLLAR
    labels = list(counts)
    counts["all"] = sum(counts.values(), Counter())
    edges["all"] = [gap for label in labels for gap in edges[label]]
    return {label: _rates(counts[label], edges[label]) for label in sorted(counts)}


def _rates(n: Mapping[str, int], edges: Sequence[float]) -> dict[str, Any]:
    def share(part: str, whole: str) -> float | None:
        return round(n[part] / n[whole], 3) if n[whole] else None

    return {
        "clips": n["clips"],
        "precision": share("clips_both", "clips_found"),
        "recall": share("clips_both", "clips"),
        "events": n["events"],
        "timed_precision": share("events_both", "events_found"),
        "timed_recall": share("events_both", "events"),
        "timed_f1": round(2 * n["events_both"] / max(n["events"] + n["events_found"], 1), 3),
        "onset_f1": round(2 * n["events_onset"] / max(n["events"] + n["events_found"], 1), 3),
        "edge_error": round(float(np.median(edges)), 3) if len(edges) else None,
    }


def annotated(folder: Path, count: int, split: str, seed: int, content: str | None = None) -> list:
    """(labels, records) of scenes written into a folder and annotated with the defaults."""
    labels = list(world.write(folder, range(count), split, seed, content))
    out = folder / "annotated"
    summary = pipeline.annotate(source.find(folder / "wav"), out, defaults.get_config())
    for path, why in summary.failed:
        print(f"failed: {path}: {why}", file=sys.stderr)
    of_file: dict[str, list[dict]] = defaultdict(list)
    for line in (out / "segments.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        of_file[Path(record["audio"]).name].append(record)
    return [(each, of_file[Path(each["audio"]).name]) for each in labels]


def found_events(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Span]]:
    """label -> spans of a clip's records; an event that a boundary divides is joined again."""
    found: dict[str, list[Span]] = defaultdict(list)
    for record in records:
        for event in record["events"]:
            found[event["label"]].append((event["start"], event["end"]))
    return {label: one_each(spans, 0.05) for label, spans in found.items()}


def branch_scores(clips: Sequence[tuple[dict, list[dict]]]) -> dict[str, Any]:
    """Scores of speech and music, and false reports of them in clips without any."""
    there = {
        "speech": lambda labels: bool(labels["sentences"]),
        "music": lambda labels: bool(labels["music"]),
    }
    said = {
        "speech": lambda records: any(r["speakers"] for r in records),
        "music": lambda records: any(r["music"] for r in records),
    }
    scores: dict[str, Any] = {}
    for name in there:
        pairs = [(there[name](labels), said[name](records)) for labels, records in clips]
        both = sum(a and b for a, b in pairs)
        scores[name] = {
            "clips": sum(a for a, _ in pairs),
            "precision": round(both / max(sum(b for _, b in pairs), 1), 3),
            "recall": round(both / max(sum(a for a, _ in pairs), 1), 3),
        }
    spoken = [bool(labels["sentences"]) for labels, _ in clips]
    wrote = [any(r["transcript"] for r in records) for _, records in clips]
    scores["transcripts"] = {
        "of_spoken": f"{sum(a and b for a, b in zip(spoken, wrote, strict=True))}/{sum(spoken)}",
        "of_unspoken": f"{sum(b and not a for a, b in zip(spoken, wrote, strict=True))}/"
        f"{len(clips) - sum(spoken)}",
    }
    return scores


# --- thresholds ----------------------------------------------------------------------------------


def tagged(folder: Path, labels: Sequence[Mapping[str, Any]], ears: Ears) -> list[list[tuple]]:
    """For each clip its segments: (start, end, posteriors of sounds, whether there is a voice)."""
    config = defaults.get_config()
    found = []
    for each in labels:
        wav, _ = soundfile.read(folder / each["audio"], dtype="float32")
        features = clip_features(wav)
        parts = []
        options = SegmentOptions(**config.segment)
        for span in segment(features, options, heard_in(ears, wav)):
            start, end = round(span["start"], 2), round(span["end"], 2)
            if features.span(start, end).bands.max() < config.silence_dbfs:
                continue  # the pipeline skips silence
            heard = ears.hear([wav[int(start * SAMPLE_RATE) : int(end * SAMPLE_RATE)]])[0]
            tags = ears.posteriors(heard, end - start)
            of_tags = profile_posteriors(tags, sounds.tag_classes(tags), 0.0, end - start)
            score = sounds.mixed(profile(features, start, end), of_tags)["speech"]
            shown = sounds.tag_events(tags)
            parts.append((start, end, shown, score >= config.speech.present))
        found.append(parts)
    return found


def sweep(folder: Path, count: int, split: str, seed: int) -> list[dict]:
    """Scores of all combinations in SWEEP; sorted by the mean of label F1 and timed F1."""
    labels = list(world.write(folder, range(count), split, seed))
    heard = tagged(folder, labels, Ears.load(checkpoint_folder(defaults.get_config())))
    rows = []
    for values in itertools.product(*SWEEP.values()):
        chosen = dict(zip(SWEEP, values, strict=True))
        if chosen["off"] > chosen["on"] or chosen["over_speech"] < chosen["on"]:
            continue
        over = chosen["over_speech"]
        kept = {key: value for key, value in chosen.items() if key != "over_speech"}
        options = {
            voice: SegmentOptions(**kept | ({"on": over} if voice else {}))
            for voice in (False, True)
        }
        pairs = []
        for each, parts in zip(labels, heard, strict=True):
            records = [
                {"events": sounds.events(shown, start, end, options[voice])}
                for start, end, shown, voice in parts
            ]
            pairs.append((true_events(each), found_events(records)))
        total = score_events(pairs)["all"]
        p, r = total["precision"] or 0.0, total["recall"] or 0.0
        f1 = 2 * p * r / max(p + r, 1e-9)
        rows.append(chosen | {"mean_f1": round((f1 + total["timed_f1"]) / 2, 4)} | total)
    return sorted(rows, key=lambda row: -row["mean_f1"])


# --- tables --------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table."""
    keys = list(rows[0])
    lines = [" | ".join(key.replace("_", " ") for key in keys), " | ".join("---" for _ in keys)]
    lines += [" | ".join("" if row[k] is None else str(row[k]) for k in keys) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="an empty folder"
    )
    options.add_argument("--scenes", type=int, default=100)
    options.add_argument("--split", default="test", choices=tuple(world.SPLITS))
    options.add_argument("--seed", type=int, default=0)
    options.add_argument(
        "--parts", nargs="+", default=("boundaries", "sounds"), choices=("boundaries", "sounds")
    )
    options.add_argument("--sweep", action="store_true", help="try thresholds of sounds")
    args = options.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    of = (args.scenes, args.split, args.seed)
    scores: dict[str, Any] = {"scenes": args.scenes, "split": args.split, "seed": args.seed}
    text = []
    if args.sweep:
        scores["sweep"] = sweep(args.output / "scenes", *of)
        text.append(table(scores["sweep"][:20]))
    elif "boundaries" in args.parts:
        scores["boundaries"] = boundary_table(*of)
        text.append(table(scores["boundaries"]))
    if "sounds" in args.parts and not args.sweep:
        made = annotated(args.output / "scenes", *of)
        pairs = [(true_events(labels), found_events(records)) for labels, records in made]
        scores["sounds"] = score_events(pairs)
        scores["branches"] = branch_scores(made)
        empty = annotated(args.output / "silence", max(args.scenes // 5, 1), *of[1:], "silence")
        records = [record for _, each in empty for record in each]
        scores["silence"] = {"clips": len(empty)} | {
            key: sum(bool(r[key]) for r in records)
            for key in ("transcript", "speakers", "music", "events")
        }
        text.append(table([{"label": k} | v for k, v in scores["sounds"].items()]))
        text += [json.dumps(scores[key]) for key in ("branches", "silence")]
    (args.output / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    (args.output / "scores.md").write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text))


if __name__ == "__main__":
    main()
