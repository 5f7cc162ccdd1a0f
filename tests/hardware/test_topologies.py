"""Names of topologies."""

import re

import pytest

from jaxmodels.errors import ConfigError
from jaxmodels.hardware import topologies


@pytest.mark.parametrize(
    "name, grid, slices, devices",
    [
        # docs.cloud.google.com/tpu/docs/v5p, /v4, /v5e, /v6e and /tpu7x: their tables of configurations.
        ("v5p-8", (2, 2, 1), 1, 4),
        ("v5p-32", (2, 2, 4), 1, 16),
        ("v5p-64", (2, 4, 4), 1, 32),
        ("v5p-128", (4, 4, 4), 1, 64),
        ("v5p-256", (4, 4, 8), 1, 128),
        ("v5p-512", (4, 8, 8), 1, 256),
        ("v5p-1024", (8, 8, 8), 1, 512),
        ("v5p-2048", (8, 8, 16), 1, 1024),
        ("v5p-4096", (8, 16, 16), 1, 2048),
        ("v5p-12288", (16, 16, 24), 1, 6144),
        ("v4-4096", (8, 16, 16), 1, 2048),
        ("tpu7x-128", (4, 4, 4), 1, 128),
        ("v5e-8", (2, 4), 1, 8),
        ("v5litepod-32", (4, 8), 1, 32),
        ("v6e-256", (16, 16), 1, 256),
        # Google's xpk has these.
        ("v5p-384", (4, 4, 12), 1, 192),
        ("v5p-1280", (4, 8, 20), 1, 640),
        ("v5p-4608", (12, 12, 16), 1, 2304),
        ("v5p:4x4x4", (4, 4, 4), 1, 64),
        ("v6e:8x8", (8, 8), 1, 64),
        ("4xv5p-128", (4, 4, 4), 4, 256),
        ("2xv6e:4x4", (4, 4), 2, 32),
        ("h100x8", (8,), 1, 8),
        ("2xh200x8", (8,), 2, 16),
        ("a100x4", (4,), 1, 4),
    ],
)
def test_names_of_topologies(name, grid, slices, devices):
    found = topologies.parse(name)
    assert (found.name, found.grid, found.slices, found.devices) == (name, grid, slices, devices)
    assert found.chips * found.chip.devices_per_chip == found.devices


@pytest.mark.parametrize(
    "name, message",
    [
        ("v5p-1000", "no slice of 1,000 TensorCores, 2 a chip; the nearest are v5p-896 and v5p-1024"),
        ("v6e-3", "no slice of 3 chips; the nearest are v6e-1 and v6e-4"),
        ("v5p-99999", "the nearest are v5p-12160 and v5p-12288"),
        ("v5p", "Did you mean 'v5p-8'?"),
        ("tpu7-128", "Did you mean 'tpu7x-128'?"),
        ("H100x8", "Did you mean 'h100x8'?"),
        ("v9:2x2", "v4, v5e, v5p, v6e, tpu7x, a100, h100, h200"),
        ("8x8", "written v5p-128"),
        ("v6e:", "written v5p-128"),
        ("v6e:8x8x8", "chips of v6e are in 2 dimensions, such as v6e:4x8"),
        ("v5p:0x4x4", "chips of v5p are in 3 dimensions, such as v5p:4x4x4"),
        ("0xv5p-8", "the number of slices must be 1 or more"),
        ("h100-8", "h100 is written such as h100x8"),
        ("v5px8", "v5p is written such as v5p-128 or v5p:4x4x4"),
        ("h100x16", "a node has 1 to 8 GPUs; several nodes have their number in front: 2xh100x8"),
        ("h100x0", "a node has 1 to 8 GPUs"),
    ],
)
def test_names_that_are_not_topologies(name, message):
    with pytest.raises(ConfigError, match="--topology=" + re.escape(name)) as error:
        topologies.parse(name)
    assert message in str(error.value)
