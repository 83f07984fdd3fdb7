"""Rows that are seen several times."""

import jax.numpy as jnp
import numpy as np
import pytest

from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.train.echo import Echo


def run(steps, seed=0, batch=8, fresh=2, kept=32):
    """Which rows each step sees; rows are counted from 0 as they are made."""
    echo = Echo(batch, kept, seed, make_mesh(fsdp=1))
    seen = []
    for step in range(steps):
        made = jnp.arange(step * fresh, (step + 1) * fresh)
        rows = {"tokens": jnp.tile(made[:, None], (1, 4)), "mels": made[:, None, None] * 10.0}
        drawn = echo(step, rows)
        assert drawn["tokens"].shape == (batch, 4)
        np.testing.assert_array_equal(drawn["mels"][:, 0, 0], drawn["tokens"][:, 0] * 10.0)
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
