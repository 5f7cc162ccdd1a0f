"""ArrayRecord files, and `tf.train.Example`s as bytes, after the description of protocol buffers."""

import numpy as np


def write(path, contents):
    """Write a file of records."""
    from array_record.python import array_record_module as array_record

    writer = array_record.ArrayRecordWriter(str(path), "group_size:1")
    for content in contents:
        writer.write(content)
    writer.close()


def varint(number):
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def field(number, content):
    """Return a field of a protocol buffer with a length."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(**features):
    """Return a serialised tf.train.Example, after the description of the format."""
    entries = b""
    for name, value in features.items():
        values = value if isinstance(value, list) else [value]
        if isinstance(values[0], bytes):
            kind = field(1, b"".join(field(1, item) for item in values))
        elif isinstance(values[0], float):
            kind = field(2, field(1, np.array(values, "<f4").tobytes()))
        else:
            kind = field(3, field(1, b"".join(map(varint, values))))
        entries += field(1, field(1, name.encode()) + field(2, kind))
    return field(1, entries)
