"""A callback of your own: hooks around the step. All parameters of its constructor are keys of its entry in `callbacks`."""

import jaxmodels


class StopWhenGood(jaxmodels.Callback):
    """Ends a run when a metric of the validation split has been good enough several times in a row."""

    def __init__(self, metric: str, above: float, times: int = 2):
        """
        Args:
          metric: name on the validation split.
          above: value that counts as good.
          times: evaluations in a row.
        """
        self.metric, self.above, self.times, self.in_a_row = metric, above, times, 0

    def on_evaluate(self, run, step, split, values):
        if split != "validation":
            return
        self.in_a_row = self.in_a_row + 1 if values[self.metric] > self.above else 0
        values["good_in_a_row"] = float(self.in_a_row)  # written with the other metrics
        if self.in_a_row == self.times:
            run.stop(f"{self.metric} is above {self.above}")

    def state(self):  # stored in each checkpoint, so that a resumed run counts on
        return {"in_a_row": self.in_a_row}

    def restore(self, state):
        self.in_a_row = state["in_a_row"]
