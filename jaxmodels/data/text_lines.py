"""Lines of text files, and the records of comma-separated values (RFC 4180) in them. Blank lines are no rows, whatever the format."""

import csv
import io
from collections.abc import Iterable, Iterator

from jaxmodels.data.compressed import open_stream
from jaxmodels.errors import ConfigError

MAX_FIELD = 1 << 28  # characters of a field of comma-separated values; a quotation mark that nothing closes reaches the end of the file
csv.field_size_limit(MAX_FIELD)
_MARKS = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"PK\x03\x04": "a ZIP archive or a spreadsheet",
    b"\x1f\x8b": "compressed by gzip",
    b"PAR1": "a Parquet file",
}


def check_kind(head: bytes, path: str) -> None:
    """Raise ConfigError if the first bytes of a file show that it is no text in UTF-8."""
    found = next((kind for mark, kind in _MARKS.items() if head.startswith(mark)), None)
    if found == "UTF-16":
        raise ConfigError(f"{path} is UTF-16, not UTF-8. Convert it: iconv -f UTF-16 -t UTF-8 {path} > NEW_FILE")
    if found is not None:
        raise ConfigError(f"{path} is {found} by its first bytes, not a text file.")


def is_utf8(text: str) -> bool:
    """Whether a text has no lone surrogates, which stand for bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def not_utf8(text: str) -> str:
    """Return what is wrong with a text that has lone surrogates, which stand for bytes that are not UTF-8, and what to do."""
    found = next(c for c in text if "\ud800" <= c <= "\udfff")
    if not "\udc80" <= found <= "\udcff":
        return f"the escape \\u{ord(found):04x} is half of a character."
    return (
        f"the byte 0x{ord(found) - 0xDC00:02x} is not UTF-8. If the file is Latin-1 or Windows-1252, convert it: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW_FILE"
    )


def is_blank(line: str) -> bool:
    """Whether a line holds nothing but spaces."""
    return not line.strip(" \r\n")


def is_number(text: str) -> bool:
    """Whether a text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def lines(path: str) -> Iterator[str]:
    """Yield the lines of a file, also of a compressed one, without their ends. Bytes that are not UTF-8 become lone surrogates, which features refuse."""
    with open_stream(path) as binary:
        check_kind(binary.peek(4)[:4], path)
        with io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            for line in file:
                yield without_end(line)


def without_end(text: str) -> str:
    """Return the first line of a text without its line break; blank lines may follow it."""
    return text.partition("\n")[0].removesuffix("\r")


def numbered(path: str) -> Iterator[tuple[int, str]]:
    """Yield the number, from 1, and the text of each line that is not blank."""
    return ((number, line) for number, line in enumerate(lines(path), 1) if not is_blank(line))


def csv_records(text: Iterable[str], path: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yield the number of the first line, and the fields of each record; of a last line without its end, what is wrong; an empty list for a blank line.

    Args:
      text: lines with their ends.
      path: of the file, for errors.

    Raises:
      ConfigError: quotation marks are wrong, so that nobody can tell where the next record begins: a row would be made of the middle of a field.
    """
    taken, ended = 0, False

    def counted():
        nonlocal taken, ended
        for line in text:
            taken += 1
            yield line
        ended = True

    reader = csv.reader(counted(), strict=True)
    while True:
        first, taken = reader.line_num + 1, 0
        try:
            fields = next(reader)
            yield first, [] if len(fields) <= 1 and is_blank("".join(fields)) else fields
        except StopIteration:
            return
        except csv.Error as error:
            if taken != 1 or not ended:
                raise ConfigError(
                    f"{path}, line {first}: not comma-separated values: {error}. A quotation mark is missing or not doubled, so that where the next "
                    "row begins is not known. Correct the file, or write it with the quoting of RFC 4180."
                ) from error
            yield first, f"not a row of comma-separated values: {error}."
