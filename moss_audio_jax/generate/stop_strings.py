"""Stop strings: where a text ends, for a whole text or for a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def first_stop(text: str, stops: Sequence[str]) -> int:
    """Where the first stop string begins; the text's length if there is none."""
    return min((text.find(stop) for stop in stops if stop in text), default=len(text))


class UntilStop:
    """Passes text on up to the first stop string; holds back what may still become one."""

    def __init__(self, stops: Sequence[str], on_text: Callable[[str], None]) -> None:
        self._stops = stops
        self._on_text = on_text
        self._held = ""
        self._stopped = False

    def push(self, piece: str, last: bool = False) -> None:
        if self._stopped:
            return
        text = self._held + piece
        sure = first_stop(text, self._stops)
        self._stopped = sure < len(text)
        if not self._stopped and not last:
            sure = next(
                i
                for i in range(len(text) + 1)
                if i == len(text) or any(stop.startswith(text[i:]) for stop in self._stops)
            )
        self._held = text[sure:]
        if sure:
            self._on_text(text[:sure])

    @property
    def holds(self) -> bool:
        """Whether some text is held back."""
        return bool(self._held)
