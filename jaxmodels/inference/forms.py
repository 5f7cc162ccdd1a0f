"""What people send and read, as a model's arrays and back: image files to labels, texts to classes, sentences to tagged spans, tables to forecasts.

A form is prepared as the data of training and evaluation was: by the features, the tokenizer, the names and the statistics of the run. What the run does
not record is not guessed: such inputs are refused, and the message names what is missing.
"""

from jaxmodels.errors import ConfigError
from jaxmodels.inference.form import Form
from jaxmodels.inference.image_form import ImageForm
from jaxmodels.inference.run import Run
from jaxmodels.inference.table_form import TableForm
from jaxmodels.inference.text_forms import TagForm, TextForm


def form_of(run: Run, *, max_pixels: int = 67_108_864) -> Form:
    """Return the form of a run's task.

    Args:
      run: a loaded run.
      max_pixels: of an image file, width times height; `data.max_pixels` of the run, if that is less.

    Raises:
      ConfigError: the task has none; or the run does not record what its inputs need.
    """
    name = run.config["task"]["name"]
    if name in ("classify", "several_classes", "contrast"):
        return ImageForm(run, max_pixels)
    if name == "forecast":
        return TableForm(run)
    if name in ("classify_text", "several_classes_of_text", "regress_text"):
        return TextForm(run)
    if name == "tag":
        return TagForm(run)
    raise ConfigError(f"the task {name!r} has no form of inputs and outputs beside arrays: jaxmodels.load(RUN).predict(batch) takes these.")
