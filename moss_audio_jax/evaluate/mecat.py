"""MECAT-Caption and MECAT-QA: reading, and DATE and FENSE as their authors' package computes them.

The package `mecat` holds the references and both scores. FENSE is the similarity of an answer to
its references in a text encoder, divided by ten where an error checker finds broken language. DATE
is the harmonic mean of that similarity, with weighted words, and of the share of clips whose
references are less similar to the answer than those of its own.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moss_audio_jax.errors import InputError, UsageError, extra
from moss_audio_jax.evaluate.items import Item, Loaded, Options
from moss_audio_jax.evaluate.manifests import Root
from moss_audio_jax.evaluate.reading import first_of, group_of, json_kind, read_rows, text_of
from moss_audio_jax.files import checksums, shown
from moss_audio_jax.journal import write_lines

TASKS = {"mecat-caption": "caption", "mecat-qa": "qa"}  # benchmark -> task of the package
# By what a clip holds: S speech, M music, A other sounds.
SUBSETS = ("000", "00A", "0M0", "0MA", "S00", "S0A", "SM0", "SMA")
_MIXED = ("0MA", "S0A", "SM0", "SMA")
# The authors' prompts by subtask, in the order in which the package takes the files.
PROMPTS = {
    "long": "Listen to this audio and describe it in 1-2 sentences",
    "short": "Listen to the audio and provide a caption for this audio within 15 words",
    "speech": "Listen to the audio and provide a caption describing the speech content in this "
    "audio",
    "music": "Listen to the audio and provide a caption for the music content in this audio",
    "sound": "Listen to the audio and provide a general sound excluding speech and music",
    "environment": "Listen to the audio and provide a caption for quality or acoustic environment "
    "for this audio",
}
_WHOLE = {"long": "content_long", "short": "content_short", "environment": "environment"}
_PURE = {"speech": "S00", "music": "0M0", "sound": "00A"}
_ANSWERS = "answers"  # the name of the one file of MECAT-QA

ENCODER_KEY = "MOSS_AUDIO_JAX_TEXT_ENCODER"
# What the package loads by name; it finds these in its working folder and in $FENSE_DATA.
_ENCODER = {
    "paraphrase-TinyBERT-L6-v2/modules.json": "a model of sentence-transformers",
    "echecker_clotho_audiocaps_base.ckpt": "FENSE's error checker",
    "bert-base-uncased/config.json": "the tokenizer and shape of the error checker",
}
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


# --- reading -------------------------------------------------------------------------------------


def load_captions(data: Path, root: Path | None, options: Options) -> Loaded:
    """An item for each caption that the package scores; its id is KEY/SUBTASK.

    The audio of a clip is KEY.flac. The group `subtask` has the package's names: content_long,
    content_short, environment; and for speech, music and sound pure_ or mixed_, by the subset.
    """
    folder = _root(data, root, options)
    items = []
    for where, subset, key, row in _rows(data):
        audio = (folder.place(f"{key}.flac", where),)
        for subtask, prompt in PROMPTS.items():
            if group := _group(subtask, subset):
                reference = {"answer": _texts(first_of(row, (subtask,), where), where, subtask)}
                groups = {"subtask": group, "domain": subset}
                prompt = prompt if options.prompt is None else options.prompt
                items.append(Item(f"{key}/{subtask}", "open", prompt, audio, reference, groups))
    return items, []


def load_questions(data: Path, root: Path | None, options: Options) -> Loaded:
    """An item for each question; the audio is KEY.flac, for which the release has a file each."""
    if options.prompt is not None:
        raise UsageError("items of mecat-qa are questions; leave --prompt out")
    folder = _root(data, root, options)
    items = []
    for where, subset, key, row in _rows(data):
        question = text_of(first_of(row, ("question",), where), where, "the question")
        reference = {"answer": _texts(first_of(row, ("answer",), where), where, "answer")}
        category = text_of(first_of(row, ("category",), where), where, "the category")
        groups = {"subtask": category, "domain": subset, **group_of(row, ("difficulty",), where)}
        audio = (folder.place(f"{key}.flac", where),)
        items.append(Item(key, "open", question, audio, reference, groups))
    return items, []


def _root(data: Path, root: Path | None, options: Options) -> Root:
    return Root.of(root, data if data.is_dir() else data.parent, options.allow_outside)


def _group(subtask: str, subset: str) -> str | None:
    """The group in which the package scores a caption; None if it does not score it."""
    if subtask in _WHOLE:
        return _WHOLE[subtask]
    if subset == _PURE[subtask]:
        return f"pure_{subtask}"
    return f"mixed_{subtask}" if subset in _MIXED else None


def _rows(data: Path) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(where, subset, key, row) of SUBSET.jsonl.gz or SUBSET.jsonl, or of all in a folder."""
    if data.is_dir():
        both = ([data / f"{name}.jsonl.gz", data / f"{name}.jsonl"] for name in SUBSETS)
        files = [found[0] for pair in both if (found := [file for file in pair if file.exists()])]
    else:
        files = [data]
    if not files or files[0].name.partition(".")[0] not in SUBSETS:
        raise InputError(
            f"{shown(data)}: expected references of MECAT, {SUBSETS[0]}.jsonl.gz to "
            f"{SUBSETS[-1]}.jsonl.gz (the package mecat has them in reference/TASK/test)"
        )
    for file in files:
        for where, line in read_rows(file):
            for key, row in line.items():
                if not isinstance(row, dict):
                    raise InputError(f"{where}: {key} is {json_kind(row)}; expected an object")
                yield where, file.name.partition(".")[0], key, row


def _texts(value: Any, where: str, what: str) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    if not texts:
        raise InputError(f"{where}: {what} has no texts")
    return [text_of(text, where, what) for text in texts]


# --- the package ---------------------------------------------------------------------------------


def write_files(
    benchmark: str, items: Sequence[Item], texts: Mapping[str, str], folder: Path
) -> list[Path]:
    """Writes predictions as the package reads them; returns the files in its order.

    A file has a line {KEY: text} for each prediction: a file for each subtask of captions, one file
    for questions. The package reads CSV too, but takes the answer "None" there for a missing one.

    Args:
      texts: by item id; items without a text are left out, as the package expects.
    """
    names = PROMPTS if benchmark == "mecat-caption" else (_ANSWERS,)
    rows: dict[str, list[dict[str, str]]] = {name: [] for name in names}
    for item in items:
        if item.id in texts:
            key, _, subtask = item.id.partition("/")
            rows[subtask or _ANSWERS].append({key: texts[item.id]})
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.jsonl" for name in names]
    for file, some in zip(files, rows.values(), strict=True):
        write_lines(file, some)
    return files


def words(benchmark: str, files: Sequence[Path]) -> list[str]:
    """The package's command for files of `write_files`, without the interpreter."""
    task = ["--task", TASKS[benchmark], "--metrics", "fense", "date"]
    return ["-m", "mecat.evaluate", "--prediction", *map(str, files), *task]


def encoder_folder(given: Path | None) -> Path | None:
    """The folder of the text encoder, as given or from the environment; None without one.

    Raises:
      InputError: a part of the encoder is missing, or the package is not installed.
    """
    named = given or os.environ.get(ENCODER_KEY)
    if not named:
        return None
    folder = Path(named).absolute()
    if missing := [part for part in _ENCODER if not (folder / part).is_file()]:
        parts = ", ".join(f"{part.split('/')[0]} ({what})" for part, what in _ENCODER.items())
        raise InputError(
            f"{shown(folder)}: no {missing[0]}; expected the text encoder of MECAT: {parts}. "
            "Nothing is downloaded: put them there first"
        )
    try:
        importlib.metadata.version("mecat")
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"DATE and FENSE need the package mecat: {extra('mecat')}") from None
    return folder


def identity(encoder: Path) -> dict[str, str]:
    """What DATE and FENSE depend on beside answers and references: for the score file."""
    sums = json.dumps(checksums(encoder)).encode()
    return {
        "mecat": importlib.metadata.version("mecat"),
        "text_encoder": str(encoder),
        "text_encoder_hash": hashlib.sha256(sums).hexdigest()[:16],
    }


def run(
    benchmark: str, files: Sequence[Path], data: Path, encoder: Path
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """DATE and FENSE in percent by the package, in a process of its own without the hub.

    A process, because the package sets PyTorch's threads and reads names of models, not paths.

    Args:
      files: of `write_files`.
      data: the references: a folder, or a file in it.
      encoder: the result of `encoder_folder`.

    Returns:
      ({subtask: {"date", "fense"}}, subtasks without predictions). The package's mean over all
      subtasks is under "" unless one of them has no predictions.

    Raises:
      InputError: the package failed.
    """
    folder = (data if data.is_dir() else data.parent).absolute()
    with tempfile.TemporaryDirectory() as output:
        paths = ["--reference_dir", str(folder), "--output_dir", output]
        ended = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", *words(benchmark, files), *paths],
            cwd=encoder,
            env={
                **os.environ,
                **dict.fromkeys(_OFFLINE, "1"),
                "FENSE_DATA": str(encoder),
                "LOGURU_LEVEL": "WARNING",
            },
            stdout=subprocess.DEVNULL,
        )
        tables = list(Path(output).glob("evaluation_results_*.csv"))
        if ended.returncode or not tables:
            raise InputError(
                f"{shown(encoder)}: mecat.evaluate failed with exit code {ended.returncode}; its "
                "last lines above say why"
            )
        rows = list(csv.DictReader(tables[0].read_text(encoding="utf-8").splitlines()))
    empty = [row["subtask"] for row in rows if row["num_samples"] == "0"]
    scores = {}
    for row in rows:
        whole = not row["num_samples"]  # "" in the row of the mean over subtasks
        if row["subtask"] not in empty and not (whole and empty):
            values = {name: 100 * float(row[name]) for name in ("date", "fense")}
            scores["" if whole else row["subtask"]] = values
    return scores, empty
