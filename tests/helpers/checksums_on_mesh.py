"""Print the checksums of arrays in several shardings over eight simulated devices, as JSON: sharding -> path -> checksum."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxmodels.parallel.mesh import simulate_devices
from jaxmodels.runs import checksums


def arrays() -> dict[str, np.ndarray]:
    """Arrays below and above the size up to which NumPy computes the checksum."""
    random = np.random.default_rng(0)
    return {
        "float32": random.standard_normal((512, 16, 16), np.float32),
        "bfloat16": random.standard_normal((512, 256), np.float32).astype(jnp.bfloat16),
        "int32": random.integers(-(2**31), 2**31 - 1, (256, 1024), np.int32),
        "int8": random.integers(-128, 127, (1 << 17,), np.int8),
        "bool": random.random((1 << 17,)) < 0.5,
        "small": random.standard_normal((16, 8), np.float32),
        "scalar": np.int32(7),
    }


if __name__ == "__main__":
    simulate_devices(8)
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    layouts = {
        "one device": lambda _: SingleDeviceSharding(jax.devices()[3]),
        "replicated": lambda _: NamedSharding(mesh, PartitionSpec()),
        "rows": lambda x: NamedSharding(mesh, PartitionSpec(("x", "y")) if x.ndim else PartitionSpec()),
        "both": lambda x: NamedSharding(mesh, PartitionSpec(*("y", "x")[: x.ndim])),
    }
    print(json.dumps({name: checksums.of({path: jax.device_put(x, layout(x)) for path, x in arrays().items()}) for name, layout in layouts.items()}))
