"""Rates and capacities of accelerator chips, as published by their manufacturers.

Sources, by their names in `Chip.source`:

- `tpu/…`: docs.cloud.google.com/tpu/docs/…, one page for each generation: FLOP/s, memory, bandwidths (link bandwidths there are for a whole chip, in both directions).
- `book`: jax-ml.github.io/scaling-book/tpus: one-way bandwidth of a torus link, of a chip to its host and between slices; the vector unit of a core has
  8 × 128 lanes with four ALUs each.
- `libtpu`: memory available to a program, as stated in the compiler's out-of-memory error (0.0.42.1 and 0.0.52 agree to 0.01 GiB).
- `tpu_info`: jax/_src/pallas/mosaic/tpu_info.py: cores of a chip, device kinds.
- `nvidia/…`: nvidia.com/data-center/…, the SXM column without sparsity; the network is that of a DGX, with one adapter for each GPU. The float32 rate there counts
  a fused multiply-add as two operations; here it counts as one.

The clock of a TPU is its FLOP/s divided by the FLOPs of its matrix units in a cycle: v4 and v5p have two cores with four units of 128 × 128, v5e has one such core.
This agrees with the 1.05 GHz that Google states for v4 (arxiv.org/abs/2304.01433, table 4). v6e and tpu7x have units of 256 × 256. Two units for each core do not
explain the compiler's cycle estimates of large matrix products, so four are assumed.
"""

import dataclasses

_GiB, _GB = 2**30, 10**9
_LANES = 8 * 128 * 4  # operations per cycle of the vector unit of one core


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip. All figures are for the whole chip, even if a program sees it as two devices.

    Attributes:
      name: name as used in topologies, such as `v5e`.
      platform: `tpu` or `gpu`.
      memory_bytes: available to a program.
      flops_per_second: dense bfloat16 matrix products with float32 accumulation.
      clock_hz: clock of the TPU compiler's cycle estimates; None for a GPU.
      vector_rate: elementwise float32 operations per second.
      memory_bandwidth: bytes per second between the chip and its memory.
      link_bandwidth: bytes per second sent over one link. A TPU has two links for each torus dimension, a GPU has one to the switch of its node.
      torus_dimensions: number of torus dimensions of a slice; 0 if a switch connects the chips of a node.
      ring_multiple: a torus dimension is a ring if its size is a multiple of this, else a line; 0 without a torus.
      network_bandwidth: bytes per second sent to other slices or nodes.
      host_bandwidth: bytes per second between the chip and host memory, in one direction.
      devices_per_chip: number of devices that a program sees.
      cores_per_chip: cores per chip if slice names count cores (`v5p-128` has 64 chips); 1 if they count chips.
      device_kinds: values of `jax.Device.device_kind`.
      source: sources of the figures, see above.
    """

    name: str
    platform: str
    memory_bytes: int
    flops_per_second: float
    clock_hz: float | None
    vector_rate: float
    memory_bandwidth: float
    link_bandwidth: float
    torus_dimensions: int
    ring_multiple: int
    network_bandwidth: float
    host_bandwidth: float
    devices_per_chip: int
    cores_per_chip: int
    device_kinds: tuple[str, ...]
    source: str

    @property
    def flops_per_device(self) -> float:
        """Return the peak FLOP/s of one device."""
        return self.flops_per_second / self.devices_per_chip

    @property
    def vector_rate_per_device(self) -> float:
        """Return the elementwise operations per second of one device."""
        return self.vector_rate / self.devices_per_chip

    @property
    def bandwidth_per_device(self) -> float:
        """Return the memory bandwidth of one device, in bytes per second."""
        return self.memory_bandwidth / self.devices_per_chip

    @property
    def memory_per_device(self) -> int:
        """Return the memory of one device, in bytes."""
        return self.memory_bytes // self.devices_per_chip


def _tpu(name, memory, flops, clock, hbm, link, torus, network, host, devices, cores, kinds, source) -> Chip:
    """Return a row of the table: memory in GiB, rates in TFLOP/s, GHz and GB/s, `torus` as (torus_dimensions, ring_multiple)."""
    vectors = clock * 1e9 * cores * _LANES
    rates = flops * 1e12, clock * 1e9, vectors, hbm * 1e9, link * 1e9, *torus, network * 1e9, host * 1e9
    return Chip(name, "tpu", int(memory * _GiB), *rates, devices, cores, kinds, f"tpu/{name}, book, libtpu, tpu_info{source}")


def _gpu(name, memory, flops, vectors, hbm, link, network, host, kind, source) -> Chip:
    """Return a row of the table: memory in GB, rates in 10¹² operations per second and GB/s."""
    rates = flops * 1e12, None, vectors * 1e12, hbm * 1e9, link * 1e9, 0, 0, network * 1e9, host * 1e9
    return Chip(name, "gpu", memory * _GB, *rates, 1, 1, (kind,), source)


# fmt: off
_TABLE = (
    # name    memory    TFLOP/s clock  HBM  link   torus  network host devices cores  device kinds
    _tpu("v4",    30.75,     275, 1.05, 1228, 45, (3, 4),  6.25,  16, 1, 2, ("TPU v4",), ""),  # two cores as one device (megacore), which the compiler gets as an option
    _tpu("v5e",   15.75,     197, 1.5,   819, 45, (2, 16), 3.125, 16, 1, 1, ("TPU v5 lite", "TPU v5e"), ""),
    _tpu("v5p",   95.73,     459, 1.75, 2765, 90, (3, 4),  6.25,  16, 1, 2, ("TPU v5", "TPU v5p"), ""),
    _tpu("v6e",   31.24,     918, 1.75, 1638, 90, (2, 16), 12.5,  32, 1, 1, ("TPU v6 lite", "TPU v6e"), ""),
    _tpu("tpu7x", 2 * 94.74, 2307, 2.2, 7380, 90, (3, 4),  12.5,  32, 2, 2, ("TPU7x",), "; the host bandwidth is not published, v6e's is assumed"),
    # name   memory TFLOP/s vector HBM link network host device kind
    _gpu("a100", 80,  312,  9.75, 2039, 300, 25, 32, "NVIDIA A100-SXM4-80GB", "nvidia/a100 (80GB SXM), nvidia/dgx-a100 (200 Gb/s per GPU)"),
    _gpu("h100", 80,  989, 33.5,  3350, 450, 50, 64, "NVIDIA H100 80GB HBM3", "nvidia/h100 (SXM), nvidia/dgx-h100 (400 Gb/s per GPU)"),
    _gpu("h200", 141, 989, 33.5,  4800, 450, 50, 64, "NVIDIA H200", "nvidia/h200 (SXM), nvidia/dgx-h200 (400 Gb/s per GPU)"),
)
# fmt: on

CHIPS = {chip.name: chip for chip in _TABLE}


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip with this `jax.Device.device_kind`; None if it is unknown."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)
