"""Transcripts, with times or without, in every layout that they come in."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.evaluate.benchmarks import load_benchmark
from moss_audio_jax.evaluate.manifests import read_textgrid, read_timed, read_transcripts
from moss_audio_jax.evaluate.reading import read_rows
from moss_audio_jax.text import Segment, to_textgrid


def put(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def told(clips: list) -> list[tuple]:
    """(id, audio, text or slots) of each."""
    return [
        (
            c.id,
            *c.audio,
            c.reference.get("text", [tuple(s.values()) for s in c.reference.get("slots", [])]),
        )
        for c in clips
    ]


# --- transcripts ---------------------------------------------------------------------------------


def test_librispeech(tmp_path):
    """Both parts, one of them alone, and the audio elsewhere."""
    for part, speaker in (("test-clean", 61), ("test-other", 367)):
        folder = tmp_path / part / str(speaker) / "70968"
        name = f"{speaker}-70968-0000"
        put(folder / f"{speaker}-70968.trans.txt", f"{name} HE BEGAN\n{speaker}-70968-0001 A B\n")
    clips, problems = read_transcripts(tmp_path)
    assert problems == []
    assert told(clips)[0] == (
        "61-70968-0000",
        str(tmp_path / "test-clean/61/70968/61-70968-0000.flac"),
        "HE BEGAN",
    )
    assert [c.group["dimension"] for c in clips] == ["test-clean"] * 2 + ["test-other"] * 2
    alone, _ = read_transcripts(tmp_path / "test-other", Path("/a"))
    assert told(alone)[1] == ("367-70968-0001", "/a/367/70968/367-70968-0001.flac", "A B")
    assert alone[0].group == {"dimension": "test-other", "language": "en"}


def test_aishell(tmp_path):
    """Split by speaker, without a look at the audio; words are not split in Chinese."""
    lines = "BAC009S0002W0122 而 对\nBAC009S0724W0121 开发\nBAC009S0764W0121 甚至 出现\n"
    put(tmp_path / "transcript/aishell_transcript_v0.8.txt", lines)
    clips, _ = read_transcripts(tmp_path)
    audio = str(tmp_path / "wav/test/S0764/BAC009S0764W0121.wav")
    assert told(clips) == [("BAC009S0764W0121", audio, "甚至出现")]
    assert clips[0].group["language"] == "zh"
    (train,), _ = read_transcripts(tmp_path, split="train")
    assert train.reference == {"text": "而对"}
    with pytest.raises(UsageError, match="split 'tset'"):
        read_transcripts(tmp_path, split="tset")
    put(tmp_path / "transcript/aishell_transcript_v0.8.txt", "S0764W0121 甚 至\n")
    with pytest.raises(InputError, match=r"v0\.8\.txt:1: 'S0764W0121' is not an AISHELL-1"):
        read_transcripts(tmp_path)


def test_fleurs(tmp_path):
    folder = tmp_path / "cmn_hans_cn"
    lines = (
        '1\ta.wav\t"你好"，世界。\t你好世界\tx\t1600\tMALE\n1\tb.wav\t你好。\t你好\tx\t1\tFEMALE\n'
    )
    file = put(folder / "test.tsv", lines)
    clips, _ = read_transcripts(folder)
    audio = folder / "audio" / "test"
    assert told(clips) == [
        ("a", str(audio / "a.wav"), '"你好"，世界。'),
        ("b", str(audio / "b.wav"), "你好。"),
    ]
    assert clips[0].group == {"dimension": "FLEURS cmn_hans_cn", "language": "zh"}
    assert read_transcripts(file)[0] == clips
    put(file, "1 a.wav text\n")
    with pytest.raises(InputError, match=r"test\.tsv:1: 1 tab-separated column"):
        read_transcripts(file)


def test_kaldi(tmp_path):
    put(tmp_path / "wav.scp", "u1 /a/1.wav\nu2 2.wav\nu3 3.wav\n")
    put(tmp_path / "text", "u2 two words\nu1 one\n")
    clips, problems = read_transcripts(tmp_path, Path("/root"), allow_outside=True)
    assert told(clips) == [("u2", "/root/2.wav", "two words"), ("u1", "/a/1.wav", "one")]
    assert told(read_transcripts(tmp_path)[0])[1][1] == "/a/1.wav"
    assert problems == [f"{tmp_path / 'text'}: no transcript of u3"]

    put(tmp_path / "text", "u4 who\n")
    with pytest.raises(InputError, match="text:1: u4 is not in"):
        read_transcripts(tmp_path)
    put(tmp_path / "wav.scp", "u1 sox 1.sph -t wav - |\n")
    with pytest.raises(InputError, match=r"wav\.scp:1: u1 is a command"):
        read_transcripts(tmp_path)


def test_kaldi_segments(tmp_path):
    """Utterances are parts of recordings; a file name need not be UTF-8."""
    (tmp_path / "wav.scp").write_bytes(b"r1 caf\xe9.wav\nr2 2.wav\n")
    put(tmp_path / "segments", "u1 r1 0.5 2\r\nu2 r1 2 -1\nu3 r2 0 1.25\nu4 r2 3 4\n")
    put(tmp_path / "text", "u3 three\nu1 one\nu2 two\n")
    clips, problems = read_transcripts(tmp_path, tmp_path)
    assert [(c.id, os.fsencode(c.audio[0]).split(b"/")[-1], c.cut) for c in clips] == [
        ("u3", b"2.wav", (0.0, 1.25)),
        ("u1", b"caf\xe9.wav", (0.5, 2.0)),
        ("u2", b"caf\xe9.wav", (2.0, None)),
    ]
    assert problems == [f"{tmp_path / 'text'}: no transcript of u4"]
    for line, said in (
        ("u1 r1 1", "expected `utterance recording start end`"),
        ("u1 r1 one two", "expected `utterance"),
        ("u1 r9 0 1", "r9 is not in"),
        ("u1 r1 2 1", "u1 runs from 2 to 1 s"),
        ("u1 r1 nan 1", "u1 runs from nan"),
        ("u1 r1 0 inf", "u1 runs from 0 to inf"),
    ):
        put(tmp_path / "segments", line)
        with pytest.raises(InputError, match=f"segments:1: {said}"):
            read_transcripts(tmp_path)
    put(tmp_path / "segments", "u9 r1 0 1\n")
    with pytest.raises(InputError, match=r"text:1: u3 is not in .*segments"):
        read_transcripts(tmp_path)


def test_parts_of_files(tmp_path):
    """NeMo's offset and duration; without ids the names tell the parts of a file apart."""
    rows = [
        {"audio_filepath": "a.flac", "offset": 0.0, "duration": 2.5, "text": "x"},
        {"audio_filepath": "a.flac", "offset": 2.5, "text": "y"},
        {"audio_filepath": "a.flac", "duration": 3, "text": "z"},
        {"audio_filepath": "a.flac", "text": "w", "duration": None, "id": "whole"},
    ]
    file = put(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    clips, _ = read_transcripts(file)
    assert [(c.id, c.cut) for c in clips] == [
        ("a.flac@0.0", (0.0, 2.5)),
        ("a.flac@2.5", (2.5, None)),
        ("a.flac", (0.0, 3.0)),
        ("whole", None),
    ]
    for odd, said in (
        ('"offset": -1', "the offset is -1; expected seconds"),
        ('"offset": NaN', "the offset is nan"),
        ('"offset": "1"', "the offset is text"),
        ('"offset": true', "the offset is True"),
        ('"duration": 0', "the duration is 0"),
        ('"duration": 1e400', "the duration is inf"),
        (f'"duration": {"9" * 4000}', "the duration is 999"),
    ):
        put(file, f'{{"audio": "a", "text": "b", {odd}}}')
        with pytest.raises(InputError, match=f"rows.jsonl:1: {said}"):
            read_transcripts(file)
    put(file, '{"audio": ["a", "b"], "text": "b", "offset": 1}')
    with pytest.raises(InputError, match="need exactly one audio file; there are 2"):
        read_transcripts(file)


@pytest.mark.parametrize("path", ["/etc/a.wav", "../a.wav", "b/../../a.wav"])
def test_a_given_audio_root_is_not_left(tmp_path, path):
    row = {"audio": path, "text": "x", "words": [], "events": []}
    file = put(tmp_path / "rows.jsonl", json.dumps(row))
    put(tmp_path / "kaldi/wav.scp", f"u {path}\n")
    put(tmp_path / "kaldi/text", "u x\n")
    root = tmp_path / "root"
    for read, data in (
        (read_transcripts, file),
        (read_timed, file),
        (read_transcripts, tmp_path / "kaldi"),
    ):
        with pytest.raises(InputError, match=r"(rows\.jsonl|wav\.scp):1: .* lies outside of --a"):
            read(data, root)
        (clip,), _ = read(data, root, allow_outside=True)
        assert clip.audio == (str(root / path),)
    assert read_transcripts(file)[0][0].audio == (str(tmp_path / path),)
    with pytest.raises(InputError, match="lies outside"):
        load_benchmark("events", file, root)
    assert load_benchmark("events", file, root, allow_outside=True).items
    for hostile in ("", "a\0b"):
        put(file, json.dumps({**row, "audio": hostile}))
        with pytest.raises(InputError, match="is not a path of a file"):
            read_transcripts(file)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_encodings(tmp_path, encoding):
    put(tmp_path / "rows.jsonl", '{"audio": "é.wav", "text": "né"}\r\n', encoding)
    put(tmp_path / "wav.scp", "u é.wav\n")
    put(tmp_path / "text", "u né\n", encoding)
    for data in (tmp_path / "rows.jsonl", tmp_path):
        (clip,), _ = read_transcripts(data)
        assert (Path(clip.audio[0]).name, clip.reference["text"]) == ("é.wav", "né")


def test_manifest_rows(tmp_path):
    file = put(
        tmp_path / "rows.jsonl",
        '{"audio_filepath": "a.wav", "text": "one\u2028line"}\r\n\n'
        '{"id": 2, "audio": ["b.wav", "c.wav"], "transcript": "", "dimension": "far"}\n',
    )
    clips, problems = read_transcripts(file)
    assert told(clips)[0] == ("a.wav", str(tmp_path / "a.wav"), "one\u2028line")
    assert (clips[1].id, clips[1].group) == ("2", {"dimension": "far"})
    assert clips[1].audio == (str(tmp_path / "b.wav"), str(tmp_path / "c.wav"))
    assert problems == ["2: an empty transcript"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"audio": "a.wav"}', "rows.jsonl:1: no 'text' or 'transcript'"),
        ('{"text": "a"}', "rows.jsonl:1: no 'audio' or 'audio_path'"),
        ('{"text": "a", "audio": 5}', "rows.jsonl:1: the audio is a number"),
        ('{"text": 5, "audio": "a"}', "rows.jsonl:1: the text is a number"),
        ('{"text": "a", "audio": "b"}\n{"te', "rows.jsonl:2: not valid JSON"),
        ("[1]", "row 1: is a number; expected a JSON object"),
        ('{"text": "a", "audio": "b", "language": 5}', "rows.jsonl:1: the language is a number"),
        ('{"text": "a", "audio": "b", "id": [1]}', "rows.jsonl:1: the id is a list"),
        ('{"text": "a", "audio": "b", "dimension": {}}', "rows.jsonl:1: 'dimension' is an object"),
        ('{"x": ' + "[" * 100_000, "rows.jsonl:1: not usable JSON .it nests too deeply"),
        ('{"x": ' + "9" * 5000 + "}", "rows.jsonl:1: not usable JSON .an integer of thousands"),
        ("[{", "rows.jsonl: not valid JSON"),
    ],
)
def test_manifests_that_cannot_be_read(tmp_path, text, words):
    with pytest.raises(InputError, match=words):
        read_transcripts(put(tmp_path / "rows.jsonl", text))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"no transcripts; expected a \.jsonl manifest"):
        read_transcripts(tmp_path)
    for missing in (tmp_path / "x", tmp_path / "x.jsonl"):
        with pytest.raises(InputError, match="no such file or folder"):
            read_transcripts(missing)
        with pytest.raises(InputError, match="no such file or folder"):
            read_timed(missing)
    with pytest.raises(InputError, match="not UTF-8"):
        read_transcripts(put(tmp_path / "rows.jsonl", "é", "latin-1"))
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match="not a regular file"):
        read_transcripts(tmp_path / "pipe.jsonl")
    pytest.importorskip("pyarrow", reason="parquet needs the extra `evaluate`")
    with pytest.raises(InputError, match=r"rows\.parquet: "):
        list(read_rows(put(tmp_path / "rows.parquet", "no parquet")))


# --- times ---------------------------------------------------------------------------------------

LONG = """\
File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 2.5
tiers? <exists>
size = 3
item []:
    item [1]:
        class = "TextTier"
        name = "beeps"
        xmin = 0
        xmax = 2.5
        points: size = 1
        points [1]:
            number = 1.5
            mark = "beep 2"
    item [2]:
        class = "IntervalTier"
        name = "Words"
        xmin = 0
        xmax = 2.5
        intervals: size = 4
        intervals [1]:
            xmin = 0
            xmax = 0.25
            text = ""
        intervals [2]:
            xmin = 0.25
            xmax = 1
            text = "say ""hi"" [3] "
        intervals [3]:
            xmin = 1
            xmax = 1.5e0
            text = "<eps>"
        intervals [4]:
            xmin = 1.5
            xmax = 2.5
            text = "你好"
    item [3]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 2.5
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 2.5
            text = "AA1"
"""
SHORT = """\
File type = "ooTextFile"
Object class = "TextGrid"

0
2.5
<exists>
3
"TextTier"
"beeps"
0
2.5
1
1.5
"beep 2"
"IntervalTier"
"Words"
0
2.5
4
0
0.25
""
0.25
1
"say ""hi"" [3] "
1
1.5e0
"<eps>"
1.5
2.5
"你好"
"IntervalTier"
"phones"
0
2.5
1
0
2.5
"AA1"
"""


@pytest.mark.parametrize("text", [LONG, SHORT])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_textgrids(tmp_path, text, encoding):
    file = put(tmp_path / "a.TextGrid", text, encoding)
    words = [('say "hi" [3]', 0.25, 1.0), ("你好", 1.5, 2.5)]
    assert [tuple(slot.values()) for slot in read_textgrid(file, "words")] == words
    assert read_textgrid(file, "phones") == [{"text": "AA1", "start": 0.0, "end": 2.5}]
    with pytest.raises(InputError, match="no interval tier beeps; it has beeps, Words, phones"):
        read_textgrid(file, "beeps")
    for broken in (text[: text.index("你")], text.replace("size = 4", "").replace("\n4\n", "\n")):
        with pytest.raises(InputError, match="ends early or is broken"):
            read_textgrid(put(file, broken), "words")
    with pytest.raises(InputError, match="not a TextGrid"):
        read_textgrid(put(file, "a b c"), "words")


def short(*tiers: str, header: str = 'File type = "ooTextFile"\nObject class = "TextGrid"') -> str:
    return f"{header}\n\n0\n2\n<exists>\n{len(tiers)}\n" + "\n".join(tiers) + "\n"


GOOD = '"IntervalTier"\n"words"\n0\n2\n1\n0\n2\n"good"'
YES = GOOD.replace("good", "yes")


def test_textgrids_as_praat_and_others_write_them(tmp_path):
    file = tmp_path / "a.TextGrid"
    old = short(GOOD, header='File type = "ooTextFile short"\n"TextGrid"')
    commented = short(GOOD.replace("2\n1", '2 ! of "two" 3\n1'))
    plus = short(GOOD.replace("\n2\n", "\n+2.0e+00\n")).replace("\n2\n", "\n2e+00\n")
    long = 'File type = "ooTextFile"\nObject class = "TextGrid"\nxmin=0\nxmax=2\ntiers? <exists>\n'
    long += 'size=1\nitem []:\nitem [1]:\nclass="IntervalTier"\nname="words"\nxmin=0\nxmax=2.\n'
    long += 'intervals: size=1\nintervals [1]:\nxmin=.0\nxmax=2\ntext="good"\n'
    for text in (old, commented, plus, long, old.replace("\n", "\r\n")):
        expected = [{"text": "good", "start": 0.0, "end": 2.0}]
        assert read_textgrid(put(file, text), "words") == expected, text


def test_of_two_tiers_of_one_name_the_first_is_taken_with_a_warning(tmp_path):
    file = put(tmp_path / "a.TextGrid", short(GOOD, YES))
    with pytest.warns(UserWarning, match="2 tiers are named 'words'; the first is taken"):
        assert [span["text"] for span in read_textgrid(file, "words")] == ["good"]
    put(file, short(GOOD, YES.replace("words", "Word")))
    assert [span["text"] for span in read_textgrid(file, ("words", "word"))] == ["good"]


@pytest.mark.parametrize(
    "hostile",
    [
        short(GOOD.replace("\n1\n", "\n1e300\n")),
        short(GOOD.replace("\n1\n", "\n-1\n")),
        short(GOOD.replace("\n1\n", "\n1.5\n")),
        short(GOOD).replace(">\n1\n", ">\n1e999\n"),
        short(GOOD.replace("IntervalTier", "Spectrum")),
        short(GOOD.replace('"words"', "7")),
        short(GOOD.replace('0\n2\n"good"', '"0"\n"nan"\n"good"')),
        short(GOOD) + '"a',
        short(GOOD)[:-3] + '""' * 100_000,
    ],
)
def test_textgrids_that_are_broken(tmp_path, hostile):
    with pytest.raises(InputError, match="ends early or is broken"):
        read_textgrid(put(tmp_path / "a.TextGrid", hostile), "words")


def test_our_own_textgrids_come_back(tmp_path):
    segments = [Segment(0.5, 1.25, 'a "b"'), Segment(1.25, 2.0, "1 2 3")]
    file = put(tmp_path / "a.TextGrid", to_textgrid(segments, 3.0))
    (clip,), _ = read_timed(file, level="sentence")
    assert told([clip])[0][2] == [(s.text, s.start, s.end) for s in segments]


def test_textgrids_find_their_audio(tmp_path):
    put(tmp_path / "grids/dev/1/a.TextGrid", LONG)
    put(tmp_path / "grids/dev/2/b.TextGrid", SHORT)
    put(tmp_path / "sound/x/a.flac", "")
    clips, _ = read_timed(tmp_path / "grids", tmp_path / "sound")
    assert [c.id for c in clips] == ["a", "b"]
    # If there is none, `infer` names the path that was searched.
    assert [c.audio for c in clips] == [
        (str(tmp_path / "sound/x/a.flac"),),
        (str(tmp_path / "sound/b.wav"),),
    ]
    assert {c.reference["level"] for c in clips} == {"word"}
    with pytest.raises(InputError, match="no interval tier sentences or "):
        read_timed(tmp_path / "grids", level="sentence")
    assert told(read_timed(tmp_path / "grids", tier="phones")[0])[0][2] == [("AA1", 0.0, 2.5)]
    put(tmp_path / "sound/y/a.wav", "")
    with pytest.raises(InputError, match="have one name"):
        read_timed(tmp_path / "grids", tmp_path / "sound")
    with pytest.raises(InputError, match=r"no \.TextGrid or \.ctm"):
        read_timed(tmp_path / "sound")


def test_ctm(tmp_path):
    file = put(
        tmp_path / "a.ctm",
        ";; made by hand\nu1 1 0.50 0.25 one 0.9\nu2 A 0.1 0.2 two\nu1 1 0.1 0.3 SIL\n"
        "u1 1 0.1 0.2 zero\n",
    )
    clips, _ = read_timed(file, Path("/a"))
    assert told(clips) == [
        ("u1", "/a/u1.wav", [("zero", 0.1, 0.3), ("one", 0.5, 0.75)]),
        ("u2", "/a/u2.wav", [("two", 0.1, 0.3)]),
    ]
    with pytest.raises(InputError, match=r"a\.ctm:1: expected `name channel"):
        read_timed(put(file, "u1 1 0.5\n"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ('[{"text": "a", "start": 2, "end": 1}]', "'a' runs from 2.0 to 1.0 s"),
        ('[{"text": "a", "start": "x", "end": 1}]', "expected a list of"),
        ('[{"text": "a", "start": 1}]', "expected a list of"),
        ("5", "expected a list of"),
        ("null", "no 'words'"),
    ],
)
def test_times_that_cannot_be(tmp_path, words, said):
    file = put(tmp_path / "rows.jsonl", f'{{"audio": "a.wav", "words": {words}}}\n')
    with pytest.raises(InputError, match=f"rows.jsonl:1: {said}"):
        read_timed(file)
