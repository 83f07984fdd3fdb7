"""A budget as a table, and a picture of its goodput."""

from __future__ import annotations

import html
import math
from typing import Any

import numpy as np

from moss_audio_jax.plan.goodput import RUNS


def table(found: dict[str, Any]) -> str:
    """The budget as lines of text."""
    step, pod, parts = found["step"], found["pod"], found["flops_per_token"]
    total = sum(parts.values())
    shares = ", ".join(f"{name} {value / total:.0%}" for name, value in parts.items())
    read, each = pod["read_bytes_per_second"], pod["read_bytes_per_second_per_host"]
    lines = [
        f"{found['config']} on {found['topology']}: {found['tokens']:.3g} tokens; "
        f"{found['audio_hours']:,.0f} hours of audio",
        f"  step {step['seconds']:.3g} s, {step['rows_per_chip']:g} row(s) a chip, MFU "
        f"{step['mfu']:.0%} ({step['source']}); the same for any number of chips",
        f"  a token: {found['mix']['seconds']:.4f} s of audio, {total / 1e9:.1f} GFLOP ({shares}); "
        f"with padding {found['step_flops_per_place'] / 1e9:.1f}",
        f"  the run's tokens hold {found['audio_hours_in_tokens']:,.0f} hours of audio; one epoch "
        f"of the hours, without text rows, is {found['audio_hours_tokens']:.3g} tokens",
        f"  checkpoint {found['checkpoint_bytes'] / 1e9:,.1f} GB",
        "",
        f"  {'chips':>5}{'tokens/step':>13}{'days':>8}{'chip-days':>11}{'audio days':>12}"
        f"{'failure':>9}{'save':>9}  {'goodput':>8} {'5-95%':<16}{'expected':>9}"
        f"{'saved every':>13}",
        f"  {'every':>58}{'every':>9}{'':>36}{found['every_steps']:>7,} steps",
    ]
    for row in found["sizes"]:
        low, high = row["goodput_5_95"]
        lines.append(
            f"  {row['chips']:>5}{row['step_tokens']:>13.3g}{row['days']:>8.1f}"
            f"{row['chip_days']:>11,.0f}{row['audio_days']:>12.2f}{_time(row['mtbf_seconds']):>9}"
            f"{_time(row['interval_seconds']):>9}  {row['goodput']:>8.2%} "
            f"{f'{low:.2%}-{high:.2%}':<16}{row['goodput_expected']:>9.2%}"
            f"{row['goodput_as_configured']:>13.2%}"
        )
    lines += [
        "",
        f"  hosts of {pod['chips']} chips ({pod['hosts']}): {pod['cores']:.1f} cores for "
        f"{pod['audio_hours_per_second']:.2f} h of audio a second, {pod['cores_per_host']:.2f} a "
        "host",
        *(
            f"    {name:<5}{read[name] / 1e6:>9,.1f} MB/s, {each[name] / 1e6:.2f} a host; "
            f"{found['audio_hours_bytes'][name] / 1e12:,.1f} TB for the hours"
            for name in read
        ),
        "",
        "  rates (--assume KEY=VALUE)",
        *rates(found["assumed"]),
    ]
    return "\n".join(lines)


def rates(assumed: dict[str, Any]) -> list[str]:
    """Assumed rates as lines."""
    return [
        f"    {name:<28}{entry['value']:>10.5g} {entry['unit']:<12} {entry['source']}"
        for name, entry in assumed.items()
    ]


def picture(found: dict[str, Any]) -> str:
    """An SVG of goodput over chips: simulated with its spread, expected, and as configured."""
    rows = found["sizes"]
    floor = min(0.9, *(min(r["goodput_5_95"][0], r["goodput_as_configured"]) for r in rows))
    floor = math.floor(floor * 20) / 20
    first, last = rows[0]["chips"], rows[-1]["chips"]

    def x(row: dict[str, Any]) -> float:
        return 70 + 620 * math.log(row["chips"] / first) / math.log(last / first)

    def y(share: float) -> float:
        return 60 + 220 * (1 - share) / (1 - floor)

    parts = []
    for share in np.linspace(floor, 1, 5):
        parts.append(
            f'<line x1="70" x2="690" y1="{y(share):.1f}" y2="{y(share):.1f}" stroke="#ddd"/>'
            f'<text x="62" y="{y(share) + 4:.1f}" text-anchor="end">{share:.1%}</text>'
        )
    names = ("expected, save interval by Daly", f"saved every {found['every_steps']:,} steps")
    for index, key in enumerate(("goodput_expected", "goodput_as_configured")):
        color = ("#4477aa", "#ee6677")[index]
        points = " ".join(f"{x(row):.1f},{y(row[key]):.1f}" for row in rows)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>'
            f'<text x="{70 + 240 * index}" y="340" fill="{color}">{names[index]}</text>'
        )
    for row in rows:
        low, high = map(y, row["goodput_5_95"])
        parts.append(
            f'<line x1="{x(row):.1f}" x2="{x(row):.1f}" y1="{low:.1f}" y2="{high:.1f}" '
            f'stroke="#000"/><circle cx="{x(row):.1f}" cy="{y(row["goodput"]):.1f}" r="4">'
            f"<title>{row['goodput']:.2%}</title></circle>"
            f'<text x="{x(row):.1f}" y="302" text-anchor="middle">{row["chips"]:,}</text>'
        )
    title = html.escape(f"{found['config']}: goodput over chips, {found['tokens']:.3g} tokens")
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="760" height="356" '
        'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="20" y="26" font-size="15">{title}</text>{"".join(parts)}'
        f'<text x="500" y="340">dots: {RUNS} simulated runs, 5-95%</text></svg>\n'
    )


def _time(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
