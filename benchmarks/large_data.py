"""Start-up time and memory of data that stays in its files, for 10⁴, 10⁵ and 10⁶ rows or files, as a Markdown table.

    python benchmarks/large_data.py

Synthetic rows (a text of about 150 bytes, one of ten labels) are written into a temporary folder: 3 GB of disk and 10⁶ inodes for the default. Each line is
measured in two processes of its own. The first start builds the index, the second reads it. Memory is the peak resident memory over that after all imports,
with the mapped pages of the index; it is that of both opening the data and reading. Seconds are CPU seconds of the process (user and system). Examples
are read in shuffled order, tokenized, in one thread; from Parquet and compressed files with data.shuffle_window=4, unless the line says otherwise. Linux
only.
"""

import argparse
import csv
import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

TEXT = {"sequence_length": 128, "tokenizer": "byte", "group_cache_mb": 32.0}
WORDS = [f"word{i}" for i in range(1000)]
SHARDS = 4
GROUP = 5000  # rows in a row group of Parquet
WINDOW = 4


def rows(count):
    """Yield text and label of each row."""
    chosen = np.random.default_rng(0).integers(0, len(WORDS), (1000, 20))
    texts = [" ".join(WORDS[i] for i in part) for part in chosen]
    return ((f"{i} {texts[i % 1000]}", f"label{i % 10}") for i in range(count))


def shards(count):
    """Yield the number and the rows of each shard."""
    everything, size = rows(count), -(-count // SHARDS)
    return ((shard, [row for _, row in zip(range(size), everything, strict=False)]) for shard in range(SHARDS))


def as_json(part):
    return b"".join(b'{"text": "%s", "label": "%s"}\n' % (text.encode(), label.encode()) for text, label in part)


def write_jsonl(folder, count):
    for shard, part in shards(count):
        (folder / f"{shard}.jsonl").write_bytes(as_json(part))


def write_gzip(folder, count):
    for shard, part in shards(count):
        (folder / f"{shard}.jsonl.gz").write_bytes(gzip.compress(as_json(part), 1))


def write_zstd(folder, count):
    import zstandard

    for shard, part in shards(count):
        content = as_json(part)
        frames = [zstandard.ZstdCompressor().compress(content[i : i + 2**20]) for i in range(0, len(content), 2**20)]
        (folder / f"{shard}.jsonl.zst").write_bytes(b"".join(frames))


def write_csv(folder, count):
    for shard, part in shards(count):
        with open(folder / f"{shard}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *part])


def write_parquet(folder, count):
    import pyarrow
    import pyarrow.parquet

    for shard, part in shards(count):
        texts, labels = zip(*part, strict=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": labels}), folder / f"{shard}.parquet", row_group_size=GROUP)


def write_webdataset(folder, count):
    for shard, part in shards(count):
        with open(folder / f"{shard}.tar", "wb") as file:
            for i, row in enumerate(part):
                content, info = as_json([row]), tarfile.TarInfo(f"{i:07}.json")
                info.size = len(content)
                file.write(info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512))
            file.write(bytes(1024))


def write_array_record(folder, count):
    from array_record.python.array_record_module import ArrayRecordWriter

    for shard, part in shards(count):
        writer = ArrayRecordWriter(str(folder / f"{shard}.array_record"), "group_size:1")
        for row in part:
            writer.write(as_json([row]))
        writer.close()


def write_images(folder, count):
    from PIL import Image

    content = io.BytesIO()
    Image.new("L", (8, 8), 100).save(content, "png")
    for label in range(10):
        (folder / f"label{label}").mkdir()
    original = folder
    for i in range(count):
        path = folder / f"label{i % 10}" / f"{i:07}.png"
        if i % 30_000 < 10:  # file systems allow some 60,000 links of a file
            path.write_bytes(content.getvalue())
            original = path
        else:
            os.link(original, path)


FORMATS = {
    "jsonl": (write_jsonl, "jsonl:{}/*.jsonl", {"indexed": True}, None),
    "csv_rows": (write_csv, "csv_rows:{}/*.csv", {"indexed": True}, None),
    "jsonl, gzip": (write_gzip, "jsonl:{}/*.jsonl.gz", {}, WINDOW),
    "jsonl, zstd": (write_zstd, "jsonl:{}/*.jsonl.zst", {}, WINDOW),
    "parquet": (write_parquet, "parquet:{}", {}, WINDOW),
    "parquet, all rows shuffled": (write_parquet, "parquet:{}", {"group_cache_mb": 1.0}, None),  # less than two row groups fit
    "webdataset": (write_webdataset, "webdataset:{}", {"text_column": "json.text", "label_column": "json.label"}, None),
    "array_record": (write_array_record, "array_record:{}", {}, None),
    "images": (write_images, "images:{}", {"size": 8, "channels": 1}, None),
}


def memory(field):
    """Return a field of /proc/self/status, in MiB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024


def measure(name, folder, examples):
    """Open the data set of a format, read some examples, and print what it took as JSON."""
    _, source, keys, window = FORMATS[name]
    for module in ("pyarrow.parquet", "zstandard", "array_record.python.array_record_module"):
        __import__(module)
    from jaxmodels.data import loader
    from jaxmodels.data.registry import find, open_dataset

    find(source)
    has_groups = "group_cache_mb" in str(find(source)[0].__signature__)
    options = keys if name == "images" else {k: v for k, v in TEXT.items() if k != "group_cache_mb" or has_groups} | keys
    before = memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    started, cpu = time.perf_counter(), time.process_time()
    train = open_dataset(source.format(folder), options, None).splits["train"]
    opened = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu, "opening": memory("VmHWM") - before}
    batches = loader.TrainingBatches(train, 50, examples // 50, seed=0, shuffle=True, window=window)
    cpu = time.process_time()
    for step in range(len(batches)):
        _ = batches[step]
    rate = examples / (time.process_time() - cpu)
    print(json.dumps(opened | {"peak": memory("VmHWM") - before, "rate": rate, "rows": len(train)}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10**4, 10**5, 10**6])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--examples", type=int, default=5000)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return measure(*arguments.child, arguments.examples)
    print("| format | rows | first start, CPU s | second start, CPU s | first start, peak MiB | second start, peak MiB | index, MiB | examples per CPU s |")
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.formats:
        for count in arguments.rows:
            with tempfile.TemporaryDirectory() as temporary:
                folder, cache = Path(temporary, "data"), Path(temporary, "cache")
                folder.mkdir()
                FORMATS[name][0](folder, count)
                command = [sys.executable, __file__, "--child", name, str(folder), "--examples", str(arguments.examples)]
                environment = os.environ | {"JAXMODELS_CACHE_DIR": str(cache), "JAX_PLATFORMS": "cpu"}
                first, second = (json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout) for _ in range(2))
                size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) / 2**20
                figures = f"{first['cpu']:.2f} | {second['cpu']:.2f} | {first['peak']:.0f} | {second['peak']:.0f} | {size:.1f} | {second['rate']:,.0f}"
                print(f"| {name} | {count:,} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
