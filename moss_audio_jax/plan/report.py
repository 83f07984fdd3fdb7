"""A plan as a table, as a picture of memory, and as JSON."""

from __future__ import annotations

import html
from typing import Any

from moss_audio_jax.devices import GIB
from moss_audio_jax.plan.compile import FLAGS
from moss_audio_jax.plan.estimate import METHOD, Plan, between_slices, by_kind

_COLORS = {
    "parameters": "#4477aa",
    "optimizer": "#66ccee",
    "batch": "#bbbbbb",
    "gradients": "#ccbb44",
    "activations": "#228833",
    "temporaries": "#ee6677",
}


def as_json(plan: Plan, dcn: float | None = None) -> dict[str, Any]:
    """The plan as a JSON object; bytes are of one device, FLOPs and tokens of all devices.

    Args:
      dcn: see `between_slices`.
    """
    estimate = None
    if plan.estimate:
        estimate = {
            "step_seconds": plan.estimate.seconds,
            "mfu": plan.estimate.mfu,
            "method": METHOD,
        }
    return {
        "topology": plan.topology.name,
        "chips": plan.topology.chips,
        "fits": plan.fits,
        "hbm_bytes": plan.memory.usable,
        "peak_bytes": plan.memory.peak,
        "tokens_per_step": plan.tokens,
        "model_flops_per_step": plan.flops,
        "slices": plan.topology.slices,
        "collectives": by_kind(plan.collectives),
        "between_slices": between_slices(plan, dcn) if plan.topology.slices > 1 else None,
        "compile_seconds": plan.compile_seconds,
        "estimate": estimate,
        "compiler_flags": plan.compiler_flags,
    }


def table(plan: Plan, dcn: float | None = None) -> str:
    """The plan as lines of text."""
    memory = plan.memory
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one"
    rows = memory.parts()
    rows |= {"peak": memory.peak, "usable": memory.usable, "margin": memory.margin}
    slices = f"{plan.topology.slices} x " if plan.topology.slices > 1 else ""
    lines = [
        f"{slices}{plan.topology.name}: {'fits' if plan.fits else 'DOES NOT FIT'}",
        f"  mesh {mesh}; {plan.rows} rows of {plan.length} tokens; remat {plan.remat}",
        "  memory of one device",
        *(f"    {name:<13}{readable(size):>11}" for name, size in rows.items()),
        f"  a step: {plan.tokens:,} tokens, {plan.flops / 1e12:,.1f} model TFLOP",
        f"  compiled in {plan.compile_seconds:.0f} s; {plan.kernels} Pallas kernel(s)",
        f"  {FLAGS}: {plan.compiler_flags or 'none; launch/xla_flags.py in a clone has some'}",
    ]
    for kind, entry in sorted(by_kind(plan.collectives).items()):
        lines.append(
            f"  {kind}: {entry['count']:,} a step, {readable(entry['bytes'])} a device, of which "
            f"{readable(entry['exposed_bytes'])} overlap no compute"
        )
    lines += [f"  warning: {warning}" for warning in plan.warnings]
    if plan.estimate:
        e = plan.estimate
        lines += [
            f"  modelled step {e.seconds:.3g} s (compute {e.compute:.3g}, kernels {e.kernels:.3g}, "
            f"exposed collectives {e.exposed:.3g}), MFU {e.mfu:.1%}",
            f"  method: {METHOD}",
        ]
        if plan.topology.slices > 1:
            lines += _between(between_slices(plan, dcn))
    elif plan.refusal:
        lines.append(f"  the compiler says: {plan.refusal}")
    return "\n".join(lines)


def _between(found: dict[str, Any]) -> list[str]:
    kinds = ", ".join(
        f"{kind} {readable(size)}" for kind, size in found["bytes_per_device_by_kind"].items()
    )
    return [
        f"  between slices: {readable(found['bytes_per_device'])} a device and step ({kinds}), "
        f"{readable(found['bytes_per_slice'])} a slice",
        f"  they take {found['seconds']:.3g} s at {found['dcn_bytes_per_second'] / 1e9:g} GB/s a "
        "device; what of it overlaps compute is not modelled, and the step above has none of it",
    ]


def picture(plan: Plan) -> str:
    """An SVG: a bar of one device's memory by owner, and a line at the usable memory."""
    width, left, top, height = 760, 20, 44, 46
    memory = plan.memory
    scale = (width - 2 * left) / max(memory.peak, memory.usable, 1)
    parts, x = [], float(left)
    for index, (name, size) in enumerate(memory.parts().items()):
        span = max(0, size) * scale
        label = f"{name} {readable(size)}"
        column, row = index % 3, index // 3
        lx, ly = left + 240 * column, top + height + 34 + 22 * row
        parts.append(
            f'<rect x="{x:.1f}" y="{top}" width="{span:.1f}" height="{height}" '
            f'fill="{_COLORS[name]}"><title>{label}</title></rect>'
            f'<rect x="{lx}" y="{ly - 11}" width="12" height="12" fill="{_COLORS[name]}"/>'
            f'<text x="{lx + 18}" y="{ly}">{label}</text>'
        )
        x += span
    end = left + memory.usable * scale
    title = html.escape(
        f"{plan.topology.name}, one device: peak {readable(memory.peak)} of "
        f"{readable(memory.usable)}, {'fits' if plan.fits else 'does not fit'}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="160" '
        f'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="{left}" y="26" font-size="15">{title}</text>{"".join(parts)}'
        f'<line x1="{end:.1f}" x2="{end:.1f}" y1="{top - 8}" y2="{top + height + 8}" '
        f'stroke="#000" stroke-width="2"/></svg>\n'
    )


def readable(n: float) -> str:
    """Bytes for people."""
    return f"{n / GIB:.2f} GiB" if abs(n) >= GIB / 10 else f"{n / 2**20:.2f} MiB"
