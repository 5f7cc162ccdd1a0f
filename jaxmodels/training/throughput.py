"""Throughput against the hardware: MFU and peak memory, on chips whose rates are known."""

import jax

from jaxmodels.experiment.flops import model_flops
from jaxmodels.hardware.chips import chip_of
from jaxmodels.training.callback import Callback


class Throughput(Callback):
    """Adds `mfu` and `memory_peak_bytes` to training metrics; records the chip and the model's FLOPs per step in the manifest.

    MFU is the model's FLOPs over what all chips can do in the same time in bfloat16 (Chowdhery et al. 2022, appendix B). On chips that
    `hardware.chips` does not list, nothing is added.
    """

    def __init__(self):
        self._flops_per_step = self._peak_flops = None

    def on_start(self, run):
        """Count the model's FLOPs."""
        chip = chip_of(run.mesh.devices.flat[0].device_kind)
        if chip is None:
            return
        self._flops_per_step, self._peak_flops = model_flops(run.experiment).all, chip.flops_per_device * run.mesh.size
        run.record({"chip": chip.name, "model_flops_per_step": self._flops_per_step})

    def on_log(self, run, step, values):
        """Add the figures to a line of training metrics."""
        if self._flops_per_step is None:
            return
        values["mfu"] = self._flops_per_step * values["steps_per_second"] / self._peak_flops
        if (memory := peak_memory(run.mesh)) is not None:
            values["memory_peak_bytes"] = memory


def peak_memory(mesh: jax.sharding.Mesh) -> int | None:
    """Return the largest number of bytes in use at a time on one of this process's devices; None where JAX does not report it."""
    stats = [device.memory_stats() or {} for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return max((each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each), default=None)
