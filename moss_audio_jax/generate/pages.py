"""Which pages of the cache hold what: taken as tokens come, shared, and kept for reuse.

A page whose tokens are all in the cache is known by a key of all tokens up to its end, sound
included. A prompt that begins with pages that are known takes them instead of running their tokens
again. Pages that nobody uses are kept until others need the space, the longest unused first.

numpy only; one `Pages` for each group of devices.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence, Set

import numpy as np

from moss_audio_jax.data.batch import Example
from moss_audio_jax.generate.hearing import Piece
from moss_audio_jax.models.cache import PAGE


class Pages:
    """The pages of one group, each free, in use, or idle: known, but used by nobody.

    Args:
      count: how many there are.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = [*range(count - 1, -1, -1)]
        self._users = [0] * count
        self._key: dict[int, bytes] = {}
        self._page: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # the longest unused first
        self.promised = 0  # pages that running answers may still take

    @property
    def available(self) -> int:
        """Pages that may be promised."""
        return len(self._free) + len(self._idle) - self.promised

    @property
    def used(self) -> int:
        return self.count - len(self._free) - len(self._idle)

    def known(self, keys: Sequence[bytes], coming: Set[bytes] = frozenset()) -> list[int]:
        """The pages of the first keys, as far as they are known; -1 for those that are `coming`."""
        pages: list[int] = []
        for key in keys:
            if key not in self._page and key not in coming:
                break
            pages.append(self._page.get(key, -1))
        return pages

    def promise(self, shared: Sequence[int], more: int) -> bool:
        """Takes pages that are known and promises `more`; False if too few are left."""
        idle = sum(page in self._idle for page in shared)
        if self.available - idle < more:
            return False
        for page in shared:
            self._users[page] += 1
            self._idle.pop(page, None)
        self.promised += more
        return True

    def take(self) -> int:
        """One of the pages that were promised."""
        self.promised -= 1
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._page[self._key.pop(page)]
        self._users[page] = 1
        return page

    def learn(self, page: int, key: bytes) -> None:
        """From now on a page is known, all of whose tokens are in the cache."""
        if key not in self._page:
            self._page[key] = page
            self._key[page] = key

    def release(self, pages: Sequence[int], promised: int) -> None:
        """Gives back an answer's pages, and what it was promised and did not take."""
        self.promised -= promised
        for page in reversed(pages):  # so that a beginning is kept longer than what follows it
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._key:
                    self._idle[page] = None
                else:
                    self._free.append(page)


def marks_of(example: Example, pieces: Sequence[Piece], audio_token_id: int) -> np.ndarray:
    """What each token of a prompt is, sound included: uint64 [L, 3].

    `pieces`: of its clips, by `sound_of`.
    """
    marks = text_marks(example.ids)
    sound = np.flatnonzero(example.ids == audio_token_id)
    if len(sound):
        counts = [piece.tokens for piece in pieces]
        marks[sound, 0] = np.concatenate([np.arange(n) for n in counts])
        of_piece = np.array([np.frombuffer(piece.digest, np.uint64) for piece in pieces])
        marks[sound, 1:] = np.repeat(of_piece, counts, axis=0)
    return marks


def text_marks(ids: np.ndarray) -> np.ndarray:
    marks = np.zeros((len(ids), 3), np.uint64)
    marks[:, 0] = ids
    return marks


def page_keys(marks: np.ndarray, before: Sequence[bytes] = ()) -> list[bytes]:
    """A key for each whole page of tokens, [L, 3] as `marks_of` makes them.

    `before`: the keys of the first pages, if they are known already.
    """
    keys = list(before)
    for page in range(len(keys), len(marks) // PAGE):
        content = hashlib.blake2b(keys[-1] if keys else b"", digest_size=16)
        content.update(marks[page * PAGE : (page + 1) * PAGE].tobytes())
        keys.append(content.digest())
    return keys
