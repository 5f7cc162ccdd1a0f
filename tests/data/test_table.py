"""Tables of numbers: PyArrow's reader and Python's own give the same values, or the same error with its place."""

import numpy as np
import pytest

from jaxmodels.data.sources import table
from jaxmodels.errors import ConfigError

HEADER = b"date,x,y\n"
FILES = {  # content, and whether PyArrow reads it
    "plain": (HEADER + b"a,1,2\nb,-3.25,4e5\n", True),
    "forms of numbers": (HEADER + b"a, 1 ,.5\nb,1.,1e-7\nc,-0,00012\nd,123456789012345678901234567890,1E+3\ne,0.1,2.2250738585072014e-308\n", True),
    "rounding": (HEADER + b"a,0.1000000000000000055511151231257827,9007199254740993\nb,2.5e-324,1.7976931348623157e308\n", None),
    "no end of the last line": (HEADER + b"a,1,2\nb,3,4", True),
    "ends of Windows": (b"date,x,y\r\na,1,2\r\nb,3,4\r\n", True),
    "ends of old Macs": (b"date,x,y\ra,1,2\rb,3,4\r", False),
    "mixed ends": (b"date,x,y\na,1,2\r\nb,3,4\rc,5,6\n", True),
    "byte order mark": (b"\xef\xbb\xbf" + HEADER + b"a,1,2\nb,3,4\n", True),
    "blank lines": (HEADER + b"\na,1,2\n\n\nb,3,4\n\n", True),
    "lines of spaces": (HEADER + b"a,1,2\n  \nb,3,4\n", False),
    "a blank line first": (b"\n" + HEADER + b"a,1,2\nb,3,4\n", False),
    "one column": (b"x\n1\n\n2\n \n3\n", None),
    "quoted header": (b'"date","x, first","y"\na,1,2\nb,3,4\n', True),
    "header of two lines": (b'date,"x\nfirst",y\na,1,2\nb,3,4\n', False),
    "quoted fields": (HEADER + b'"a, b",1,2\n"c\nd",3,"4"\n', False),
    "a quotation mark that nothing closes": (HEADER + b'a,1,2\nb,"3,4\nc,5,6\n', False),
    "a quotation mark inside": (HEADER + b'a"b,1,2\nc,3,4\n', False),
    "plus": (HEADER + b"a,+1,2\nb,3,4\n", None),
    "underscores": (HEADER + b"a,1_000,2\nb,3,4\n", False),
    "other digits": (HEADER + "a,١٢,2\nb,3,4\n".encode(), False),
    "other spaces": (HEADER + "a,\u00a01,2\nb,3\t,4\n".encode(), False),
    "not UTF-8 beside": (HEADER + b"\xff,1,2\nb,3,4\n", True),
    "not UTF-8 in the header": (b"date,\xff,y\na,1,2\n", False),
    "not UTF-8 in a number": (HEADER + b"a,1,\xff\n", False),
    "UTF-16": ("date,x,y\na,1,2\n".encode("utf-16"), False),
    "a spreadsheet": (b"PK\x03\x04,x\n1,2\n", False),
    "zero bytes": (HEADER + b"a,1\x00,2\n", False),
    "gap": (HEADER + b"a,1,2\nb,,4\n", False),
    "words for a gap": (HEADER + b"a,1,2\nb,NULL,4\n", False),
    "NA": (HEADER + b"a,1,2\nb,NA,4\n", False),
    "nan": (HEADER + b"a,1,2\n\nb,3,nan\n", False),
    "infinity": (HEADER + b"a,1,2\nb,-Infinity,4\n", False),
    "too large": (HEADER + b"a,1e400,2\n", False),
    "truth": (HEADER + b"a,true,2\n", False),
    "hexadecimal": (HEADER + b"a,0x10,2\n", False),
    "half a number": (HEADER + b"a,1e,2\n", False),
    "decimal comma": (b"date;x\na;1,5\n", False),
    "comment": (b"# made in 2025\n" + HEADER + b"a,1,2\n", False),
    "comment below": (HEADER + b"a,1,2\n# end\n", False),
    "more columns": (HEADER + b"a,1,2\nb,3,4,5\n", False),
    "fewer columns": (HEADER + b"a,1,2\nb,3\n", False),
    "one more comma": (HEADER + b"a,1,2,\n", False),
    "two of one name": (b"date,x,x\na,1,2\n", False),
    "no time": (b"x,y\n1,2\n3,4\n", True),
    "header alone": (HEADER, False),
    "empty": (b"", False),
    "long lines": (HEADER + b"a" * 6_000_000 + b",1,2\nb,3,4\n", None),
}


def outcome(read, path, columns=None):
    try:
        values, names = read(str(path), "date", columns)[:2]
    except ConfigError as error:
        return str(error)
    return values.tobytes(), values.shape, names


@pytest.mark.parametrize("name", FILES)
def test_both_readers_agree_on_what_is_in_a_file(tmp_path, name):
    content, by_arrow = FILES[name]
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    for columns in (None, ("y",), ("y", "x")):
        assert outcome(table.read_numbers, path, columns) == outcome(table._read, path, columns)
    try:
        found = table._read_by_arrow(str(path), "date", None)[0]
    except ConfigError:
        found = None
    assert by_arrow is None or (found is not None) == by_arrow


def test_numbers_are_the_nearest_ones_and_long_files_are_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "_BLOCK", 1 << 12)
    draw = np.random.default_rng(0)
    values = draw.normal(size=(3000, 3)) * 10.0 ** draw.integers(-300, 300, (3000, 3))
    lines = [f"{i},{a!r},{b:.3f},{c:.25e}" for i, (a, b, c) in enumerate(values.tolist())]
    path = tmp_path / "x.csv"
    path.write_text("date,a,b,c\n" + "\n".join(lines))
    wanted = np.array([[float(field) for field in line.split(",")[1:]] for line in lines])
    (found, names), _ = table._read_by_arrow(str(path), "date", None)
    assert names == ["a", "b", "c"] and found.tobytes() == wanted.tobytes() == table._read(str(path), "date", None)[0].tobytes()


def test_a_long_table_without_pyarrow_is_said(tmp_path, monkeypatch, csv_reader):
    path = tmp_path / "x.csv"
    path.write_bytes(HEADER + b"a,1,2\nb,3,4\n")
    assert table.read_numbers(str(path), "date", None)[2] == ()
    monkeypatch.setattr(table, "_SLOW_FROM", 10)
    notes = table.read_numbers(str(path), "date", None)[2]
    assert notes == () if csv_reader == "pyarrow" else "Python's own reader" in notes[0] and "jaxmodels[parquet]" in notes[0]
