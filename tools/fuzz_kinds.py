"""The kinds of `tools/fuzz.py`: mutators of bytes, JSON and text, and the readers under test."""

# ruff: noqa: SIM905  words in one string are shorter than a list of words

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moss_audio_jax.errors import InputError

Rng = np.random.Generator
Mutator = Callable[[Rng, Sequence[bytes]], bytes]
Reader = Callable[[bytes], None]
Setup = tuple[Sequence[bytes], Mutator, Reader]  # seeds from which inputs are made, mutate, read
TOYS = Path(__file__).parents[1] / "tests" / "golden" / "tiny"


class Kind(NamedTuple):
    """`setup(folder)` prepares a kind in an empty folder; `read(data)` is under test."""

    setup: Callable[[Path], Setup]
    share: float  # of all inputs
    suffix: str  # of the files with failing inputs


# --- mutators ------------------------------------------------------------------------------------

_INTEGERS = [*(2**n + d for n in (0, 7, 8, 15, 16, 31, 32, 63) for d in (-1, 0)), 2**64 - 1]


def mutate_bytes(rng: Rng, seeds: Sequence[bytes]) -> bytes:
    """A seed with one to four faults: bits flipped, parts cut, doubled or spliced, odd integers."""
    data = bytearray(seeds[rng.integers(len(seeds))])
    for _ in range(rng.integers(1, 5)):
        if not data:
            break
        reach = len(data) if rng.random() < 0.5 else min(len(data), 160)  # headers matter most
        at = int(rng.integers(reach))
        size = int(min(2 ** rng.uniform(0, 12), len(data) - at))
        match rng.integers(9):
            case 0:
                data[at] ^= 1 << int(rng.integers(8))
            case 1:
                data[at : at + size] = rng.bytes(size)
            case 2:
                data[at : at + size] = bytes([int(rng.choice([0, 0xFF, 0x20, 0x7F]))]) * size
            case 3:
                del data[at:]
            case 4:
                del data[at : at + size]
            case 5:
                data[at:at] = data[at : at + size]
            case 6:
                data[at:at] = rng.bytes(size)
            case 7:
                width = int(rng.choice([2, 4, 8]))
                order = "little" if rng.random() < 0.7 else "big"
                value = int(_INTEGERS[rng.integers(len(_INTEGERS))]) % (1 << 8 * width)
                data[at : at + width] = value.to_bytes(width, order)
            case 8:
                other = seeds[rng.integers(len(seeds))]
                data[at:] = other[int(rng.integers(len(other) or 1)) :]
    return bytes(data)


# JSON texts instead of values, because some are not values of Python.
_HOSTILE = [
    *"null true false 0 -1 1 1e308 -1e308 1e999 NaN -Infinity 0.5 1.5e-320 1.0 65536".split(),
    *"18446744073709551616 2147483648 -2147483649".split(),
    *'"" "x" [] {} [[]] [""] [null] {"":null} "/" "." ".." "[0.0]" "<|AUDIO|>" "<think>"'.split(),
    *r'"\u0000" "a\u0000b" "\ud800" "\udfff\ud800" "\u202e\n\r\t"'.split(),
    *'"../../../etc/passwd" "/dev/zero" "/dev/full" "/proc/self/mem" "/proc/self/fd/0"'.split(),
    *'"https://127.0.0.1:9/a.wav" "file:///etc/passwd" "s3://b/k" "gs://b/k"'.split(),
    *("9" * 5000, "-" + "9" * 400, f'"{"A" * 70000}"', "[" + "0," * 20000 + "0]"),
    *("[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000),
]


def mutate_json(rng: Rng, seeds: Sequence[bytes]) -> bytes:
    """A seed's JSON with one to three values replaced, dropped, renamed or repeated."""
    text = seeds[rng.integers(len(seeds))]
    lines = text.decode().splitlines() if text.count(b"\n") > 1 and text[:1] != b"[" else None
    try:
        rows = [json.loads(line) for line in lines] if lines else [json.loads(text)]
    except ValueError:
        rows, lines = [json.loads(text)], None
    hostile: dict[str, str] = {}
    for _ in range(rng.integers(1, 4)):
        _spoil(rng, rows, hostile)
    made = "\n".join(json.dumps(row, ensure_ascii=bool(rng.random() < 0.8)) for row in rows)
    for mark, value in hostile.items():
        made = made.replace(f'"{mark}"', value)
    data = made.encode("utf-8", "surrogatepass") + (b"\n" if lines else b"")
    return mutate_bytes(rng, [data]) if rng.random() < 0.15 else data


def _spoil(rng: Rng, rows: list, hostile: dict[str, str]) -> None:
    places = list(_places(rows))
    holder, key = places[rng.integers(len(places))]
    mark = f"@{len(hostile)}@"
    match rng.integers(8):
        case 0 if isinstance(holder, dict):
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[f"{key}{'_' * int(rng.integers(0, 2))}x"] = holder.pop(key)
        case 2 if isinstance(holder, list) and holder is not rows:
            holder.insert(int(rng.integers(len(holder) + 1)), holder[key])
        case 3:
            other = places[rng.integers(len(places))]
            value = other[0][other[1]]
            if not isinstance(value, dict | list):
                holder[key] = value
        case _:
            hostile[mark] = _HOSTILE[rng.integers(len(_HOSTILE))]
            holder[key] = mark


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in list(inside):
        yield value, key
        if isinstance(each, dict | list):
            yield from _places(each)


def mutate_text(rng: Rng, seeds: Sequence[bytes]) -> bytes:
    """Pieces of seeds and hostile pieces in any order, sometimes with damaged bytes."""
    pieces = [p for seed in seeds for p in re.findall(r"\[[^\]]*\]|\s+|[^\s\[]+", seed.decode())]
    odd = [
        *"[ ] [1e308] [-1] [nan] --> <think> </think> { } : 1.5e+00 \x00 \u2028 \ud7ff".split(" "),
        *(" " * 30000, "[" * 2000, "[" + "9" * 1000, "[0.0]" * 500, "9" * 4301, "0:" * 500),
        *("\u0e33" * 500, "a\u0301" * 300, "." * 999, '"', "\r", "item [1]:"),
    ]
    count = int(2 ** rng.uniform(0, 7))
    made = "".join(
        str(odd[rng.integers(len(odd))])
        if rng.random() < 0.15
        else pieces[rng.integers(len(pieces))]
        for _ in range(count)
    )
    data = made.encode("utf-8", "surrogatepass")
    return mutate_bytes(rng, [data]) if rng.random() < 0.2 else data


# --- kinds ---------------------------------------------------------------------------------------


def _finite(value: Any) -> None:
    assert np.isfinite(np.asarray(value, np.float64)).all(), "the result is not finite"


def _tone(seconds: float = 0.4, rate: int = 16_000, channels: int = 1) -> np.ndarray:
    t = np.arange(int(seconds * rate)) / rate
    wav = 0.3 * np.sin(2 * np.pi * 440 * t) + 0.05 * np.sin(2 * np.pi * 1210 * t)
    return np.stack([wav] * channels, 1).astype(np.float32)


def _sound_files() -> list[bytes]:
    """Small files of the formats that libsndfile and FFmpeg write."""
    import av
    import soundfile

    made = []
    pcm = "WAV WAVEX AIFF CAF W64 RF64 AU NIST VOC FLAC".split()
    odd = "WAV/FLOAT WAV/PCM_24 WAV/DOUBLE WAV/ULAW WAV/IMA_ADPCM OGG/VORBIS OGG/OPUS".split()
    for name in [*(f"{form}/PCM_16" for form in pcm), *odd, "MP3/MPEG_LAYER_III"]:
        form, subtype = name.split("/")
        file = io.BytesIO()
        channels = 1 + len(made) % 2
        with contextlib.suppress(soundfile.LibsndfileError):
            soundfile.write(file, _tone(channels=channels), 16_000, subtype, format=form)
            made.append(file.getvalue())
    containers = "mp4/aac adts/aac matroska/libopus webm/libopus mp3/libmp3lame ogg/flac".split()
    for name in [*containers, "wav/pcm_s16le", "mov/alac", "mpegts/mp2"]:
        form, codec = name.split("/")
        file = io.BytesIO()
        try:
            with av.open(file, "w", format=form) as out:
                stream = out.add_stream(codec, rate=48_000, layout="mono")
                frame = av.AudioFrame.from_ndarray(_tone(rate=48_000).T.copy(), "fltp", "mono")
                frame.sample_rate = 48_000
                for packet in [*stream.encode(frame), *stream.encode(None)]:
                    out.mux(packet)
        except (av.FFmpegError, ValueError):  # an FFmpeg without that codec
            continue
        made.append(file.getvalue())
    return made


def audio(folder: Path) -> Setup:
    from moss_audio_jax.audio import load_audio

    path = folder / "input.wav"

    def read(data: bytes) -> None:
        if len(data) % 2:
            path.write_bytes(data)
            wav = load_audio(path)
        else:
            wav = load_audio(io.BytesIO(data))
        assert wav.dtype == np.float32
        assert len(wav) >= 160
        _finite(wav)

    return _sound_files(), mutate_bytes, read


def _row(audio: str = "a.wav") -> dict:
    message = {"role": "user", "message_type": "audio", "content": audio}
    asked = {"role": "user", "message_type": "text", "content": "Transcribe the audio."}
    said = {"role": "assistant", "message_type": "text", "content": "[0.0]hello[0.3]"}
    return {"message": message, "asked": asked, "said": said}


def rows(folder: Path) -> Setup:
    import soundfile

    from moss_audio_jax.config import DEFAULT_CHECKPOINT
    from moss_audio_jax.data.examples import ExampleMaker, Job
    from moss_audio_jax.data.packing import Room
    from moss_audio_jax.data.sources import Location
    from moss_audio_jax.text import load_tokenizer
    from moss_audio_jax.weights.opening import read_config

    soundfile.write(folder / "a.wav", _tone(), 16_000)
    encoder = read_config(DEFAULT_CHECKPOINT).encoder
    maker = ExampleMaker(load_tokenizer(DEFAULT_CHECKPOINT), encoder, Room(4096, 64, 50))
    r = _row()
    plain = {
        "conversation": [r["message"], r["asked"], r["said"]],
        "weight": 1.0,
        "task": "asr",
        "id": "a",
    }
    branched = {
        "conversation": [r["message"]],
        "branches": [{"messages": [r["asked"], r["said"]], "task": "asr", "weight": 0.5}] * 2,
        "words": [{"text": "hello", "start": 0.1, "end": 0.3}],
        "tags": [{"name": "bell", "start": 0.0, "end": 0.4}],
        "id": "b",
    }
    path = folder / "rows.jsonl"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        made = maker(Job(0, Location(str(path), 1, 0, len(data)), "rows:1", "rows"))
        if hasattr(made, "reason"):
            assert "\n" not in made.reason, "a reason of several lines"
            assert len(made.reason) < 1000, f"a reason of {len(made.reason)} characters"
            json.dumps(made._asdict() if hasattr(made, "_asdict") else vars(made))
        else:
            for mel in made.mels:
                _finite(mel)
            _finite(made.weights if hasattr(made, "weights") else 0.0)

    return [json.dumps(row).encode() for row in (plain, branched)], mutate_json, read


def _toy(folder: Path) -> Path:
    toy = folder / "toy"
    shutil.copytree(TOYS / "b", toy, ignore=shutil.ignore_patterns("*.npz"))
    return toy


def checkpoints(folder: Path) -> Setup:
    from moss_audio_jax.weights.opening import open_checkpoint, read_config

    toy = _toy(folder)
    names = ["config.json", "generation_config.json", "processor_config.json"]
    seeds = {name: (toy / name).read_bytes() for name in names}
    weights = (toy / "model.safetensors").read_bytes()

    def mutate(rng: Rng, _: Sequence[bytes]) -> bytes:
        if rng.random() < 0.5:
            length = int.from_bytes(weights[:8], "little")
            header = weights[8 : 8 + length]
            if rng.random() < 0.6:
                header = mutate_json(rng, [header])
                size = len(header) if rng.random() < 0.9 else int(rng.integers(1 << 40))
                data = size.to_bytes(8, "little") + header + weights[8 + length :]
            else:
                data = mutate_bytes(rng, [weights[: 8 + length]]) + weights[8 + length :]
            return b"model.safetensors\0" + data
        name = names[rng.integers(len(names))]
        return name.encode() + b"\0" + mutate_json(rng, [seeds[name]])

    def read(data: bytes) -> None:
        name, _, content = data.partition(b"\0")
        if name.decode("ascii", "replace") not in [*names, "model.safetensors"]:
            return
        file = toy / name.decode()
        kept = file.read_bytes()
        try:
            file.write_bytes(content)
            from moss_audio_jax.api import MossAudio

            read_config(toy)
            with contextlib.closing(open_checkpoint(toy, read_config(toy))):
                pass
            MossAudio.load(toy, "float32")
        finally:
            file.write_bytes(kept)

    return [b"config.json\0" + seeds["config.json"]], mutate, read


def adapters(folder: Path) -> Setup:
    import safetensors.numpy

    from moss_audio_jax.weights.adapters import Adapters
    from moss_audio_jax.weights.opening import read_config

    config = read_config(TOYS / "b")
    hidden = config.decoder.hidden_size
    prefix = "base_model.model.language_model.layers.0.self_attn.q_proj"
    width = config.decoder.heads * config.decoder.head_dim
    described = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]}
    described |= {"use_rslora": False, "alpha_pattern": {}, "rank_pattern": {}, "bias": "none"}
    described |= {"base_model_name_or_path": "x", "task_type": "CAUSAL_LM", "lora_dropout": 0.0}
    described |= {"fan_in_fan_out": False, "init_lora_weights": True, "inference_mode": True}
    described |= {"layers_to_transform": [0], "modules_to_save": None}
    arrays = {
        f"{prefix}.lora_A.weight": np.zeros((2, hidden), np.float32),
        f"{prefix}.lora_B.weight": np.zeros((width, 2), np.float32),
    }
    safetensors.numpy.save_file(arrays, folder / "adapter_model.safetensors")

    def read(data: bytes) -> None:
        (folder / "adapter_config.json").write_bytes(data)
        with Adapters(folder, config) as found:
            for path, layers in found.modules.items():
                for layer in range(len(layers)):
                    found.read(path, layer)

    return [json.dumps(described).encode()], mutate_json, read


def tokenizers(folder: Path) -> Setup:
    import tokenizers as library

    from moss_audio_jax.config import DEFAULT_CHECKPOINT
    from moss_audio_jax.text import load_tokenizer

    vocab = {chr(i): i - 33 for i in range(33, 127)} | {"ab": 94, "abc": 95}
    added = {str(i): {"content": s, "special": True} for i, s in enumerate(("<|im_end|>", "x"), 96)}
    core = library.Tokenizer(library.models.BPE(vocab=vocab, merges=[("a", "b"), ("ab", "c")]))
    core.pre_tokenizer = library.pre_tokenizers.Sequence(
        [
            library.pre_tokenizers.Split(library.Regex(r"\w+|\s+"), behavior="isolated"),
            library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.add_special_tokens(["<|im_end|>"])
    processor = {"audio_token_id": 100, "audio_start_id": 101, "audio_end_id": 102}
    sets = [
        {"tokenizer.model": (DEFAULT_CHECKPOINT / "tokenizer.model").read_bytes()},
        {"tokenizer.json": core.to_str().encode()},
        {
            "vocab.json": json.dumps(vocab).encode(),
            "merges.txt": b"#version: 0.2\na b\nab c\n",
            "tokenizer_config.json": json.dumps({"added_tokens_decoder": added}).encode(),
            "added_tokens.json": b'{"<|im_end|>": 96}',
            "processor_config.json": json.dumps(processor).encode(),
        },
    ]
    seeds = [name.encode() + b"\0" + content for each in sets for name, content in each.items()]

    def mutate(rng: Rng, seeds: Sequence[bytes]) -> bytes:
        name, _, content = seeds[rng.integers(len(seeds))].partition(b"\0")
        made = mutate_json if name.endswith(b".json") and rng.random() < 0.7 else mutate_bytes
        return name + b"\0" + made(rng, [content])

    def read(data: bytes) -> None:
        name, _, content = data.partition(b"\0")
        for each in sets:
            if name.decode("ascii", "replace") not in each:
                continue
            shutil.rmtree(folder)
            folder.mkdir()
            for other, kept in each.items():
                (folder / other).write_bytes(kept)
            (folder / name.decode()).write_bytes(content)
            tokenizer = load_tokenizer(folder)
            tokenizer.decode([*tokenizer.encode("abc<|im_end|>", special=True), *range(300)])
            tokenizer.encode("hello 你好")

    return seeds, mutate, read


def predictions(folder: Path) -> Setup:
    from moss_audio_jax.evaluate import report, score
    from moss_audio_jax.evaluate.predictions import read_all

    data = folder / "manifest.jsonl"
    manifest = [
        {"audio": f"{i}.wav", "text": text, "id": str(i)}
        for i, text in enumerate(["a fox ran", "the cat", "नमस्ते दुनिया"])
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in manifest))
    said = [
        {
            "id": row["id"],
            "raw_output": row["text"],
            "answer": row["text"],
            "prompt": "?",
            "thinking": None,
            "finish_reason": "stop",
            "meta": {"checkpoint": "m", "code_version": "1"},
        }
        for row in manifest
    ]
    good = "".join(json.dumps(row) + "\n" for row in said).encode()
    file, out = folder / "p.jsonl", folder / "s.json"
    file.write_bytes(good)
    common = ["--benchmark", "asr", "--data", str(data)]
    _quiet(score.main, [*common, "--predictions", str(file), "--output", str(out)])
    seeds = [b"p" + good, b"s" + out.read_bytes()]

    def mutate(rng: Rng, seeds: Sequence[bytes]) -> bytes:
        seed = seeds[rng.integers(len(seeds))]
        made = mutate_bytes if rng.random() < 0.3 else mutate_json
        return seed[:1] + made(rng, [seed[1:]])

    def read(data: bytes) -> None:
        if data[:1] == b"p":
            file.write_bytes(data[1:])
            _quiet(score.main, [*common, "--predictions", str(file), "--output", str(out)])
            read_all(file)
        else:
            out.write_bytes(data[1:])
            _quiet(report.main, ["--scores", str(out), "--output", str(folder / "r.html")])

    return seeds, mutate, read


def _quiet(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(argv)


def manifests(folder: Path) -> Setup:
    from moss_audio_jax.evaluate.manifests import read_timed, read_transcripts

    seeds = [
        b"m.jsonl\0"
        + b'{"audio":"a.wav","text":"hello","id":"1","offset":0.5,"duration":1.0}\n' * 2,
        b"m.csv\0" + b'audio,text,id\na.wav,"hello, you",1\nb.wav,there,2\n',
        b"m.tsv\0" + b"audio\ttext\na.wav\thello\n",
        b"m.TextGrid\0" + _TEXTGRID.encode(),
        b"m.TextGrid\0" + _TEXTGRID.encode("utf-16"),
        b"m.ctm\0" + b"a 1 0.00 0.30 hello 1.0\na 1 0.40 0.30 there\n",
    ]

    def mutate(rng: Rng, seeds: Sequence[bytes]) -> bytes:
        name, _, content = seeds[rng.integers(len(seeds))].partition(b"\0")
        how = rng.random()
        if name == b"m.jsonl" and how < 0.6:
            return name + b"\0" + mutate_json(rng, [content])
        if how < 0.3 and not content.startswith(b"\xff\xfe"):
            return name + b"\0" + mutate_text(rng, [content])
        return name + b"\0" + mutate_bytes(rng, [content])

    def read(data: bytes) -> None:
        name, _, content = data.partition(b"\0")
        if name not in (b"m.jsonl", b"m.csv", b"m.tsv", b"m.TextGrid", b"m.ctm"):
            return
        path = folder / name.decode()
        path.write_bytes(content)
        if name in (b"m.TextGrid", b"m.ctm"):
            from moss_audio_jax.evaluate.manifests import read_ctm, read_textgrid

            read = read_ctm if name == b"m.ctm" else lambda file: read_textgrid(file, "words")
            read(path)
        else:
            read_transcripts(path)
            if name == b"m.jsonl":
                read_timed(path)

    return seeds, mutate, read


_TEXTGRID = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 1.5
tiers? <exists>
size = 1
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 1.5
        intervals: size = 2
        intervals [1]:
            xmin = 0
            xmax = 0.7
            text = "red"
        intervals [2]:
            xmin = 0.7
            xmax = 1.5
            text = "bus"
"""


def timestamps(folder: Path) -> Setup:
    from moss_audio_jax.text.prompt import split_thinking
    from moss_audio_jax.text.textgrid import to_textgrid
    from moss_audio_jax.text.timestamps import parse, to_json, to_srt, to_vtt

    seeds = [
        b"[0.00]the fox[0.71] [0.71]ran[1.5]",
        b"0.5 - 1.25: bell; 2 - 3: dog barking",
        b"<think>steps</think>[0]a[1]",
        b"00:00:01.5 --> 00:00:02.25 hello",
    ]

    def read(data: bytes) -> None:
        text = data.decode("utf-8", "surrogatepass" if len(data) % 2 else "replace")
        split_thinking(text)
        segments = parse(text).segments
        _finite([[s.start, s.end] for s in segments])
        for writer in (to_srt, to_vtt, to_json, to_textgrid):
            writer(segments)

    def guarded(data: bytes) -> None:
        with contextlib.suppress(UnicodeDecodeError):
            data.decode("utf-8", "surrogatepass")
            read(data)

    return seeds, mutate_text, guarded


def replies(folder: Path) -> Setup:
    from moss_audio_jax.annotate.replies import checked
    from moss_audio_jax.evaluate.judge import read_scores

    given = {
        "transcribe": {"text": "hello there", "language": "en"},
        "align": {"words": [{"text": "hello", "start": 0.1, "end": 0.4}]},
        "events": {"events": [{"label": "bell", "start": 0.1, "end": 0.6}]},
        "music": {"instruments": ["piano"], "tempo": 120, "key": "C major", "lyrics": "la"},
        "judge": {"score": 4},
        "caption": {"text": "A bell rings."},
    }
    seeds = [json.dumps({"step": step, "reply": reply}).encode() for step, reply in given.items()]
    asked = {"duration": 4.0, "evidence": {"text": "hello", "template": "A bell."}}

    def read(data: bytes) -> None:
        from moss_audio_jax.files import parse_json

        with contextlib.suppress(InputError):
            read_scores(data.decode("utf-8", "replace"), ["score"])
        value = parse_json(data, "reply")
        if not isinstance(value, dict) or value.get("step") not in list(given):
            raise InputError("not a reply")
        checked(value["step"], value.get("reply"), asked)

    return seeds, mutate_json, read


def overrides(folder: Path) -> Setup:
    from moss_audio_jax.config_file import read_config_file

    config = Path(__file__).parents[1] / "configs" / "sft.py"
    keys = (
        "train.steps data.batch data.train optimizer.learning_rate mesh.data init_from data".split()
    )
    keys += "data.augment train.remat eval.samples nonsense".split()
    seeds = "5|1e-4|('rows.jsonl',)|'x'|None|True|[1, 2]|{'a': 1}|lambda: 0|__import__('os')".split(
        "|"
    )
    seeds += ["(" * 3000, "'" * 99, "9" * 5000, "\x00", "\ud800", "=", "nan"]

    def mutate(rng: Rng, _: Sequence[bytes]) -> bytes:
        words = []
        for _ in range(rng.integers(1, 4)):
            value = seeds[rng.integers(len(seeds))].encode("utf-8", "surrogatepass")
            value = mutate_bytes(rng, [value]) if rng.random() < 0.3 else value
            lead = [b"--config.", b"--config", b"-", b"--config.config."][
                int(rng.choice(4, p=[0.85, 0.05, 0.05, 0.05]))
            ]
            words.append(lead + keys[rng.integers(len(keys))].encode() + b"=" + value)
        return b"\n".join(words)

    def read(data: bytes) -> None:
        words = [os.fsdecode(word) for word in data.split(b"\n")]
        _quiet(lambda argv: read_config_file(str(config), argv), words)

    return [b""], mutate, read


KINDS = {
    "audio": Kind(audio, 0.30, ".bin"),
    "rows": Kind(rows, 0.15, ".json"),
    "checkpoints": Kind(checkpoints, 0.10, ".bin"),
    "adapters": Kind(adapters, 0.05, ".json"),
    "tokenizers": Kind(tokenizers, 0.05, ".bin"),
    "predictions": Kind(predictions, 0.07, ".jsonl"),
    "manifests": Kind(manifests, 0.08, ".txt"),
    "timestamps": Kind(timestamps, 0.08, ".txt"),
    "replies": Kind(replies, 0.07, ".json"),
    "overrides": Kind(overrides, 0.05, ".txt"),
}
