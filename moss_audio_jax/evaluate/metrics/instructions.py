"""MMAU-Pro's instruction following: whether an answer has the requested form."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Arguments = Mapping[str, Any]
# The arguments that the rules below read, and their types.
ARGUMENTS = {
    **dict.fromkeys(("N", "N1", "N2"), int | float),
    **dict.fromkeys(
        (
            "keywords",
            "forbidden_words",
            "keyword",
            "section_splitter",
            "postscript_marker",
            "start_phrase",
            "end_phrase",
        ),
        str,
    ),
}


def follows(task: str, arguments: Arguments | str | None, response: str, question: str) -> bool:
    """The official rule for one row; False for an unknown task.

    Only sentences are counted by our own rule, because the official one needs NLTK's model: a
    sentence ends with . ! or ? before a space and a capital, a digit or a quotation mark, or at the
    end.

    Args:
      task: `task_identifier`.
      arguments: `kwargs`, as a mapping or as its JSON.
      question: the row's question, which "Repeat Prompt" asks for.
    """
    if isinstance(arguments, str):
        arguments = json.loads(arguments) if arguments.strip() else {}
    given = {name: value for name, value in (arguments or {}).items() if value is not None}
    if task == "Repeat Prompt":
        return response.strip().lower().startswith(question.strip().lower())
    rule = _RULES.get(task)
    return rule is not None and bool(rule(response, given))


def sentences(text: str) -> int:
    pieces = re.split(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9])", text.strip())
    return len([piece for piece in pieces if piece.strip()])


def _words(text: str) -> int:
    return len(text.split())


def _capital_words(text: str) -> int:
    return sum(word.isupper() for word in text.split())


def _letters(text: str, kept: str = "") -> str:
    return re.sub(rf"[^a-zA-Z{kept}]", "", text).lower()


def _times(text: str, keyword: str) -> int:
    return len(re.findall(rf"\b{re.escape(keyword.lower())}\b", text.lower()))


def _sections(text: str, splitter: str) -> int:
    return len([part for part in text.strip().split(splitter) if part.strip()]) if splitter else -1


def _counted(name: str, count: Callable[[str], int]) -> dict[str, Callable[[str, Arguments], bool]]:
    return {
        f"{name} (at least)": lambda r, a: count(r) >= a.get("N", 0),
        f"{name} (at most)": lambda r, a: count(r) <= a.get("N", 0),
        f"{name} (range)": lambda r, a: a.get("N1", 0) <= count(r) <= a.get("N2", 999),
    }


def _placeholders(text: str) -> int:
    """The number of [texts in brackets] that the official pattern \\[[^\\]]+\\] finds."""
    # Behind the last "]" the pattern would search to the end from each "[".
    return len(re.findall(r"\[[^\]]+\]", text[: text.rfind("]") + 1]))


def _has_title(text: str) -> bool:
    """Whether the official pattern <<[^>]+>> matches anywhere."""
    pieces = text.split(">")
    return any(
        0 <= piece.find("<<") < len(piece) - 2 and following == ""
        for piece, following in itertools.pairwise(pieces[:-1])
    )


_RUN = re.compile(r"\s{2,}")


def _shortest(run: re.Match[str]) -> str:
    """White space as one character: a line break if it contains one."""
    return "\n" if "\n" in run[0] else " "


def _two(response: str) -> bool:
    parts = [part.lower().strip() for part in response.split("******")]
    return len(parts) == 2 and parts[0] != parts[1]


_RULES: dict[str, Callable[[str, Arguments], bool]] = {
    **_counted("Number Words", _words),
    **_counted("Number Sentences", sentences),
    **_counted("All-capital Words", _capital_words),
    "Include Keywords": lambda r, a: all(
        word.lower() in r.lower() for word in a.get("keywords", "").split(", ")
    ),
    "Forbidden Words": lambda r, a: (
        not any(word.lower() in r.lower() for word in a.get("forbidden_words", "").split(", "))
    ),
    "Keyword Frequency": lambda r, a: _times(r, a.get("keyword", "")) == a.get("N", 0),
    "Number Paragraphs": lambda r, a: _sections(r, "***") == a.get("N", 0),
    "Number Placeholder": lambda r, a: _placeholders(r) >= a.get("N", 0),
    "Number Bullets": lambda r, a: (
        len(re.findall(r"(?:^|\n)\s*\*\s+", _RUN.sub(_shortest, r))) == a.get("N", 0)
    ),
    "Minimum Number Highlighted Section": lambda r, a: (
        len(re.findall(r"\*([^*]+)\*", r)) >= a.get("N", 0)
    ),
    "Multiple Sections": lambda r, a: _sections(r, a.get("section_splitter", "")) == a.get("N", 0),
    "Title": lambda r, a: _has_title(r),
    "Postscript": lambda r, a: _letters(a.get("postscript_marker", "")) in _letters(r),
    "Start Checker": lambda r, a: _letters(r, " ").startswith(
        _letters(a.get("start_phrase", ""), " ")
    ),
    "End Checker": lambda r, a: _letters(r, " ").endswith(_letters(a.get("end_phrase", ""), " ")),
    "Two Responses": lambda r, a: _two(r),
    "All Uppercase": lambda r, a: r.isupper(),
    "All Lowercase": lambda r, a: r.islower(),
    "Quotation": lambda r, a: r.strip().startswith('"') and r.strip().endswith('"'),
    "No Commas": lambda r, a: "," not in r,
}
