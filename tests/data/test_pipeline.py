"""Batches: their content, their order, resuming, processes, workers, rows that are left out."""

import json
from collections import Counter

import ml_dtypes
import numpy as np
import pytest
from data_rows import asr, audio, text, write_clip, write_rows

from moss_audio_jax.audio import log_mel
from moss_audio_jax.data.augment import Augment
from moss_audio_jax.data.mixture import Mixture
from moss_audio_jax.data.pipeline import merge_states
from moss_audio_jax.errors import InputError


def same(left, right):
    assert left.row_ids == right.row_ids
    assert left.arrays.keys() == right.arrays.keys()
    for key, value in left.arrays.items():
        np.testing.assert_array_equal(value, right.arrays[key], err_msg=key)


def take(loader, count):
    return [next(loader) for _ in range(count)]


def joined(batches):
    """The global batch of several processes' parts."""
    arrays = {key: np.concatenate([b.arrays[key] for b in batches]) for key in batches[0].arrays}
    return arrays, [ids for b in batches for ids in b.row_ids]


def test_a_batch_by_hand(tmp_path, tokenizer, make_loader):
    """Two turns, two clips and a weight; every array is derived from the row by hand."""
    clips = [write_clip(tmp_path / "a.wav", 1.03, 1), write_clip(tmp_path / "b.wav", 0.5, 2)]
    row = {
        "conversation": [
            text("system", "Be brief."),
            audio("a.wav"),
            audio(tmp_path / "b.wav"),
            text("user", "Compare."),
            text("assistant", "noise"),
            text("user", "Sure?"),
            text("assistant", "yes"),
        ],
        "weight": 0.5,
        "task": "compare",
    }
    path = write_rows(tmp_path / "rows.jsonl", [row])
    loader = make_loader((path,), batch=1, packing=False, tasks=("asr", "compare"))
    batch = next(loader)

    def encode(*parts):
        ids = []
        for part in parts:
            ids += part if isinstance(part, list) else tokenizer.encode(part, special=True)
        return ids

    spans = [[301, *[300] * n, 302] for n in (13, 7)]  # 103 and 50 frames
    answers = [encode("noise<|im_end|>"), encode("yes<|im_end|>")]
    before = [
        encode(
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
            spans[0],
            "\n",
            spans[1],
            "\nCompare.<|im_end|>\n<|im_start|>assistant\n",
        ),
        encode("\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"),
    ]
    ids = before[0] + answers[0] + before[1] + answers[1]
    labels = [-100] * len(before[0]) + answers[0] + [-100] * len(before[1]) + answers[1]
    length, padding = len(ids), [0] * (400 - len(ids))
    arrays = batch.arrays
    np.testing.assert_array_equal(arrays["tokens"], [ids + padding])
    np.testing.assert_array_equal(arrays["labels"], [labels + [-100] * len(padding)])
    weights = [0.5 if label >= 0 else 0 for label in labels] + padding
    np.testing.assert_array_equal(arrays["weights"], [weights])
    np.testing.assert_array_equal(arrays["tasks"], [[2] * length + padding])
    np.testing.assert_array_equal(arrays["positions"], [[*range(length), *padding]])
    np.testing.assert_array_equal(arrays["segment_ids"], [[1] * length + padding])
    # Chunks of 80 frames have 10 tokens: 103 frames are 10 + 3 tokens, and the longer 7 of the
    # second clip lie before these. 3 + 7 and an empty token between them do not share a strip.
    places = np.flatnonzero(arrays["tokens"][0] == 300)
    expected = [*range(10), *range(20, 23), *range(10, 17)]
    np.testing.assert_array_equal(arrays["audio_index"][0, places], expected)
    assert np.sum(arrays["audio_index"] >= 0) == len(places)
    np.testing.assert_array_equal(arrays["frames"][0, 0], [8] * 10)
    np.testing.assert_array_equal(arrays["frames"][0, 1], [8] * 7 + [0] * 3)
    np.testing.assert_array_equal(arrays["frames"][0, 2], [8] * 3 + [0] * 7)
    assert not arrays["frames"][0, 3:].any()
    mels = np.zeros((1, 8, 80, 128), ml_dtypes.bfloat16)
    first, second = (log_mel(clip).T.astype(ml_dtypes.bfloat16) for clip in clips)
    mels[0, 0], mels[0, 2, :23], mels[0, 1, :50] = first[:80], first[80:], second
    np.testing.assert_array_equal(arrays["mels"], mels)
    assert batch.row_ids == [["data:0"]]
    want = {"examples": 1, "tokens": length, "room": 400, "labels": 10, "chunks": 3}
    assert {key: batch.stats[key] for key in want} == want
    assert batch.stats["audio_seconds"] == pytest.approx(1.53)


def test_packing_puts_the_same_examples_side_by_side(make_loader):
    """Each segment of a packed batch equals the example alone in a row."""
    packed = make_loader()
    alone = make_loader(packing=False)
    single = {}
    while len(single) < 35:  # 23 + 12 rows
        batch = next(alone)
        for row, (name,) in enumerate(batch.row_ids):
            single[name] = {key: value[row] for key, value in batch.arrays.items()}
    segments = 0
    for batch in take(packed, 4):
        for row, names in enumerate(batch.row_ids):
            here = {key: value[row] for key, value in batch.arrays.items()}
            assert here["segment_ids"].max() == len(names)
            for segment, name in enumerate(names, 1):
                places = here["segment_ids"] == segment
                n = int(places.sum())
                for key in ("tokens", "positions", "labels", "weights", "tasks"):
                    np.testing.assert_array_equal(here[key][places], single[name][key][:n])
                # Audio tokens are found through their index: (strip, token in it).
                index, own = here["audio_index"][places], single[name]["audio_index"][:n]
                np.testing.assert_array_equal(index >= 0, own >= 0)
                index, own = index[index >= 0], own[own >= 0]
                frames, own_frames = here["frames"].ravel(), single[name]["frames"].ravel()
                np.testing.assert_array_equal(frames[index], own_frames[own])
                mels, own_mels = (
                    x["mels"].reshape(-1, 8 * 128) for x in (here, single[name])
                )  # by token
                np.testing.assert_array_equal(mels[index], own_mels[own])
                segments += 1
    assert segments > 4 * 4  # several a row, or nothing was shown


@pytest.mark.parametrize("packing", [True, False])
def test_nothing_is_lost_or_seen_twice(corpus, make_loader, packing):
    """The rows given out are those of the mixture up to the window, without the carried ones."""
    spec = (str(corpus / "speech.jsonl"), str(corpus / "text.jsonl"))
    loader = make_loader(spec, packing=packing, streams=1, window=10, batch=1)
    mixture = Mixture(spec, seed=3)
    seen, checked, carried = Counter(), 0, set()
    for _ in range(150):
        seen.update(name for row in next(loader).row_ids for name in row)
        state = loader.state()["streams"]["0"]
        if state["offset"] == 0:
            indices = Counter(range(state["next"])) - Counter(state["carry"])
            assert seen == Counter(mixture.jobs()[i].row_id for i in indices)
            checked += bool(state["carry"]) == packing
            assert not carried & set(state["carry"])  # nothing waits for more than one window
            carried = set(state["carry"])
    assert checked > 5
    assert min(seen.values()) >= 3  # several epochs of all 35 rows
    assert len(seen) == 35


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"packing": False},
        {"streams": 2, "window": 5, "augment": Augment(speeds=(0.9, 1.1), time_masks=2)},
        {"length": 1500, "chunks": 30, "window": 4},  # a window does not fill a row
    ],
    ids=["packed", "unpacked", "augmented", "small_windows"],
)
def test_resume_at_every_step(make_loader, keys):
    loader = make_loader(**keys)
    states, batches = [loader.state()], []
    for _ in range(7):
        batches.append(next(loader))
        states.append(json.loads(json.dumps(loader.state())))
    resumed = make_loader(**keys)
    for step, state in enumerate(states[:-1]):
        resumed.restore(state)
        same(next(resumed), batches[step])
    resumed.restore(states[3])
    for batch, state in zip(batches[3:], states[4:], strict=True):
        same(next(resumed), batch)
        assert resumed.state() == state


def test_processes_and_workers_change_nothing(make_loader):
    """1, 2 and 4 processes give the same global batches; a state moves between any of them."""
    whole = make_loader()
    batches = take(whole, 6)
    for count in (2, 4):
        parts = [make_loader(process=(i, count)) for i in range(count)]
        for batch in batches[:4]:
            arrays, names = joined([next(part) for part in parts])
            assert names == batch.row_ids
            for key, value in arrays.items():
                np.testing.assert_array_equal(value, batch.arrays[key])
        merged = merge_states([part.state() for part in parts])
        for process in [(0, 1), (1, 2), (3, 4)]:
            resumed = make_loader(process=process)
            resumed.restore(merged)
            rows = 4 // process[1]
            here = slice(process[0] * rows, process[0] * rows + rows)
            for batch in batches[4:]:
                got = next(resumed)
                assert got.row_ids == batch.row_ids[here]
                np.testing.assert_array_equal(got.arrays["mels"], batch.arrays["mels"][here])
        with pytest.raises(InputError, match="no data state holds stream"):
            merge_states([parts[0].state()])
    with make_loader(workers=2, ahead=3) as loader:
        for batch in batches:
            same(next(loader), batch)
        loader.restore(merged)
        same(next(loader), batches[4])


def test_a_state_of_other_data_is_refused(make_loader, corpus):
    state = make_loader().state()
    for keys, key in (({"length": 512}, "length"), ({"streams": 2}, "streams")):
        with pytest.raises(InputError, match=rf"data\.{key}: the saved run has"):
            make_loader(**keys).restore(state)
    with pytest.raises(InputError, match=r"data\.train"):
        make_loader((str(corpus / "text.jsonl"),)).restore(state)


BROKEN = {  # line -> row, reason
    2: ("{not json", "not valid JSON"),
    4: (asr("missing.wav", "hi", id="lost"), "no such file"),
    5: (asr("broken.wav", "hi"), "not audio"),
    6: (asr("clip.wav", "  "), "empty answer"),
    7: ({"conversation": [audio("clip.wav"), text("user", "hm")]}, "ends with the user"),
    8: ({"conversation": [text("user", "a"), text("assistant", "b")], "weight": -1}, "weight"),
    9: ('["a list"]', "expected a JSON object"),
    10: ({"question": "?"}, "conversation"),
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Good rows on lines 1 and 13 to 30, blank line 3, bad rows, over-long ones on 11 and 12."""
    folder = tmp_path_factory.mktemp("damaged")
    write_clip(folder / "clip.wav", 0.5)
    write_clip(folder / "long.wav", 9)
    (folder / "broken.wav").write_bytes(b"RIFF no wave at all")
    rows = {line: row for line, (row, _) in BROKEN.items()}
    rows |= {3: "", 11: asr("long.wav", "hi"), 12: asr("clip.wav", "blah " * 100)}
    return write_rows(
        folder / "rows.jsonl",
        [rows.get(line, asr("clip.wav", f"good {line}")) for line in range(1, 31)],
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_rows_that_are_left_out_are_counted_and_listed_once(
    damaged, make_loader, tmp_path, processes
):
    out = tmp_path / "run"
    for _ in range(2):  # a restart lists nothing twice
        loaders = [
            make_loader((damaged,), (i, processes), str(out), max_bad_share=0.5)
            for i in range(processes)
        ]
        names, seen, bad, long = Counter(), 0, 0, 0
        for loader in loaders:
            batches = take(loader, 12)
            names.update(n for b in batches for row in b.row_ids for n in row)
            seen, bad, long = (
                total + batches[-1].stats[key]
                for total, key in ((seen, "seen"), (bad, "bad"), (long, "overlong"))
            )
        lines = [1, *range(13, 31)]
        assert set(names) == {f"data:{line - 1 - (line > 3)}" for line in lines}
        assert bad / seen == pytest.approx(8 / 29, abs=0.05)
        assert long / seen == pytest.approx(2 / 29, abs=0.03)
    listed = [json.loads(line) for line in (out / "bad_rows.jsonl").read_text().splitlines()]
    assert sorted(record["line"] for record in listed) == sorted(BROKEN)
    for record in listed:
        assert record["source"] == damaged
        assert BROKEN[record["line"]][1] in record["reason"]
        assert record.get("id") == ("lost" if record["line"] == 4 else None)
    long = [json.loads(line) for line in (out / "overlong_rows.jsonl").read_text().splitlines()]
    assert sorted(record["line"] for record in long) == [11, 12]
    assert all("a row of the batch has 400 and 8" in record["reason"] for record in long)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_rows_stop_the_run(damaged, make_loader, tmp_path, workers):
    loader = make_loader((damaged,), report_dir=str(tmp_path), max_bad_share=0.2, workers=workers)
    with pytest.raises(InputError, match=r"\d+ of \d+ rows \(2.*%\).*20\.0%.*bad_rows\.jsonl"):
        take(loader, 1000)
    with pytest.raises(InputError, match="are bad"):
        next(loader)


def test_rows_that_are_all_too_long_stop_the_run(corpus, make_loader):
    loader = make_loader((str(corpus / "speech.jsonl"),), length=30)
    with pytest.raises(InputError, match=r"none of 1024 rows.*speech\.jsonl line.*needs"):
        next(loader)


def test_augmentation_depends_on_seed_and_index_alone(tmp_path, make_loader):
    write_clip(tmp_path / "clip.wav", 1.0)
    rows = [asr("clip.wav", "plain words"), asr("clip.wav", "[0.00]timed[1.00]")]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    augment = Augment(speeds=(0.8, 1.0, 1.25), freq_masks=1, time_masks=1, time_share=0.5)
    keys = {"packing": False, "batch": 2, "augment": augment}
    frames = {"data:0": set(), "data:1": set()}
    masked = set()
    for batch, again in zip(
        take(make_loader((path,), **keys), 12),
        take(make_loader((path,), **keys, streams=1, window=3, workers=1), 12),
        strict=True,
    ):
        same(batch, again)
        for (name,), counts, mels in zip(
            batch.row_ids, batch.arrays["frames"], batch.arrays["mels"], strict=True
        ):
            frames[name].add(int(counts.sum()))
            masked.add(mels.tobytes())
    assert frames == {"data:0": {80, 104, 128}, "data:1": {104}}  # in whole tokens
    assert len(masked) == 24
