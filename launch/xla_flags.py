"""Prints compiler flags for one generation of chips, for a shell to evaluate.

    eval "$(python launch/xla_flags.py v5e)"

They are starting points: measure them on your run, and drop those that do not help. Flags that the
environment already sets come last, so they take precedence. A flag that libtpu or XLA does not know
ends the process at its first use of JAX, so check this file first after an upgrade.
"""

from __future__ import annotations

import sys

# libtpu: collectives run during matrix products instead of between them.
_OVERLAP = {
    "--xla_enable_async_all_gather=true": "fsdp gathers the next layer's weights early",
    "--xla_tpu_overlap_compute_collective_tc=true": "compute continues while a collective runs",
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true": "gradients of `data` overlap too",
    "--xla_tpu_data_parallel_opt_different_sized_ops=true": "also if their sizes differ",
}
# Newer libtpu (0.0.51) refuses these on all chips except v5e, and warns of wrong results there.
_FUSION = {
    "--xla_tpu_enable_async_collective_fusion=true": "collectives run inside fused computations",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true": "all-gathers of fsdp as well",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true": "spread over several of them",
}
# Larger tiles for one operation than the compiler's default allows
# (docs/findings/2026-11-28-modelled-train-step.md).
_TILES_64 = {"--xla_tpu_scoped_vmem_limit_kib=65536": "products near the matrix unit's peak"}
_TILES_96 = {"--xla_tpu_scoped_vmem_limit_kib=98304": "the same; v6e has 128 MiB of VMEM"}
# XLA on GPUs. The layers are a scan, which is a while loop; without the last flag nothing overlaps
# between layers.
_GPU = {
    "--xla_gpu_enable_latency_hiding_scheduler=true": "collectives are scheduled beside compute",
    "--xla_gpu_enable_pipelined_all_gather=true": "the next layer's weights are gathered early",
    "--xla_gpu_enable_pipelined_reduce_scatter=true": "the last layer's gradients are reduced late",
    "--xla_gpu_enable_pipelined_all_reduce=true": "the same for replicas",
    "--xla_gpu_enable_while_loop_double_buffering=true": "two layers of the scan are in flight",
}

# Generation -> (environment variable, {flag: why}).
FLAGS: dict[str, tuple[str, dict[str, str]]] = {
    "v4": ("LIBTPU_INIT_ARGS", _OVERLAP),
    "v5e": ("LIBTPU_INIT_ARGS", _OVERLAP | _FUSION | _TILES_64),
    "v5p": ("LIBTPU_INIT_ARGS", _OVERLAP | _TILES_64),
    "v6e": ("LIBTPU_INIT_ARGS", _OVERLAP | _TILES_96),
    "tpu7x": ("LIBTPU_INIT_ARGS", _OVERLAP),
    "gpu": ("XLA_FLAGS", _GPU),
}


def main(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0] not in FLAGS:
        print(f"error: expected one of {', '.join(FLAGS)}; got {argv}", file=sys.stderr)
        return 2
    variable, flags = FLAGS[argv[0]]
    for flag, why in flags.items():
        print(f"# {flag}  {why}")
    print(f'export {variable}="{" ".join(flags)} ${{{variable}:-}}"')
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
