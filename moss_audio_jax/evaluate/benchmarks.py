"""The benchmarks by name. Each is read from the files of its authors into a list of `Item`.

`infer` asks the items' prompts, and `score` compares answers with their references. Both read the
same data file with `load_benchmark`, so predictions need not contain references.
"""

from __future__ import annotations

import argparse
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moss_audio_jax.buckets import as_path
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.evaluate import manifests, mecat, world_rows
from moss_audio_jax.evaluate.items import Benchmark, Item, Kind, Loaded, Loader, Options
from moss_audio_jax.evaluate.manifests import Root
from moss_audio_jax.evaluate.metrics.instructions import ARGUMENTS
from moss_audio_jax.evaluate.reading import (
    first_of,
    group_of,
    json_kind,
    name_of,
    read_rows,
    text_of,
)
from moss_audio_jax.files import parse_json, shown
from moss_audio_jax.text.tasks import EVENTS, MULTIPLE_CHOICE, TRANSCRIBE

CAPTION_FIELDS = (
    "gender",
    "age",
    "pitch",
    "speed",
    "volume",
    "clarity",
    "fluency",
    "accent",
    "texture",
    "emotion",
    "tone",
    "personality",
    "summary",
)
SPEECH_CAPTION = (
    "Describe the speech in this audio as JSON with the keys " + ", ".join(CAPTION_FIELDS) + "."
)
# The groups of the authors' breakdowns, under the names in their files.
_GROUPS = (
    "task",
    "task_name",
    "category",
    "sub-category",
    "sub-sub-category",
    "sub-cat",
    "difficulty",
    "dimension",
    "language",
    "modality",
    "length_type",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that select items, which are the same for infer and score."""
    group = parser.add_argument_group("benchmark")
    group.add_argument(
        "--benchmark",
        required=True,
        choices=tuple(FORMATS),
        metavar="NAME",
        help=", ".join(FORMATS),
    )
    group.add_argument(
        "--data", required=True, type=as_path, metavar="FILE|DIR", help="as released by its authors"
    )
    group.add_argument(
        "--audio-root",
        type=as_path,
        metavar="DIR",
        help="folder of the audio: paths are relative to it and may not leave it; "
        "default: the data's folder",
    )
    group.add_argument(
        "--allow-outside",
        action="store_true",
        help="allow audio paths outside --audio-root (absolute paths, '..')",
    )
    group.add_argument(
        "--split",
        choices=("train", "dev", "test"),
        default="test",
        help="split of AISHELL-1 and FLEURS; default test",
    )
    group.add_argument(
        "--level",
        choices=("word", "sentence"),
        default="word",
        help="level of timestamps; default word",
    )
    group.add_argument("--tier", metavar="NAME", help="tier of a TextGrid")
    group.add_argument("--tasks", default="", metavar="A,B,...", help="tasks of world; default all")
    group.add_argument(
        "--per-scene", type=int, metavar="N", help="rows per scene of world; default all"
    )
    group.add_argument("--limit", type=int, metavar="N", help="only the first N items")


def from_args(args: argparse.Namespace, prompt: str | None = None) -> Benchmark:
    """The benchmark that the parsed options of `add_options` select."""
    return load_benchmark(
        args.benchmark,
        args.data,
        args.audio_root,
        prompt=prompt,
        split=args.split,
        level=args.level,
        tier=args.tier,
        tasks=tuple(task for task in args.tasks.split(",") if task),
        per_scene=args.per_scene,
        limit=args.limit,
        allow_outside=args.allow_outside,
    )


def load_benchmark(
    name: str, data: str | Path, audio_root: str | Path | None = None, **options: Any
) -> Benchmark:
    """The items of a benchmark's data. Audio files are not opened and may be missing.

    Args:
      name: a key of `FORMATS`.
      data: the file that its authors released; for asr and timestamps see `manifests`, for MECAT
        `mecat`; for world a folder that `moss-audio-jax world` wrote.
      audio_root: the folder to which audio paths are relative, and which they may not leave.
        Default: the folder of the data, which they may leave.
      **options: fields of `Options`.

    Raises:
      InputError: the data cannot be read, a row lacks a key, an id is repeated, or there are no
        rows.
      UsageError: no such benchmark, or an option that the benchmark does not have.
    """
    if name not in FORMATS:
        raise UsageError(f"no benchmark {name!r}; expected one of {', '.join(FORMATS)}")
    chosen = Options(**options)
    for option in ("per_scene", "limit"):
        if (value := getattr(chosen, option)) is not None and value < 1:
            raise UsageError(f"{option} is {value}; expected a number above 0")
    if not FORMATS[name].scenes and (chosen.tasks or chosen.per_scene):
        raise UsageError(f"tasks and per_scene are options of world; this is {name}")
    root = None if audio_root is None else as_path(audio_root)
    items, problems = FORMATS[name].load(as_path(data), root, chosen)
    if not items:
        raise InputError(f"{data}: no items of {name}")
    seen: dict[str, int] = {}
    for number, item in enumerate(items, 1):
        if item.id in seen:
            raise InputError(
                f"{data}: items {seen[item.id]} and {number} have the same id {item.id!r}"
            )
        seen[item.id] = number
    return Benchmark(name, items[: chosen.limit], problems)


# --- multiple choice -----------------------------------------------------------------------------


def choice_prompt(question: str, choices: Sequence[str], instruction: str | None = None) -> str:
    """Instruction, question, and a line "A. choice" for each.

    The official instruction names A, B, C and D; here it names the letters of the item.
    """
    if instruction is None:
        letters = string.ascii_uppercase[: len(choices)]
        instruction = MULTIPLE_CHOICE.replace("A, B, C, and D", _listed(letters, "and"))
        instruction = instruction.replace("A, B, C, or D", _listed(letters, "or"))
    lines = (f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, choices))  # noqa: B905
    return "\n".join([f"{instruction} {question}", *lines])


def _listed(letters: str, word: str) -> str:
    if len(letters) < 3:
        return f" {word} ".join(letters)
    return ", ".join(letters[:-1]) + f", {word} {letters[-1]}"


def _choices(
    audio_keys: tuple[str, ...], answer_key: str = "answer", without: tuple[str, ...] = ()
) -> Loader:
    """Rows with id, question, choices (a list, or choice_a to choice_d), answer: the text.

    Rows of the categories `without` have no choices.
    """

    def load(data: Path, root: Path | None, options: Options) -> Loaded:
        items, problems = [], []
        folder = Root.of(root, data.parent, options.allow_outside)
        for number, (where, row) in enumerate(read_rows(_file(data)), 1):
            name = name_of(row, number, where)
            question = text_of(first_of(row, ("question",), where), where, "the question")
            audio = _audio(first_of(row, audio_keys, where), folder, where)
            group = group_of(row, _GROUPS, where)
            answer = row.get(answer_key)
            # MMAU does not publish the answers of its test set.
            answer = None if answer in (None, "") else text_of(answer, where, "the answer")
            if row.get("category") in without:
                reference = {"answer": answer}
                if row.get("category") == "instruction following":
                    reference |= _instruction(row, where)
                items.append(Item(name, "open", question, audio, reference, group))
                continue
            choices = row.get("choices")
            if choices is None:
                choices = [row.get(f"choice_{letter}") for letter in "abcd"]
            if not isinstance(choices, list):
                raise InputError(f"{where}: choices are {json_kind(choices)}; expected a list")
            choices = [text_of(c, where, "a choice") for c in choices if c not in (None, "")]
            if not 2 <= len(choices) <= len(string.ascii_uppercase):
                raise InputError(f"{where}: {len(choices)} choice(s); expected 2 to 26")
            if answer is not None and answer not in choices:
                problems.append(f"{where}: {name}: the answer {answer!r} is not among the choices")
            elif choices.count(answer) > 1:
                problems.append(
                    f"{where}: {name}: the answer {answer!r} is among the choices twice"
                )
            prompt = choice_prompt(question, choices, options.prompt)
            reference = {"choices": choices, "answer": answer}
            items.append(Item(name, "choice", prompt, audio, reference, group))
        return items, problems

    return load


def _instruction(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The required form of the answer: MMAU-Pro's `task_identifier` and `kwargs`."""
    given = row.get("kwargs") or {}
    if isinstance(given, str):
        given = parse_json(given, f"{where}: kwargs") if given.strip() else {}
    if not isinstance(given, dict):
        raise InputError(f"{where}: kwargs is {json_kind(given)}; expected an object")
    for name, value in given.items():
        expected = ARGUMENTS.get(name, object)
        if value is not None and not isinstance(value, expected):
            raise InputError(f"{where}: kwargs: {name} is {json_kind(value)}")
    text_of(row.get("task_identifier") or "", where, "task_identifier")
    return {key: row.get(key) for key in ("task_identifier", "kwargs")}


def _audio(value: Any, root: Root, where: str) -> tuple[str, ...]:
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise InputError(
            f"{where}: the audio is {json_kind(value)}; expected a path or a list of paths"
        )
    return tuple(root.place(path, where) for path in paths)


def _file(data: Path) -> Path:
    if data.is_dir():
        raise InputError(f"{shown(data)}: is a folder; give the file of questions in it")
    return data


# --- speech, events, captions --------------------------------------------------------------------


def _asr(data: Path, root: Path | None, options: Options) -> Loaded:
    clips, problems = manifests.read_transcripts(data, root, options.split, options.allow_outside)
    return _asked(clips, "asr", options.prompt or TRANSCRIBE["none"]), problems


def _timestamps(data: Path, root: Path | None, options: Options) -> Loaded:
    clips, problems = manifests.read_timed(
        data, root, options.level, options.tier, options.allow_outside
    )
    return _asked(clips, "timestamps", options.prompt or TRANSCRIBE[options.level]), problems


def _asked(clips: Iterable[manifests.Entry], kind: Kind, prompt: str) -> list[Item]:
    return [Item(c.id, kind, prompt, c.audio, c.reference, c.group, c.cut) for c in clips]


def _events(data: Path, root: Path | None, options: Options) -> Loaded:
    """JSON rows: "audio" and "events": [{"text", "start", "end"}, ...], which may be empty."""
    folder = Root.of(root, data.parent, options.allow_outside)
    clips = []
    for where, row in read_rows(_file(data)):
        events = manifests.checked_slots(first_of(row, ("events",), where), where)
        clips.append(manifests.row_clip(row, where, folder, {"events": events}))
    return _asked(clips, "events", options.prompt or EVENTS), []


def _caption(data: Path, root: Path | None, options: Options) -> Loaded:
    """JSON rows: "audio" and the thirteen fields, in the row itself or under "caption"."""
    folder = Root.of(root, data.parent, options.allow_outside)
    clips, problems = [], []
    for where, row in read_rows(_file(data)):
        given = row["caption"] if isinstance(row.get("caption"), dict) else row
        fields = {field: given[field] for field in CAPTION_FIELDS if given.get(field) is not None}
        if not fields:
            raise InputError(f"{where}: has none of the fields {', '.join(CAPTION_FIELDS)}")
        clip = manifests.row_clip(row, where, folder, fields)
        if missing := [field for field in CAPTION_FIELDS if field not in fields]:
            problems.append(f"{where}: {clip.id}: no {', '.join(missing)}")
        clips.append(clip)
    return _asked(clips, "caption", options.prompt or SPEECH_CAPTION), problems


class Format(NamedTuple):
    """How to read a benchmark's data, and its special features.

    Attributes:
      load: (data, audio root, options) -> items and problems.
      scenes: whether rows belong to scenes, and the options `tasks` and `per_scene` select rows.
      closed: whether an open question has one right answer: a time, a number or a word. The score
        then has a separate accuracy for each of these forms and for multiple choice.
    """

    load: Loader
    scenes: bool = False
    closed: bool = False


FORMATS: dict[str, Format] = {
    "mmau": Format(_choices(("audio_id", "audio_path"))),
    "mmau-mini": Format(_choices(("audio_id", "audio_path"))),
    "mmau-pro": Format(_choices(("audio_path",), without=("open", "instruction following"))),
    "mmar": Format(_choices(("audio_path",))),
    "mmsu": Format(_choices(("audio_path",), "answer_gt")),
    "asr": Format(_asr),
    "timestamps": Format(_timestamps),
    "events": Format(_events),
    "caption": Format(_caption),
    "mecat-caption": Format(mecat.load_captions),
    "mecat-qa": Format(mecat.load_questions),
    "world": Format(world_rows.load, scenes=True, closed=True),
}


def has_closed_questions(name: str) -> bool:
    """`Format.closed` of a benchmark; False for an unknown name."""
    return name in FORMATS and FORMATS[name].closed
