"""Models as services: the engine that generates for many requests at once, and the HTTP service over it.

app = jaxmodels.serving.app(["runs/digits"])  # an ASGI application, to mount in another
"""

import importlib


def __getattr__(name):
    if name == "app":
        return importlib.import_module("jaxmodels.serving.application").app
    raise AttributeError(f"module 'jaxmodels.serving' has no attribute {name!r}")
