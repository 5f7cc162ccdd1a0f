"""A tracker of your own: a callback that writes metrics somewhere. It runs in a thread of its own, and an error in it never ends a run."""

import jaxmodels


class Markdown(jaxmodels.Callback):
    """Appends a row of a Markdown table to a file in the run folder at each evaluation."""

    def __init__(self, *, file: str = "metrics.md"):
        """
        Args:
          file: name in the run folder.
        """
        self.file = file

    def on_start(self, run):
        if not run.resumed:
            (run.folder.path / self.file).write_text("| step | split | loss |\n|---|---|---|\n")

    def on_evaluate(self, run, step, split, values):
        with open(run.folder.path / self.file, "a") as file:
            file.write(f"| {step} | {split} | {values['loss']:.4f} |\n")
