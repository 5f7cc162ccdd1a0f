"""Rates and capacities of accelerator chips, from their makers' pages.

Sources, by the names in `Chip.source`:

- `tpu/…`: docs.cloud.google.com/tpu/docs/…, one page for each generation: FLOP/s, memory, bandwidths (its link bandwidths are of a whole chip, both ways).
- `book`: jax-ml.github.io/scaling-book/tpus: bandwidth of one torus link one way, of a chip to its host and between slices; a core's vector unit has
  8 × 128 lanes of four ALUs.
- `libtpu`: memory that the compiler lets a program use, as its out-of-memory error states (0.0.42.1 and 0.0.52 agree to 0.01 GiB).
- `tpu_info`: jax/_src/pallas/mosaic/tpu_info.py: cores of a chip, names of devices.
- `nvidia/…`: nvidia.com/data-center/…, the SXM column without sparsity; the network is that of a DGX: one adapter for each GPU. The float32 rate there counts
  a fused multiply-add as two operations, and here as one.

A TPU's clock is its FLOP/s over what its matrix units do in a cycle: v4 and v5p have two cores of four units of 128 × 128, v5e one such core. Google states
1.05 GHz for v4 (arxiv.org/abs/2304.01433, table 4), which agrees. v6e and tpu7x have units of 256 × 256; two of them a core are not enough for the compiler's
cycle estimates of large products, so four are assumed.
"""

import dataclasses

_GiB, _GB = 2**30, 10**9
_LANES = 8 * 128 * 4  # operations a cycle of one core's vector unit


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip. All figures are of the whole chip, also where a program sees it as two devices.

    Attributes:
      name: as in a topology's name.
      platform: `tpu` or `gpu`.
      memory_bytes: available to a program.
      flops_per_second: dense bfloat16 products summed in float32.
      clock_hz: unit of the TPU compiler's cycle estimates; None for a GPU.
      vector_rate: elementwise float32 operations a second.
      memory_bandwidth: bytes a second between the chip and its memory.
      link_bandwidth: bytes a second sent over one link: a TPU has two links for each dimension of its torus, a GPU one to the node's switch.
      torus_dimensions: of a slice's network; 0 where a switch joins all chips of a node.
      ring_multiple: a dimension of a slice closes to a ring if this divides its size; others are lines (0 without a torus).
      network_bandwidth: bytes a second sent to other slices or nodes.
      host_bandwidth: bytes a second between the chip and its host's memory, one way.
      devices_per_chip: devices that a program sees.
      cores_per_chip: cores that Google's slice names count (`v5p-128` has 64 chips); 1 where they count chips.
      device_kinds: its names in `jax.Device.device_kind`.
      source: where the figures are from.
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
        """Peak FLOP/s of one device."""
        return self.flops_per_second / self.devices_per_chip

    @property
    def vector_rate_per_device(self) -> float:
        """Elementwise operations a second of one device."""
        return self.vector_rate / self.devices_per_chip

    @property
    def bandwidth_per_device(self) -> float:
        """Memory bandwidth of one device, in bytes a second."""
        return self.memory_bandwidth / self.devices_per_chip

    @property
    def memory_per_device(self) -> int:
        """Memory of one device, in bytes."""
        return self.memory_bytes // self.devices_per_chip


def _tpu(name, memory, flops, clock, hbm, link, torus, network, host, devices, cores, kinds, source) -> Chip:
    """A row of the table: memory in GiB, rates in 10¹² FLOP/s, GHz and GB/s; a torus as its dimensions and the size that closes them."""
    vectors = clock * 1e9 * cores * _LANES
    rates = flops * 1e12, clock * 1e9, vectors, hbm * 1e9, link * 1e9, *torus, network * 1e9, host * 1e9
    return Chip(name, "tpu", int(memory * _GiB), *rates, devices, cores, kinds, f"tpu/{name}, book, libtpu, tpu_info{source}")


def _gpu(name, memory, flops, vectors, hbm, link, network, host, kind, source) -> Chip:
    """A row of the table: memory in GB, rates in 10¹² operations a second and GB/s."""
    rates = flops * 1e12, None, vectors * 1e12, hbm * 1e9, link * 1e9, 0, 0, network * 1e9, host * 1e9
    return Chip(name, "gpu", memory * _GB, *rates, 1, 1, (kind,), source)


# fmt: off
_TABLE = (
    # name    memory    TFLOP/s clock  HBM  link   torus  network host devices cores  device kinds
    _tpu("v4",    30.75,     275, 1.05, 1228, 45, (3, 4),  6.25,  16, 1, 2, ("TPU v4",), ""),  # one device, as megacore, which the compiler is asked for
    _tpu("v5e",   15.75,     197, 1.5,   819, 45, (2, 16), 3.125, 16, 1, 1, ("TPU v5 lite", "TPU v5e"), ""),
    _tpu("v5p",   95.73,     459, 1.75, 2765, 90, (3, 4),  6.25,  16, 1, 2, ("TPU v5", "TPU v5p"), ""),
    _tpu("v6e",   31.24,     918, 1.75, 1638, 90, (2, 16), 12.5,  32, 1, 1, ("TPU v6 lite", "TPU v6e"), ""),
    _tpu("tpu7x", 2 * 94.74, 2307, 2.2, 7380, 90, (3, 4),  12.5,  32, 2, 2, ("TPU7x",), "; the host's bandwidth is not stated: as v6e's"),
    # name   memory TFLOP/s vector HBM link network host device kind
    _gpu("a100", 80,  312,  9.75, 2039, 300, 25, 32, "NVIDIA A100-SXM4-80GB", "nvidia/a100 (80GB SXM), nvidia/dgx-a100 (200 Gb/s a GPU)"),
    _gpu("h100", 80,  989, 33.5,  3350, 450, 50, 64, "NVIDIA H100 80GB HBM3", "nvidia/h100 (SXM), nvidia/dgx-h100 (400 Gb/s a GPU)"),
    _gpu("h200", 141, 989, 33.5,  4800, 450, 50, 64, "NVIDIA H200", "nvidia/h200 (SXM), nvidia/dgx-h200 (400 Gb/s a GPU)"),
)
# fmt: on

CHIPS = {chip.name: chip for chip in _TABLE}


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip with a `jax.Device.device_kind`, or None if it is unknown."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)
