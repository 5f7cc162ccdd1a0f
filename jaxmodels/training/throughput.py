"""Throughput, MFU and peak memory of a run."""

from typing import Any

import jax

from jaxmodels.experiment.flops import model_flops
from jaxmodels.hardware.chips import chip_of


class Usage:
    """What a run takes of its chips, where they are known.

    Attributes:
      record: for the manifest: the chip, and the model's FLOPs in a step; empty for chips that are not known.
    """

    def __init__(self, experiment: Any, mesh: jax.sharding.Mesh):
        chip = chip_of(mesh.devices.flat[0].device_kind)
        self._mesh, self._peak_flops = mesh, chip.flops_per_device * mesh.size if chip else None
        self.record = {"chip": chip.name, "model_flops_per_step": model_flops(experiment).all} if chip else {}

    def rates(self, steps_per_second: float) -> dict[str, float]:
        """`mfu`, the model's FLOPs over what all chips can do in that time (of bfloat16 products), and `memory_peak_bytes`.

        Nothing for chips that are not known.
        """
        if not self.record:
            return {}
        memory = peak_memory(self._mesh)
        mfu = self.record["model_flops_per_step"] * steps_per_second / self._peak_flops
        return {"mfu": mfu} | ({"memory_peak_bytes": memory} if memory is not None else {})


def peak_memory(mesh: jax.sharding.Mesh) -> int | None:
    """The most bytes that were in use at a time since this process began, on that of its devices where they were most; None where JAX does not tell."""
    told = [device.memory_stats() or {} for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return max((stats["peak_bytes_in_use"] for stats in told if "peak_bytes_in_use" in stats), default=None)
