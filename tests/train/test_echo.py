"""Data echoing: rows that are used several times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_audio_jax.data.augment import Augment
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.train.echo import Echo, mask_mels


def run(steps, seed=0, batch=8, fresh=2, kept=32):
    """Which rows each step sees; rows are counted from 0 as they are made."""
    echo = Echo(batch, kept, seed, make_mesh(fsdp=1))
    seen = []
    for step in range(steps):
        made = jnp.arange(step * fresh, (step + 1) * fresh)
        rows = {"tokens": jnp.tile(made[:, None], (1, 4)), "weights": made[:, None] * 10.0}
        drawn = echo(step, rows)
        assert drawn["tokens"].shape == (batch, 4)
        np.testing.assert_array_equal(drawn["weights"][:, 0], drawn["tokens"][:, 0] * 10.0)
        seen.append(np.asarray(drawn["tokens"][:, 0]))
    return seen


def test_each_step_sees_its_new_rows_and_others_of_the_newest_no_row_twice():
    for step, rows in enumerate(run(60)):
        made = (step + 1) * 2
        assert set(range(made - 2, made)) <= set(rows.tolist())
        assert rows.max() < made
        assert rows.min() >= made - 32
        if made >= 8:
            assert len(set(rows.tolist())) == 8


def test_a_row_is_seen_batch_over_fresh_times_on_average():
    seen = np.concatenate(run(400))
    times = np.bincount(seen)[100:700]  # neither the first rows nor the last
    assert times.mean() == pytest.approx(4, rel=0.05)
    assert times.min() >= 1


def test_the_draw_is_the_seeds():
    first, again, other = run(20), run(20), run(20, seed=1)
    np.testing.assert_array_equal(first, again)
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


MASKS = Augment(freq_masks=2, freq_width=10, time_masks=2, time_width=30, time_share=0.2)


def test_masks_blank_bands_and_stretches_of_each_chunks_own_sound():
    mels = jax.random.uniform(jax.random.key(0), (3, 2, 104, 64), minval=1.0, maxval=2.0)
    frames = jnp.array([[100, 60], [100, 5], [0, 8]])
    inside = np.arange(104) < np.asarray(frames)[..., None]
    of_tokens = (frames[..., None] - 8 * jnp.arange(13)).clip(0, 8)
    mels = jnp.where(inside[..., None], mels, 0.0)
    widths = []
    for number in range(40):
        masked = np.asarray(mask_mels(mels, of_tokens, MASKS, jax.random.key(number)))
        changed = masked != np.asarray(mels)
        assert not changed[~inside].any()  # padding stays
        for row, chunk in np.ndindex(3, 2):
            count = int(frames[row, chunk])
            if not count:
                continue
            own, before = masked[row, chunk, :count], np.asarray(mels)[row, chunk, :count]
            least = own == before.min()
            bands, times = least.all(0), least.all(1)
            # What is hidden lies in whole bands and whole stretches; one place was blank before.
            assert (least & ~(bands | times[:, None])).sum() <= 1
            assert (own == before)[~least].all()
            assert bands.sum() <= 20
            assert times.sum() <= 2 * min(30, int(0.2 * count))
            widths.append(bands.sum())
    assert 5 < np.mean(widths) < 12  # two of 0 to 10, less what falls together


def test_masks_are_drawn_anew_at_each_step():
    echo = Echo(2, 4, 0, make_mesh(fsdp=1), MASKS)
    rows = {
        "tokens": jnp.ones((1, 4), int),
        "mels": jnp.arange(6656.0).reshape(1, 1, 104, 64),
        "frames": jnp.full((1, 1, 13), 8),
    }
    first, second = echo(0, rows)["mels"], echo(1, rows)["mels"]
    assert (first != second).any()
    assert (first[0] != first[1]).any()  # of one batch, too
