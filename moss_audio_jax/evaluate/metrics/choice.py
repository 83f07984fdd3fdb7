"""Multiple choice: the strict rule, and the official rules of the benchmarks' scripts.

The strict rule finds the choice that an answer names, by its letter, its text or both. An answer
that names none or several is unparsed, and so wrong. `words_match` (MMAU, MMAR) and `LastLetter`
(MMSU) reproduce the official rules, with their oddities.
"""

from __future__ import annotations

import collections
import re
import string
import unicodedata
from collections.abc import Sequence

# --- strict --------------------------------------------------------------------------------------

_LETTER = r"[A-Za-z]"
_NAMED = r"(?:option|choice|answer|选项|选择)"
_BARE = re.compile(rf"(?:{_NAMED}\s*)?[\[(【]?\s*({_LETTER})\s*[\])】]?\s*[.:,、]?", re.IGNORECASE)
# A letter that is separated from the text after it: "B. text", "(B) text", "Option B: text".
_LED = re.compile(
    rf"(?:{_NAMED}\s*)?(?:[\[(【]\s*({_LETTER})\s*[\])】]\s*[.:]?|({_LETTER})\s*[.):、]|({_LETTER})\s+-)"
    r"\s*(\S.*)",
    re.IGNORECASE | re.DOTALL,
)
# "B text": counts only with the choice's own text.
_NEXT = re.compile(r"([A-Z])\s+(\S.*)", re.DOTALL)
_BECAUSE = re.compile(r"([A-Z]),?\s+(?:because|since|as)\b", re.IGNORECASE)
_SAYS = re.compile(
    r"(?:\b(?:final |correct |right |best |most suitable ){0,6}(?:answer|option|choice)"
    r"(?: (?:is|would be|should be)\b|\s*:)(?: (?:option|choice)\b)?\s*:?"
    r"|\bI (?:would )?(?:choose|pick|select)\b(?: (?:option|choice)\b)?"
    r"|答案(?:是|为|选|[:])|选(?=[\s(]?[A-Z]))(?=\s*([^\n]{1,2000}))",
    re.IGNORECASE,
)
_WRAPPED = re.compile(
    r"(?:\*(.+)\*|__(.+)__|`(.+)`|\"(.+)\"|'(.+)'|“(.+)”|‘(.+)’"
    r"|\$?\\boxed\{(.+)\}\$?|\\text\{(.+)\}|<answer>(.+)</answer>)[.,;:!]?",
    re.DOTALL,
)


def read_choice(answer: str, choices: Sequence[str]) -> str | None:
    """The choice that an answer names, or None if that is not clear.

    An answer may name it by a letter ("B", "(b)", "B.", "Option B"), by its text, or by both
    ("B. text"); after "The answer is" or similar words; on the first or last line of a longer
    answer; and in quotes, bold or \\boxed{}. It is not clear if readings differ: a letter with
    another choice's text, two answers, or "A" if "A" is also the text of another choice.

    Args:
      answer: without its thinking.
      choices: 2 to 26 texts; equal ones count as one.

    Returns:
      The text from `choices`.
    """
    # Joins white space, because several patterns would try each way to divide a run of it in two.
    lines = (" ".join(line.split()) for line in unicodedata.normalize("NFKC", answer).split("\n"))
    answer = "\n".join(filter(None, lines))
    if not any("**" in choice for choice in choices):
        answer = answer.replace("**", "").strip()
    if not answer:
        return None
    table = _Choices(choices)
    lines = [line for line in answer.split("\n") if line.strip()]
    attempts = (
        lambda: [table.exactly(answer)],
        lambda: [table.stated(match[1]) for match in _SAYS.finditer(answer)],
        lambda: [table.exactly(line) for line in {lines[0], lines[-1]}],
        lambda: [table.led(answer)],
    )
    for attempt in attempts:
        named = set().union(*attempt())
        if named:
            # -1 stands for a reading that contradicts itself.
            return choices[named.pop()] if len(named) == 1 and -1 not in named else None
    return None


def listed(prompt: str) -> list[str]:
    """The choices that a prompt lists, one a line: "A. text"."""
    return re.findall(r"^[A-Z]\. (.*)$", prompt, re.MULTILINE)


def choice_by_letter(answer: str, choices: Sequence[str]) -> str | None:
    """The text of the choice that an answer names only by its letter; None otherwise.

    A rule that compares texts needs it instead of "B" or "The answer is (B)".
    """
    choice = read_choice(answer, choices)
    return None if choice is None or _words(choice) <= _words(answer) else choice


def same_choice(parsed: str | None, answer: str) -> bool:
    """Whether the choice that was read is the right one, or has the same text."""
    return parsed is not None and _folded(parsed) == _folded(answer)


class _Choices:
    """Readings of a piece of text; each is the set of indices of choices that it may name."""

    def __init__(self, choices: Sequence[str]) -> None:
        self._texts = [_folded(choice) for choice in choices]
        self._loose: dict[str, set[int]] = collections.defaultdict(set)
        # Some files have the letters in the choices: "(A) dog".
        labelled = [
            re.fullmatch(rf"\({letter}\)\s*(.+)|{letter}[.)]\s+(.+)", text)
            for letter, text in zip(string.ascii_lowercase, self._texts, strict=False)
        ]
        for index, text in enumerate(self._texts):
            self._loose[_trimmed(text)].add(self._first(index))
            if len(labelled) == len(self._texts) and all(labelled):
                self._loose[_trimmed(labelled[index][1] or labelled[index][2])].add(
                    self._first(index)
                )

    def exactly(self, piece: str) -> set[int]:
        """Reads a piece that is only a letter, a choice's text, or a letter and its text."""
        forms = [piece.strip()]
        while len(forms) < 10 and (match := _WRAPPED.fullmatch(forms[-1])) is not None:
            forms.append(next(group for group in match.groups() if group).strip())
        found = set()
        for form in forms:
            found |= self._text(form) | self._letter(_BARE.fullmatch(form))
            for pattern in (_LED, _NEXT):
                if match := pattern.fullmatch(form):
                    *letters, rest = match.groups()
                    text = self._text(rest)
                    letter = self._index(next(letter for letter in letters if letter))
                    if text and letter is not None:
                        found |= {letter} if letter in text else {-1}
                    elif text and pattern is _LED:
                        found.add(-1)  # "E. text", but there are four choices
        if -1 in found and self._text(forms[0]):
            return self._text(
                forms[0]
            )  # the whole piece is a choice, which only seems to start with a letter
        return found

    def led(self, piece: str) -> set[int]:
        """Reads a letter with other words after it, unless those name another choice."""
        match = _LED.fullmatch(piece)
        if not match:
            return set()
        letter = self._index(next(group for group in match.groups()[:3] if group))
        rest = match[4]
        if letter is None or self._others(rest, letter):
            return {-1}
        return {letter}

    def stated(self, piece: str) -> set[int]:
        """Reads what follows "the answer is": a line, its first sentence, or a letter and why."""
        piece = piece.strip()
        sentence = re.split(r"(?<=[^\s.])[.。;](?=\s|$)", piece)[0]
        found = self.exactly(piece) | self.exactly(sentence)
        if not found:
            found = self.led(piece) | self._letter(_BECAUSE.match(piece))
        return found

    def _index(self, letter: str) -> int | None:
        # Ignoring case, [A-Z] also matches letters of other alphabets, such as a dotted capital I.
        index = string.ascii_uppercase.find(letter.upper())
        return self._first(index) if 0 <= index < len(self._texts) else None

    def _letter(self, match: re.Match[str] | None) -> set[int]:
        index = self._index(match[1]) if match else None
        return set() if index is None else {index}

    def _text(self, piece: str) -> set[int]:
        folded = _folded(piece)
        if folded in self._texts:
            return {self._texts.index(folded)}
        # Choices that differ only in punctuation need an exact match.
        trimmed = _trimmed(folded)
        return self._loose.get(trimmed, set()) if trimmed else set()

    def _first(self, index: int) -> int:
        """The index of the first of equal choices."""
        return self._texts.index(self._texts[index])

    def _others(self, rest: str, own: int) -> bool:
        """Whether words name a choice other than `own`, by its text or by a single capital."""
        folded = _folded(rest)
        for index, text in enumerate(self._texts):
            if self._first(index) == own or text in self._texts[own]:
                continue
            if re.search(rf"(?<!\w){re.escape(text)}(?!\w)", folded):
                return True
        capitals = re.findall(r"(?<![\w'])([B-HJ-Z]|[AI](?!\s+[a-z]))(?![\w'#])", rest)
        return any(self._index(c) not in (None, own) for c in capitals)


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _trimmed(folded: str) -> str:
    return folded.strip(" .,;:!?。、\"'`“”‘’")


# --- official ------------------------------------------------------------------------------------


def words_match(answer: str, prediction: str, choices: Sequence[str]) -> bool:
    """MMAU's and MMAR's rule: the prediction has every word of the right answer, and no word that
    only wrong choices have.

    A letter alone is therefore wrong, order and repetition do not count, and other words are
    allowed.
    """
    true, said = _words(answer), _words(prediction)
    wrong: set[str] = set()
    for choice in choices:
        wrong |= _words(choice) - true
    return bool(said) and true <= said and not said & wrong


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


class LastLetter:
    """MMSU's rule, which depends on the order of rows.

    The letter is the first character if it is one of A to D, else the last but one ("The answer is
    A."). An answer with neither is not counted at all; an empty one, or "None", gets the letter of
    the row before it.
    """

    def __init__(self) -> None:
        self._last: str | None = None

    def read(self, response: str | None) -> str | None:
        """The letter of the next row; None if the script skips it (or fails, on the first row)."""
        if response is None:
            return None
        response = response.strip().replace("\n", "")
        if response and response != "None":
            found = next((c for c in (response[0], response[-2:-1]) if c in [*"ABCD"]), None)
            if found is None:
                return None
            self._last = found
        return self._last


def letter_is_right(letter: str, answer: str, choices: Sequence[str]) -> bool:
    """Whether MMSU's letter is that of a choice with the answer's text."""
    index = "ABCD".index(letter)
    return index < len(choices) and choices[index] == answer
