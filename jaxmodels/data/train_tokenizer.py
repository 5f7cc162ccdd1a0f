"""Training of a tokenizer on text files."""

import os
from pathlib import Path

from jaxmodels.data import copies
from jaxmodels.data.files import find_files
from jaxmodels.data.reading import errors_of
from jaxmodels.data.skipping import Policy, Skipping
from jaxmodels.data.sources.documents import read_documents, survey
from jaxmodels.errors import ConfigError
from jaxmodels.tokenizers.factory import SMALLEST_BPE, make_tokenizer

_MEASURED = 10_000_000  # maximum characters that the summary is measured on


def train_tokenizer(
    paths: str,
    size: int,
    output: str,
    *,
    data_dir: str | None = None,
    text_column: str = "text",
    on_bad_example: Policy = "error",
    overwrite: bool = False,
) -> str:
    """Train a byte-level BPE tokenizer and write it to a file that `data.tokenizer` and the `tokenizers` library read.

    Args:
      paths: files, as `files.find_files` reads them; documents as of the source `text`.
      size: number of tokens: four special ones, 256 bytes, merges.
      output: file to write.
      data_dir: directory where relative paths are looked for after the working directory.
      text_column, on_bad_example: as of the source `text`.
      overwrite: whether an existing file is replaced.

    Returns:
      A summary in words.

    Raises:
      ConfigError: a file is missing or bad, the size out of range, or the output exists or cannot be written.
    """
    target = Path(output)
    if target.exists() and not overwrite:
        raise ConfigError(f"--output={output} exists; choose another file, or --overwrite.")
    if size < SMALLEST_BPE:
        raise ConfigError(f"--size={size}: byte-level BPE has at least {SMALLEST_BPE} tokens.")
    with errors_of(f"--input={paths}"):
        files, skipping = find_files(paths, data_dir, "--input"), Skipping(on_bad_example)
        copies.keep(files)
        corpus = survey({"train": lambda: read_documents(files, text_column)}, 0.0, skipping)["train"]
        tokenizer = make_tokenizer(f"bpe:{size}", corpus, data_dir)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(tokenizer.to_json(), encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        raise ConfigError(f"--output={output} cannot be written: {error}.") from error
    characters = tokens = documents = 0
    for text in corpus:
        documents += 1
        if characters < _MEASURED:
            text = text[: _MEASURED - characters]
            characters, tokens = characters + len(text), tokens + len(tokenizer.encode(text))
    fewer = f" (of the {size:,} requested; the text has no more pairs to merge)" if tokenizer.vocab_size < size else ""
    source = f"{documents:,} document{'s' * (documents > 1)} in {len(files):,} file{'s' * (len(files) > 1)}"
    return (
        f"{target}: {tokenizer.vocab_size:,} tokens{fewer}, from {source}. "
        f"{characters:,} characters are {tokens:,} tokens: {characters / tokens:.2f} characters a token." + "".join(f"\n{note}" for note in skipping.notes())
    )
