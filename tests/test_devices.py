"""The table of accelerators is consistent in itself and with JAX's."""

from types import SimpleNamespace

import jax
import pytest

from moss_audio_jax import devices
from moss_audio_jax.devices import TPUS
from moss_audio_jax.train import metrics


@pytest.mark.parametrize("name", TPUS)
def test_numbers_of_a_generation_agree_with_one_another(name):
    device = TPUS[name]
    assert 0.95 < device.usable / device.hbm < 1.01
    assert device.links == 2 * device.dimensions  # a torus
    # Whole matrix units of 128 x 128 multiply and add at every tick.
    units = device.peak / (2 * 128 * 128 * device.clock)
    assert units == pytest.approx(round(units), rel=0.01)


# JAX's name of each device, and the number of a chip's TensorCores in it.
@pytest.mark.parametrize(
    ("kind", "name", "cores"),
    [
        ("TPU v4", "v4", 2),
        ("TPU v5 lite", "v5e", 1),
        ("TPU v5e", "v5e", 1),
        ("TPU v5", "v5p", 2),
        ("TPU v5p", "v5p", 2),
        ("TPU v6 lite", "v6e", 1),
        ("TPU v6e", "v6e", 1),
        ("TPU7", "tpu7x", 1),
        ("TPU7x", "tpu7x", 1),
    ],
)
def test_a_device_is_what_jax_counts_as_one(kind, name, cores):
    info = pytest.importorskip("jax._src.pallas.mosaic.tpu_info", exc_type=ImportError)
    version = info.chip_version_from_device_kind(kind)
    core = info.get_tpu_info_for_chip(version, cores)  # its numbers are those of one TensorCore
    device = devices.of(kind)
    assert device is TPUS[name]
    assert device.peak == pytest.approx(cores * core.bf16_ops_per_second, rel=0.01)
    assert device.hbm == pytest.approx(cores * core.hbm_capacity_bytes, rel=0.02)
    # JAX gives v5p's memory 2.46 TB/s, its data sheet 2.765.
    assert device.hbm_bandwidth == pytest.approx(cores * core.mem_bw_bytes_per_second, rel=0.13)
    assert device.devices_per_chip == version.num_physical_tensor_cores_per_chip / cores


@pytest.mark.parametrize(
    ("kind", "peak", "bandwidth"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12, 1.555e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 2.039e12),
        ("NVIDIA A100-PG509-200", 312e12, None),
        ("NVIDIA H100 80GB HBM3", 989e12, 3.35e12),
        ("NVIDIA H200", 989e12, 4.8e12),
    ],
)
def test_gpus_are_told_apart_by_the_longest_name(kind, peak, bandwidth):
    device = devices.of(kind)
    assert (device.peak, device.hbm_bandwidth) == (peak, bandwidth)


def test_a_cpu_has_no_peak():
    assert devices.of("cpu") is None


def test_the_training_log_counts_devices_and_not_chips(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="TPU7x")])
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert metrics._peak_flops() == 4 * 2307e12  # four chips, by their data sheet
