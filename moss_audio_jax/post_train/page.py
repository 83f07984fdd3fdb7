"""WORKDIR/rollouts.html: what a run with rewards did, from its two logs, in one file.

A curve for each number of metrics.jsonl, and the answers over time to questions that came up more
than once. The logs of a large run are large: they are read line by line, and what is kept of them
does not grow with the run.
"""

from __future__ import annotations

import collections
import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from moss_audio_jax import files, timeline

LOG = "rollouts.jsonl"
PAGE = "rollouts.html"
_QUESTIONS, _TIMES, _ANSWERS = 40, 12, 4  # that are shown: of a run, of a question, of a time
_LETTERS = 700  # of an answer
_WIDTH, _HEIGHT, _POINTS = 320, 90, 400  # SVG units; points of a curve
_SECTIONS = (
    ("Rewards", ("reward", "eval_reward")),
    ("Answers", ("answer/",)),
    ("Policy", ("policy/", "loss", "grad_norm", "eval_loss")),
    ("Rollouts", ("rollout/",)),
    ("Seconds", ("time/",)),
)
_STYLE = """
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 14px; }
.curves svg { width: 100%; overflow: visible; }
.curves polyline { fill: none; stroke: #2f6fb3; stroke-width: 1.5; }
.curves circle { fill: #2f6fb3; }
.curves line { stroke: #ddd; }
.curves .value { fill: #777; }
details { border-bottom: 1px solid #e6e6e6; padding: 5px 0; }
summary b { color: #222; font-weight: 600; }
td.step, td.count, td.reward { white-space: nowrap; width: 1%; }
small { color: #777; }
"""


class _Answer(NamedTuple):
    """One of the answers of a step, and how many were the same."""

    line: Mapping[str, Any]
    count: int


def write_page(workdir: Path) -> None:
    """Writes the page; without rollouts there is none. Raises InputError if a file cannot be read
    or written."""
    if not (workdir / LOG).exists():
        return
    body = [
        '<p>Each curve is over steps. Its numbers are the first, the last, and the range. See "The '
        'run" in docs/post_train.md for what they mean.</p>'
    ]
    curves = _curves(workdir / "metrics.jsonl")
    for title, beginnings in _SECTIONS:
        mine = [name for name in sorted(curves) if name.startswith(beginnings)]
        if mine:
            body.append(_section(title, {name: curves.pop(name) for name in mine}))
    body.append(_answers(workdir / LOG))
    files.write_whole(workdir / PAGE, timeline.document(f"Rollouts: {workdir.name}", body, _STYLE))


# --- curves ------------------------------------------------------------------------------------


def _curves(log: Path) -> dict[str, list[tuple[int, float]]]:
    """{name: (step, value), ...} of all numbers."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in _lines(log):
        for name, value in row.items():
            if type(value) in (int, float):
                found.setdefault(name, []).append((row["step"], value))
    return found


def _section(title: str, curves: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Curves; what never changed is a list."""
    same = {
        name: points[0][1]
        for name, points in curves.items()
        if len({value for _, value in points}) == 1
    }
    drawn = "".join(_curve(name, points) for name, points in curves.items() if name not in same)
    rest = ", ".join(f"{escape(name)} {value:g}" for name, value in same.items())
    rest = f"<p><small>The same at every step: {rest}</small></p>" if same else ""
    return f'<section><h2>{title}</h2><div class="curves">{drawn}</div>{rest}</section>'


def _curve(name: str, points: Sequence[tuple[int, float]]) -> str:
    each = -(-len(points) // _POINTS)
    # Of a long run each point is the mean of some steps.
    parts = [points[at : at + each] for at in range(0, len(points), each)]
    points = [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]
    low, high = (end(value for _, value in points) for end in (min, max))
    first, last = points[0][0], points[-1][0]

    def at(step: int, value: float) -> tuple[float, float]:
        x = (step - first) / max(last - first, 1) * _WIDTH
        return x, 22 + (_HEIGHT - 4) * (1 - (value - low) / ((high - low) or 1.0))

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
    x, y = at(*points[-1])
    span = f"{points[0][1]:.4g} → {points[-1][1]:.4g}"
    bottom = 22 + _HEIGHT
    return (
        f'<svg viewBox="0 0 {_WIDTH} {bottom + 16}"><title>{escape(name)}: {span}</title>'
        f'<text y="12">{escape(name)}</text>'
        f'<text class="value" x="{_WIDTH}" y="12" text-anchor="end">{span}</text>'
        f'<line x1="0" x2="{_WIDTH}" y1="{bottom}" y2="{bottom}"/>'
        f'<polyline points="{line}"/><circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>'
        f'<text class="value" y="{bottom + 13}">step {first}</text>'
        f'<text class="value" x="{_WIDTH / 2}" y="{bottom + 13}" text-anchor="middle">'
        f"{low:.4g} to {high:.4g}</text>"
        f'<text class="value" x="{_WIDTH}" y="{bottom + 13}" text-anchor="end">{last}</text></svg>'
    )


# --- answers -----------------------------------------------------------------------------------


def _key(line: Mapping[str, Any]) -> tuple[str, str]:
    return line["row"], line["question"]


def _answers(log: Path) -> str:
    steps: dict[tuple[str, str], set[int]] = collections.defaultdict(set)
    for line in _lines(log):
        steps[_key(line)].add(line["step"])
    again = [key for key in steps if len(steps[key]) > 1]
    # The most often asked first; of equals those that came first.
    shown = sorted(again, key=lambda key: -len(steps[key]))[:_QUESTIONS]
    if not shown:
        return "<section><h2>Questions</h2><p>None came up more than once so far.</p></section>"
    kept: dict[tuple[str, str], dict[int, list]] = {key: {} for key in shown}
    times = {key: _spread(sorted(steps[key])) for key in shown}
    for line in _lines(log):
        if line["step"] in times.get(_key(line), ()):
            kept[_key(line)].setdefault(line["step"], []).append(line)
    parts = [_question(kept[key], len(steps[key])) for key in shown]
    return (
        f"<section><h2>Questions</h2><p>{len(again):,} of {len(steps):,} questions came up more "
        f"than once. Here are {len(shown)} of them, at up to {_TIMES} steps, with up to {_ANSWERS} "
        f"different answers of each. Click on one to open it.</p>{''.join(parts)}</section>"
    )


def _spread(steps: list[int]) -> set[int]:
    """Up to _TIMES of some steps, the first and the last among them."""
    last = min(_TIMES, len(steps)) - 1
    return {steps[round(number * (len(steps) - 1) / last)] for number in range(last + 1)}


def _question(by_step: Mapping[int, list], times: int) -> str:
    rows = []
    for step in sorted(by_step):
        lines = by_step[step]
        counts = collections.Counter(line["answer"] for line in lines)
        first = {line["answer"]: line for line in reversed(lines)}
        most = [_Answer(first[text], count) for text, count in counts.most_common(_ANSWERS)]
        head = (
            f'<td class="step" rowspan="{len(most)}">step {step}<br><small>mean {_mean(lines):.2f}'
            f", {len(counts)} different</small></td>"
        )
        for each in most:
            rows.append(f"<tr>{head}{_row(each)}</tr>")
            head = ""
    one = by_step[min(by_step)][0]
    start, end = (_mean(by_step[step]) for step in (min(by_step), max(by_step)))
    return (
        f"<details><summary><b>{start:.2f} → {end:.2f}</b> {escape(one['task'] or '')} "
        f"{escape(files.brief(one['question'], 120))} <small>{escape(one['id'])}, {times} "
        f"times</small></summary><p>{escape(one['question'])}<br><small>expected:</small> "
        f"{escape(one['expected'])}</p><table><tr><th>step</th><th>answers</th><th>reward</th>"
        f"<th>answer</th><th>why not 1</th></tr>{''.join(rows)}</table></details>"
    )


def _row(each: _Answer) -> str:
    text = each.line["answer"]
    if len(text) > _LETTERS:
        text = f"{text[:_LETTERS]} [... {len(text) - _LETTERS:,} characters]"
    parts = each.line["parts"].items()
    why = "\n".join(f"{name} {v:g}: {reason}" for name, (v, reason) in parts if v < 1)
    ended = each.line["finish_reason"]
    note = "" if ended == "stop" else f" <small>({escape(ended)})</small>"
    return (
        f'<td class="count">{each.count}</td><td class="reward">{each.line["reward"]:.2f}</td>'
        f"<td><bdi>{escape(text)}</bdi>{note}</td><td><small>{escape(why)}</small></td>"
    )


def _mean(lines: Sequence[Mapping[str, Any]]) -> float:
    return sum(line["reward"] for line in lines) / len(lines)


def _lines(log: Path) -> Iterator[dict[str, Any]]:
    """The objects of a log; a line that a killed run left half-written is passed over."""
    if log.exists():
        with files.open_regular(log) as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    yield json.loads(line)
