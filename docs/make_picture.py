"""Draws docs/run.svg: the terminal of a run of configs/cnn_digits.py, and its curves below.

python docs/make_picture.py
"""

import io
import re
import tempfile
from pathlib import Path

from rich.console import Console

import jaxmodels
from jaxmodels.experiment.build import build_experiment
from jaxmodels.runs.folder import RunFolder
from jaxmodels.training import summary, trainer

ROOT = Path(__file__).parent.parent
COLUMNS, HEIGHT, MARGIN = 124, 260, 80
COLOURS = {"train": "#8ab4f8", "validation": "#81c995"}


def record(workdir: Path) -> str:
    """Train, and return what the terminal showed as SVG."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=False)
    command = "jaxmodels train --config=configs/cnn_digits.py --workdir=runs/cnn_digits"
    console.print(f"$ {command}", highlight=False, soft_wrap=True)
    experiment = build_experiment(jaxmodels.load_config(str(ROOT / "configs" / "cnn_digits.py")))
    result = trainer.train(experiment, str(workdir), console=console)
    summary.print_summary(result, experiment, console)
    text = console.export_svg(title="jaxmodels").replace(str(workdir), "runs/cnn_digits")
    # Fonts of this machine, not of another server; and letters at their own distance, since the folder's name was shortened.
    return re.sub(r"@font-face \{.*?\}", "", re.sub(r' textLength="[^"]*"', "", text), flags=re.S)


def curve(lines: list[dict], key: str, left: float, width: float, top: float) -> str:
    """A plot of one metric over steps, for both splits."""
    points = {split: [(line["step"], line[key]) for line in lines if line["split"] == split] for split in COLOURS}
    last = max(step for part in points.values() for step, _ in part)
    values = [value for part in points.values() for _, value in part]
    low, high = min(values), max(values)
    x, y = lambda step: left + width * step / last, lambda value: top + HEIGHT * (high - value) / (high - low)
    parts = [f'<rect x="{left}" y="{top}" width="{width}" height="{HEIGHT}" fill="none" stroke="#5f6368"/>']
    label = '<text x="{}" y="{}" fill="#c5c8c6" font-family="monospace" font-size="18" text-anchor="{}">{}</text>'
    parts += [label.format(left - 8, top + 6, "end", f"{high:.3g}"), label.format(left - 8, top + HEIGHT, "end", f"{low:.3g}")]
    parts += [label.format(left + width / 2, top - 12, "middle", key), label.format(left + width, top + HEIGHT + 24, "end", f"step {last}")]
    for number, (split, colour) in enumerate(COLOURS.items()):
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points[split])
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="3"/>')
        parts.append(label.format(left + 12 + 110 * number, top + HEIGHT + 24, "start", split).replace("#c5c8c6", colour))
    return "".join(parts)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "cnn_digits"
        terminal = record(workdir)
        lines = RunFolder(workdir).metrics()
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', terminal).groups())
    half, top = (width - 3 * MARGIN) / 2, height + MARGIN
    plots = curve(lines, "loss", MARGIN, half, top) + curve(lines, "accuracy", 2 * MARGIN + half, half, top)
    total = top + HEIGHT + MARGIN
    ground = f'<rect y="{height - 10}" width="{width}" height="{total - height + 10}" fill="#292929" rx="8"/>'
    whole = re.sub(r'viewBox="[^"]*"', f'viewBox="0 0 {width:g} {total:g}"', terminal, count=1)
    (ROOT / "docs" / "run.svg").write_text(whole.replace("</svg>", f"{ground}{plots}</svg>"))


if __name__ == "__main__":
    main()
