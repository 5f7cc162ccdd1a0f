"""Start-up and speed of reading, compared with PyTorch and Hugging Face `datasets`, for 10⁴, 10⁵ and 10⁶ rows or files, as a Markdown table.

    python benchmarks/reading.py
    python benchmarks/reading.py --kinds table images --rows 10000 100000 --folder /tmp/reading      # some lines; the data is written once

Each figure is of a process of its own. `start` is its processor time (user and system) up to the first batch of 64, with all imports;
`peak` its peak resident memory, with mapped pages. The first start builds indexes and caches, the second reads them. Examples per processor second are
those of the batches after the first, in shuffled order, in one thread. PyTorch's side is a map-style dataset as its tutorials write them, in memory, read
by `DataLoader` without workers: rows are parsed by `json` and tokenized together, tables read by pandas, folders scanned as `ImageFolder` scans them,
JPEG files cropped as `RandomResizedCrop` crops them. `datasets` loads, and tokenizes with `map(batched=True)`. All use the same tokenizer file: BPE of
2,000 tokens, through the `tokenizers` library, and its threads. Needs torch, pandas and datasets. Linux only.
"""

import argparse
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

BATCH, LENGTH = 64, 64
WINDOW = (96, 24)
SIDE = 224


def texts(count):
    """Yield texts of 25 words of Python's documentation."""
    from pydoc_data.topics import topics

    words, draw = " ".join(topics[title] for title in sorted(topics)).split(), random.Random(0)
    for i in range(count):
        start = draw.randrange(len(words) - 25)
        yield f"{' '.join(words[start : start + 25])} {i}"


def write_tokenizer(folder):
    from jaxmodels.tokenizers.bpe import TokenizersTokenizer

    (folder / "tokenizer.json").write_text(TokenizersTokenizer.train(texts(20_000), 2000).to_json())


def write_jsonl(folder, count):
    with open(folder / "train.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text, "label": f"label{i % 10}"}) + "\n" for i, text in enumerate(texts(count)))


def write_table(folder, count):
    with open(folder / "train.csv", "w") as file:
        file.write("date," + ",".join(f"c{i}" for i in range(10)) + "\n")
        for start in range(0, count, 1000):
            values = np.random.default_rng(start).normal(size=(1000, 10))
            file.writelines(f"2020-01-01 {start + i}," + ",".join(f"{x:.6f}" for x in row) + "\n" for i, row in enumerate(values))


def write_images(folder, count):
    from large_data import write_images as write

    write(folder, count)


def write_text(folder, count):
    """Write a text of 200 bytes for each row."""
    with open(folder / "train.txt", "w") as file:
        file.writelines(text + "\n" for text in texts(count * 5 // 4))


def write_jpeg(folder, count):
    """Write images of 500 × 375 pixels."""
    from PIL import Image

    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 255, (30, 40, 3)).astype(np.uint8)).resize((500, 375), Image.Resampling.BICUBIC) for _ in range(20)]
    for i in range(count):
        (folder / f"label{i % 10}").mkdir(exist_ok=True)
        pictures[i % 20].save(folder / f"label{i % 10}" / f"{i:05}.jpg", quality=90)


# Each side: (folder, tokenizer) -> a function that returns the batch of a step


def ours(kind, folder, tokenizer):
    import jaxmodels.experiment.build  # noqa: F401  what a run imports before its data
    from jaxmodels.data import loader
    from jaxmodels.data.random_crop import RandomResizedCrop
    from jaxmodels.data.registry import open_dataset

    count = int(folder.name.rpartition("-")[2])
    text = {"sequence_length": LENGTH, "tokenizer": tokenizer, "holdout": 0.0}
    source, keys = {
        "jsonl": ("jsonl:{}/train.jsonl", text),
        "jsonl, indexed=False": ("jsonl:{}/train.jsonl", text | {"indexed": False}),
        "table": ("csv:{}/train.csv", {"lookback": WINDOW[0], "horizon": WINDOW[1], "rows": (count * 8 // 10, count // 10, count // 10)}),
        "images": ("images:{}", {"size": 8, "channels": 1, "holdout": 0.0}),
        "text": ("text:{}/train.txt", text),
        "jpeg": ("images:{}", {"size": SIDE, "holdout": 0.0}),
    }[kind]
    train, crop = open_dataset(source.format(folder), keys, None).splits["train"], RandomResizedCrop()
    cropped = (lambda *arguments: crop.read(*arguments, seed=0)) if kind == "jpeg" else None
    return loader.TrainingBatches(train, BATCH, 10**9, seed=0, shuffle=True, crop=cropped).__getitem__


def torchs(kind, folder, tokenizer):
    import torch

    if kind == "jsonl":
        import tokenizers

        coder, rows = tokenizers.Tokenizer.from_file(tokenizer), []
        with open(folder / "train.jsonl") as file:
            rows = [json.loads(line) for line in file]
        names = {name: i for i, name in enumerate(sorted({row["label"] for row in rows}))}
        coder.enable_padding(length=LENGTH)
        coder.enable_truncation(LENGTH)
        tokens = torch.tensor(
            [each.ids for start in range(0, len(rows), 1000) for each in coder.encode_batch_fast([r["text"] for r in rows[start : start + 1000]])]
        )
        items = torch.utils.data.TensorDataset(tokens, torch.tensor([names[row["label"]] for row in rows]))
    elif kind == "table":
        import pandas

        values = torch.tensor(pandas.read_csv(folder / "train.csv").drop(columns="date").values, dtype=torch.float32)
        train = values[: len(values) * 8 // 10]
        items = Windows((train - train.mean(0)) / train.std(0))
    elif kind in ("images", "jpeg"):
        items = Folder(folder, kind == "jpeg")
    elif kind == "text":
        import tokenizers

        coder = tokenizers.Tokenizer.from_file(tokenizer)
        lines, ids = (folder / "train.txt").read_text().splitlines(keepends=True), []
        for start in range(0, len(lines), 1000):
            ids.extend(i for each in coder.encode_batch_fast(lines[start : start + 1000]) for i in each.ids)
        tokens = torch.tensor(ids, dtype=torch.int32)
        items = [tokens[i : i + LENGTH + 1] for i in range(0, len(tokens) - LENGTH, LENGTH)]
    epochs = itertools.repeat(torch.utils.data.DataLoader(items, batch_size=BATCH, shuffle=True))
    batches = (batch for epoch in epochs for batch in epoch)
    return lambda step: next(batches)


class Windows:
    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values) - sum(WINDOW) + 1

    def __getitem__(self, i):
        return self.values[i : i + WINDOW[0]], self.values[i + WINDOW[0] : i + sum(WINDOW)]


class Folder:
    """What `torchvision.datasets.ImageFolder` does, with its `RandomResizedCrop`, or with `Resize`."""

    def __init__(self, folder, cropped):
        self.cropped, self.files = cropped, []
        for number, name in enumerate(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())):
            for place, _, names in sorted(os.walk(folder / name, followlinks=True)):
                self.files += [(os.path.join(place, file), number) for file in sorted(names) if file.lower().endswith((".jpg", ".png"))]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        import torch
        from PIL import Image

        path, label = self.files[i]
        with Image.open(path) as file:
            image = file.convert("RGB" if self.cropped else "L")
        if self.cropped:
            for _ in range(10):
                area = image.width * image.height * torch.empty(1).uniform_(0.08, 1.0).item()
                ratio = torch.exp(torch.empty(1).uniform_(np.log(3 / 4), np.log(4 / 3))).item()
                w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
                if w <= image.width and h <= image.height:
                    left, top = torch.randint(0, image.width - w + 1, (1,)).item(), torch.randint(0, image.height - h + 1, (1,)).item()
                    image = image.crop((left, top, left + w, top + h))
                    break
            image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)), label


def huggingface(kind, folder, tokenizer):
    import datasets

    datasets.disable_progress_bars()
    name, pattern = {"jsonl": ("json", "train.jsonl"), "table": ("csv", "train.csv"), "text": ("text", "train.txt")}[kind]
    rows = datasets.load_dataset(name, data_files=str(folder / pattern), split="train")
    if kind != "table":
        import tokenizers

        coder = tokenizers.Tokenizer.from_file(tokenizer)
    if kind == "jsonl":
        coder.enable_padding(length=LENGTH)
        coder.enable_truncation(LENGTH)
        names = {f"label{i}": i for i in range(10)}
        encode = lambda few: {"tokens": [e.ids for e in coder.encode_batch_fast(few["text"])], "label": [names[label] for label in few["label"]]}  # noqa: E731
        rows = rows.map(encode, batched=True, remove_columns=["text"])
    if kind == "text":

        def windows(few):
            joined = [i for each in coder.encode_batch_fast([text + "\n" for text in few["text"]]) for i in each.ids]
            return {"tokens": [joined[i : i + LENGTH + 1] for i in range(0, len(joined) - LENGTH, LENGTH)]}

        rows = rows.map(windows, batched=True, remove_columns=["text"])
    rows, order = rows.with_format("numpy"), np.random.default_rng(0)
    if kind == "table":
        starts = order.permutation(len(rows) - sum(WINDOW))
        return lambda step: [rows[int(i) : int(i) + sum(WINDOW)] for i in starts[step * BATCH % len(starts) :][:BATCH]]
    shuffled = order.permutation(len(rows))
    return lambda step: rows[shuffled[step * BATCH % len(rows) :][:BATCH]]


SIDES = {"jaxmodels": ours, "torch": torchs, "datasets": huggingface}
KINDS = {"jsonl": write_jsonl, "jsonl, indexed=False": write_jsonl, "table": write_table, "text": write_text, "images": write_images, "jpeg": write_jpeg}
ONLY = {"jsonl, indexed=False": ("jaxmodels",), "images": ("jaxmodels", "torch"), "jpeg": ("jaxmodels", "torch")}
TWICE = ("jaxmodels", "datasets")  # have caches


def measure(side, kind, folder, tokenizer, seconds):
    """Print what the start and some batches took, as JSON."""
    batch = SIDES[side](kind, Path(folder), tokenizer)
    batch(0)
    start = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    steps = 0
    while time.process_time() - start < seconds and steps < 10_000:
        steps += 1
        batch(steps)
    print(json.dumps({"start": start, "peak": peak, "rate": steps * BATCH / (time.process_time() - start)}))


def run(side, kind, data, tokenizer, cache, seconds):
    caches = {"JAXMODELS_CACHE_DIR": str(cache / "jaxmodels"), "HF_HOME": str(cache / "huggingface"), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--child", side, kind, str(data), str(tokenizer), "--seconds", str(seconds)]
    done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10**4, 10**5, 10**6])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--folder", help="of the data, which is written where it is missing, and of the caches; a temporary one by default")
    parser.add_argument("--seconds", type=float, default=1.0, help="processor time of the batches that are read")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return measure(*arguments.child, arguments.seconds)
    print("| kind | rows | side | first start, CPU s | second start, CPU s | first, peak MiB | second, peak MiB | examples per CPU s |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(arguments.folder or temporary)
        root.mkdir(exist_ok=True)
        if not (root / "tokenizer.json").exists():
            write_tokenizer(root)
        for kind in arguments.kinds:
            for count in arguments.rows if kind != "jpeg" else [5000]:
                data = root / f"{KINDS[kind].__name__.removeprefix('write_')}-{count}"
                if not data.exists():
                    data.mkdir()
                    KINDS[kind](data, count)
                for side in ONLY.get(kind, SIDES):
                    if side not in arguments.sides:
                        continue
                    with tempfile.TemporaryDirectory(dir=root) as cache:
                        found = [run(side, kind, data, root / "tokenizer.json", Path(cache), arguments.seconds) for _ in range(1 + (side in TWICE))]
                    seconds, peaks = ([f"{each[name]:{form}}" for each in found] + [""] for name, form in (("start", ".2f"), ("peak", ",.0f")))
                    print(f"| {kind} | {count:,} | {side} | {seconds[0]} | {seconds[1]} | {peaks[0]} | {peaks[1]} | {found[-1]['rate']:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
