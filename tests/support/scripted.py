"""An engine that says what a test wants, in the engine's interface, for a server without one."""

from __future__ import annotations

from moss_audio_jax.errors import InputError
from moss_audio_jax.generate.engine import Output, Progress


class Scripted:
    """Keeps what is submitted; the test tells the answers.

    Attributes:
      prompts: {number: (prompt, told)} of those that have not ended.
      cancelled: the numbers that were cancelled.
      refusal: what `submit` raises, if anything.
      stuck: as `Service.stuck`.
    """

    def __init__(self, slots: int = 1) -> None:
        self.slots, self.dead, self.prompts, self.cancelled = slots, None, {}, []
        self.refusal: InputError | None = None
        self.stuck = False

    def submit(self, prompt, sampling, told, each_token=True) -> int:
        if self.dead is not None:
            raise self.dead
        if self.refusal is not None:
            raise self.refusal
        number = len(self.prompts) + len(self.cancelled) + 1
        self.prompts[number] = prompt, told
        return number

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)
        self.prompts.pop(number)

    def stats(self) -> dict[str, float]:
        return {"slots": self.slots, "running": len(self.prompts), "waiting": 0}

    def tell(self, number: int, ids: list[int], reason: str | None = None) -> None:
        told = self.prompts[number][1]
        told(Progress(number, ids, None if reason is None else Output(ids, reason)))
