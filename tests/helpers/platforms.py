"""Trace functions as for a platform that is not there."""

import contextlib
import types

import numpy as np

from jaxmodels.parallel import layout as layout_lib


@contextlib.contextmanager
def traced_as(platform):
    """What is traced inside is for one device of the platform: `cpu`, `gpu` or `tpu`."""
    device = types.SimpleNamespace(platform=platform)
    with layout_lib.use(layout_lib.Layout(types.SimpleNamespace(devices=np.array([device], object), size=1))):
        yield
