"""Speaks with flite; run by `world/forked.py`, for the noise in its voices has a state.

A request is JSON {"text", "voice", "stretch" of durations}; the answer is JSON {"rate", "words",
"phones": [[name, start, end], ...]}, seconds, a newline, and the samples as int16.
"""

import ctypes
import functools
import json
from collections.abc import Callable


class _Wave(ctypes.Structure):  # cst_wave
    _fields_ = [
        ("type", ctypes.c_char_p),
        ("sample_rate", ctypes.c_int),
        ("num_samples", ctypes.c_int),
        ("num_channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    ]


class _Voice(ctypes.Structure):  # the beginning of cst_voice
    _fields_ = [("name", ctypes.c_char_p), ("features", ctypes.c_void_p)]


def prepare() -> Callable[[bytes], bytes]:
    flite = ctypes.CDLL("libflite.so.1", ctypes.RTLD_GLOBAL)
    for name in ("libflite_usenglish.so.1", "libflite_cmulex.so.1"):
        ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    for name, result, *arguments in (
        ("flite_synth_text", pointer, text, pointer),
        ("utt_wave", pointer, pointer),
        ("utt_relation", pointer, pointer, text),
        ("relation_head", pointer, pointer),
        ("item_as", pointer, pointer, text),
        ("item_parent", pointer, pointer),
        ("item_next", pointer, pointer),
        ("ffeature_float", ctypes.c_float, pointer, text),
        ("ffeature_string", text, pointer, text),
        ("feat_set_float", None, pointer, text, ctypes.c_float),
    ):
        function = getattr(flite, name)
        function.restype, function.argtypes = result, arguments
    flite.flite_init()
    return functools.partial(_answer, flite)


def _answer(flite: ctypes.CDLL, request: bytes) -> bytes:
    asked = json.loads(request)
    name = asked["voice"]
    register = getattr(ctypes.CDLL(f"libflite_cmu_us_{name}.so.1"), f"register_cmu_us_{name}")
    register.restype = ctypes.c_void_p
    voice = register(None)
    features = ctypes.cast(voice, ctypes.POINTER(_Voice)).contents.features
    flite.feat_set_float(features, b"duration_stretch", asked["stretch"])
    utterance = flite.flite_synth_text(asked["text"].encode(), voice)
    wave = ctypes.cast(flite.utt_wave(utterance), ctypes.POINTER(_Wave)).contents
    words: dict[int, tuple[str, float, float]] = {}  # a token, such as "sister's", has several
    word = flite.relation_head(flite.utt_relation(utterance, b"Word"))
    while word:
        token = flite.item_parent(flite.item_as(word, b"Token"))
        start = flite.ffeature_float(word, b"R:SylStructure.daughter1.daughter1.R:Segment.p.end")
        end = flite.ffeature_float(word, b"R:SylStructure.daughtern.daughtern.end")
        name = flite.ffeature_string(token, b"name").decode()
        words[token] = name, words.get(token, (name, start))[1], end
        word = flite.item_next(word)
    phones, start = [], 0.0
    phone = flite.relation_head(flite.utt_relation(utterance, b"Segment"))
    while phone:
        end = flite.ffeature_float(phone, b"end")
        phones.append((flite.ffeature_string(phone, b"name").decode(), start, end))
        phone, start = flite.item_next(phone), end
    head = {"rate": wave.sample_rate, "words": list(words.values()), "phones": phones}
    pcm = ctypes.string_at(wave.samples, 2 * wave.num_samples)
    return json.dumps(head).encode() + b"\n" + pcm
