"""Speaks in a separate process; run by `forked.py` with espeak-ng's library and data folder.

espeak-ng keeps state between utterances (the slow flutter of its pitch continues, its noise is
seeded with the process id), so the same sentence would sound different each time. Here a fork of a
process that has never spoken answers every request. Only the standard library is imported, so that
the process starts at once; and GPL code stays out of the process that trains.

A request is JSON, [{"text", "voice", "rate", "pitch", "range"}, ...]; the answer is JSON {"rate",
"utterances": [{"samples", "events": [[type, text position from 0, sample, phoneme], ...]}]}, a
newline, and the samples as int16, one utterance after the other. A request {"voice", "text"} asks
how a text is said: JSON, [IPA, espeak's names], BETWEEN phonemes, words apart.
"""

import ctypes
import json
import os
import sys
from collections.abc import Callable

SYNCHRONOUS = 2
PHONEME_EVENTS, DONT_EXIT = 0x0001, 0x8000
UTF8 = 1
RATE, PITCH, RANGE = 1, 3, 4  # espeak_PARAMETER
WORD, PHONEME = 1, 7  # espeak_EVENT_TYPE
BETWEEN = "\u2027"  # phonemes
NAMES = ord(BETWEEN) << 8  # phonememode of espeak_TextToPhonemes
IPA = NAMES | 0x02


class _Id(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    ]


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


def prepare(path: str, data: str) -> Callable[[bytes], bytes]:
    library = ctypes.CDLL(path)
    rate = library.espeak_Initialize(SYNCHRONOUS, 0, os.fsencode(data), PHONEME_EVENTS | DONT_EXIT)
    if rate <= 0:
        sys.exit("espeak-ng could not start")

    def answer(request: bytes) -> bytes:
        asked = json.loads(request)
        return _told(library, asked) if isinstance(asked, dict) else _spoken(library, rate, asked)

    return answer


def _spoken(library: ctypes.CDLL, rate: int, requests: list) -> bytes:
    pcm: list[bytes] = []
    events: list[list] = []

    def receive(wav, n, event) -> int:
        if n > 0:
            pcm.append(ctypes.string_at(wav, 2 * n))
        i = 0
        while event[i].type:
            e = event[i]
            if e.type in (WORD, PHONEME):
                name = e.id.string.decode("utf-8", "replace") if e.type == PHONEME else ""
                events.append([e.type, e.text_position - 1, e.sample, name])
            i += 1
        return 0

    callback = _CALLBACK(receive)
    library.espeak_SetSynthCallback(callback)
    utterances, sound = [], b""
    for request in requests:
        pcm.clear()
        events.clear()
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        if library.espeak_SetVoiceByName(request["voice"].encode()) != 0:
            raise ValueError(request["voice"])
        for parameter, key in ((RATE, "rate"), (PITCH, "pitch"), (RANGE, "range")):
            library.espeak_SetParameter(parameter, request[key], 0)
        text = request["text"].encode() + b"\0"
        library.espeak_Synth(text, len(text), 0, 1, 0, UTF8, None, None)
        spoken = b"".join(pcm)
        utterances.append({"samples": len(spoken) // 2, "events": list(events)})
        sound += spoken
    return json.dumps({"rate": rate, "utterances": utterances}).encode() + b"\n" + sound


def _told(library: ctypes.CDLL, asked: dict) -> bytes:
    if library.espeak_SetVoiceByName(asked["voice"].encode()) != 0:
        raise ValueError(asked["voice"])
    library.espeak_TextToPhonemes.restype = ctypes.c_char_p
    forms = []
    for mode in (IPA, NAMES):
        at, clauses = ctypes.c_char_p(asked["text"].encode()), []
        while at.value is not None:  # a clause at a time
            found = library.espeak_TextToPhonemes(ctypes.byref(at), UTF8, mode)
            clauses.append(found.decode())
        forms.append(" ".join(clauses))
    return json.dumps(forms).encode()
