"""What chips can do at best, from their makers' pages: the figures that a plan is measured against.

Sources, by the names that `Chip.source` gives:

- `tpu/…`: docs.cloud.google.com/tpu/docs/…, a page for each generation: FLOP/s, memory, bandwidths (those of links are there for a whole chip, both ways).
- `book`: jax-ml.github.io/scaling-book/tpus: what one link of a torus carries one way, and a chip to its host and on the network between slices.
- `libtpu`: what the compiler lets a program have of a device's memory, as it says when one does not fit (0.0.42.1 and 0.0.52 agree to 0.01 GiB).
- `tpu_info`: jax/_src/pallas/mosaic/tpu_info.py: cores of a chip, matrix units of a core, names of devices.
- `nvidia/…`: nvidia.com/data-center/…, the SXM column without sparsity; the network is that of a DGX: one adapter for each GPU.

A TPU's clock is its FLOP/s over what its matrix units do in a cycle: v4 and v5p two cores × four units × 128 × 128 × 2, v5e one core of these. Google
states v4's 1.05 GHz (arxiv.org/abs/2304.01433, table 4), and so it comes out. v6e and tpu7x have units of 256 × 256; the compiler's own estimates of
large products (`docs/estimates.md`) go above what two of them a core do once in a cycle, and stay below twice that, so twice that is taken.
"""

import dataclasses

_GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip; all figures are of the whole chip, also where a program sees it as two devices.

    Attributes:
      name: as in a topology's name.
      platform: `tpu` or `gpu`.
      memory_bytes: that a program can have.
      flops_per_second: dense, of bfloat16 products summed in float32.
      clock_hz: cycles a second, in which a TPU's compiler gives its estimates; None for a GPU.
      memory_bandwidth: bytes a second between the chip and its memory.
      link_bandwidth: bytes a second that leave by one link: a TPU has two for each dimension of its torus, a GPU one, to the node's switch.
      torus_dimensions: of the network of a slice; 0 where a switch joins all chips of a node.
      ring_multiple: a dimension of a slice whose size this divides is closed to a ring; others end in a last chip (0 where there is no torus).
      network_bandwidth: bytes a second that leave for other slices, or nodes.
      device_kinds: names that `jax.Device.device_kind` has for it.
      devices_per_chip: that a program sees.
      cores_per_chip: that Google's names of slices count (`v5p-128` has 64 chips); 1 where they count chips.
      matrix_unit: rows and columns of a TPU's matrix units; 0 for a GPU.
      host_bandwidth: bytes a second between the chip and its host's memory, one way.
      source: where the figures are from.
    """

    name: str
    platform: str
    memory_bytes: int
    flops_per_second: float
    clock_hz: float | None
    memory_bandwidth: float
    link_bandwidth: float
    torus_dimensions: int
    ring_multiple: int
    network_bandwidth: float
    device_kinds: tuple[str, ...]
    devices_per_chip: int
    cores_per_chip: int
    matrix_unit: int
    host_bandwidth: float
    source: str

    @property
    def flops_per_device(self) -> float:
        """Of one device, a second."""
        return self.flops_per_second / self.devices_per_chip

    @property
    def cores_per_device(self) -> int:
        """Two on chips of which a program sees both as one device."""
        return self.cores_per_chip // self.devices_per_chip

    @property
    def memory_per_device(self) -> int:
        """Bytes."""
        return self.memory_bytes // self.devices_per_chip


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            platform="tpu",
            memory_bytes=int(30.75 * _GiB),  # of 32
            flops_per_second=275e12,
            clock_hz=1.05e9,
            memory_bandwidth=1228e9,
            link_bandwidth=45e9,
            torus_dimensions=3,
            ring_multiple=4,
            network_bandwidth=6.25e9,
            device_kinds=("TPU v4",),
            devices_per_chip=1,  # as megacore, which the compiler is asked for
            cores_per_chip=2,
            matrix_unit=128,
            host_bandwidth=16e9,
            source="tpu/v4, book, libtpu, tpu_info",
        ),
        Chip(
            name="v5e",
            platform="tpu",
            memory_bytes=int(15.75 * _GiB),  # of 16
            flops_per_second=197e12,
            clock_hz=1.5e9,
            memory_bandwidth=819e9,
            link_bandwidth=45e9,
            torus_dimensions=2,
            ring_multiple=16,
            network_bandwidth=3.125e9,
            device_kinds=("TPU v5 lite", "TPU v5e"),
            devices_per_chip=1,
            cores_per_chip=1,
            matrix_unit=128,
            host_bandwidth=16e9,
            source="tpu/v5e, book, libtpu, tpu_info",
        ),
        Chip(
            name="v5p",
            platform="tpu",
            memory_bytes=int(95.73 * _GiB),  # of 96
            flops_per_second=459e12,
            clock_hz=1.75e9,
            memory_bandwidth=2765e9,
            link_bandwidth=90e9,
            torus_dimensions=3,
            ring_multiple=4,
            network_bandwidth=6.25e9,
            device_kinds=("TPU v5", "TPU v5p"),
            devices_per_chip=1,
            cores_per_chip=2,
            matrix_unit=128,
            host_bandwidth=16e9,
            source="tpu/v5p, book, libtpu, tpu_info",
        ),
        Chip(
            name="v6e",
            platform="tpu",
            memory_bytes=int(31.24 * _GiB),  # of 32
            flops_per_second=918e12,
            clock_hz=1.75e9,
            memory_bandwidth=1638e9,
            link_bandwidth=90e9,
            torus_dimensions=2,
            ring_multiple=16,
            network_bandwidth=12.5e9,
            device_kinds=("TPU v6 lite", "TPU v6e"),
            devices_per_chip=1,
            cores_per_chip=1,
            matrix_unit=256,
            host_bandwidth=32e9,
            source="tpu/v6e, book, libtpu, tpu_info",
        ),
        Chip(
            name="tpu7x",
            platform="tpu",
            memory_bytes=int(2 * 94.74 * _GiB),  # of 192
            flops_per_second=2307e12,
            clock_hz=2.2e9,
            memory_bandwidth=7380e9,
            link_bandwidth=90e9,
            torus_dimensions=3,
            ring_multiple=4,
            network_bandwidth=12.5e9,
            device_kinds=("TPU7x",),
            devices_per_chip=2,  # a core each; there is no megacore (tpu/tpu7x, "Dual-chiplet architecture")
            cores_per_chip=2,
            matrix_unit=256,
            host_bandwidth=32e9,  # as v6e's; not stated
            source="tpu/tpu7x, book, libtpu, tpu_info",
        ),
        Chip(
            name="a100",
            platform="gpu",
            memory_bytes=80 * 10**9,
            flops_per_second=312e12,
            clock_hz=None,
            memory_bandwidth=2039e9,
            link_bandwidth=300e9,
            torus_dimensions=0,
            ring_multiple=0,
            network_bandwidth=25e9,
            device_kinds=("NVIDIA A100-SXM4-80GB",),
            devices_per_chip=1,
            cores_per_chip=1,
            matrix_unit=0,
            host_bandwidth=32e9,
            source="nvidia/a100 (80GB SXM), nvidia/dgx-a100 (200 Gb/s a GPU)",
        ),
        Chip(
            name="h100",
            platform="gpu",
            memory_bytes=80 * 10**9,
            flops_per_second=989e12,
            clock_hz=None,
            memory_bandwidth=3350e9,
            link_bandwidth=450e9,
            torus_dimensions=0,
            ring_multiple=0,
            network_bandwidth=50e9,
            device_kinds=("NVIDIA H100 80GB HBM3",),
            devices_per_chip=1,
            cores_per_chip=1,
            matrix_unit=0,
            host_bandwidth=64e9,
            source="nvidia/h100 (SXM), nvidia/dgx-h100 (400 Gb/s a GPU)",
        ),
        Chip(
            name="h200",
            platform="gpu",
            memory_bytes=141 * 10**9,
            flops_per_second=989e12,
            clock_hz=None,
            memory_bandwidth=4800e9,
            link_bandwidth=450e9,
            torus_dimensions=0,
            ring_multiple=0,
            network_bandwidth=50e9,
            device_kinds=("NVIDIA H200",),
            devices_per_chip=1,
            cores_per_chip=1,
            matrix_unit=0,
            host_bandwidth=64e9,
            source="nvidia/h200 (SXM), nvidia/dgx-h200 (400 Gb/s a GPU)",
        ),
    )
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device that JAX gives, by its `device_kind`; None where it is not known here."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)
