"""The engine of a model that generates."""

from collections.abc import Mapping

from jaxmodels.inference.run import Run
from jaxmodels.serving import engine
from jaxmodels.serving.served import Engine, Running


def make_engine(run: Run, how: Running, adapters: Mapping[str, str]) -> Engine:
    """Return the compiled and running engine of a run, and of the adapters of its children, name -> run."""
    made = engine.for_run(run, slots=how.slots, context=how.context, queue=how.queue, precision=how.precision, adapters=adapters)
    made.warm()
    return made.start()
