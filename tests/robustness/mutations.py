"""How fuzz.py damages what is in order: bytes, nested values, JSON, the chunks of a PNG."""

import json
import random
import struct
import zlib
from typing import Any

VALUES = [None, True, False, -1, 0, 1, 2, 2**31, 2**63, 10**13, 10**400, 1.5, 1e308, float("nan"), float("-inf")]
VALUES += [
    "",
    "x",
    "no",
    "../x",
    "a\nb",
    "\0",
    "\ud800",
    "é" * 300,
    "9" * 5000,
    [],
    {},
    [[]],
    [1, 2],
    {"a": 1},
    {"": None},
]
WORDS = [
    b"\0" * 8,
    b"\xff" * 8,
    b"\x7f\xff\xff\xff",
    b"PK\x03\x04",
    b"PAR1",
    b"\n",
    b"{",
    b"]",
    b"IEND",
    b"'<f8'",
    b"|O",
]


def damaged(choose: random.Random, content: bytes) -> bytes:
    """Bytes with one to four faults: flipped, cut out, repeated, overwritten or inserted ones, or a missing end."""
    for _ in range(choose.randint(1, 4)):
        start = choose.randint(0, len(content))
        end = min(len(content), start + choose.choice([1, 1, 4, 32, 1000]))
        word = choose.choice([*WORDS, choose.randbytes(choose.choice([1, 2, 4]))])
        content = choose.choice(
            [
                content[:start] + bytes(byte ^ 1 << choose.randrange(8) for byte in content[start:end]) + content[end:],
                content[:start] + content[end:],
                content[:end] + content[start:],
                content[:start] + word + content[start + len(word) :],
                content[:start] + word + content[start:],
                content[:start],
            ]
        )
    return content


def as_json(choose: random.Random, value: Any) -> bytes:
    """The text of a value, sometimes nested deeply, sometimes damaged."""
    text = json.dumps(value)
    if choose.random() < 0.3:
        text = text.replace('"x"', "[" * 100_000 + "]" * 100_000)
    return damaged(choose, text.encode()) if choose.random() < 0.3 else text.encode()


def changed(choose: random.Random, value: Any) -> Any:
    """A copy of nested lists and mappings in which one value or key is another, missing or new."""
    if isinstance(value, dict) and value and choose.random() < 0.9:
        key = choose.choice(list(value))
        if choose.random() < 0.1:
            return {name: part for name, part in value.items() if name != key}
        if choose.random() < 0.1:
            return value | {choose.choice(["x", "", "_class_name", "a.b"]): choose.choice(VALUES)}
        return value | {key: changed(choose, value[key])}
    if isinstance(value, list) and value and choose.random() < 0.5:
        place = choose.randrange(len(value))
        return [*value[:place], changed(choose, value[place]), *value[place + choose.choice([0, 1, 1, 1]) :]]
    return choose.choice(VALUES)


def with_other_chunks(choose: random.Random, content: bytes) -> bytes:
    """A PNG with one chunk changed, repeated, missing or new, the checksums in order."""
    chunks = []
    place = 8
    while place < len(content):
        [length] = struct.unpack(">I", content[place : place + 4])
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    number = choose.randrange(len(chunks))
    name, body = chunks[number]
    bomb = zlib.compress(bytes(choose.choice([10**6, 10**8])))
    sides = [0, 1, 2**16, 2**31 - 1]
    header = struct.pack(
        ">IIBBBBB", choose.choice(sides), choose.choice(sides), 8, choose.choice([0, 2, 3, 4, 6, 9]), 0, 0, 0
    )
    new = [
        (b"zTXt", b"key\0\0" + bomb),
        (b"iCCP", b"x\0\0" + bomb),
        (b"iTXt", b"key\0\1\0\0\0" + bomb),
        (b"eXIf", b"II*\0"),
    ]
    new += [
        (b"tEXt", b"x"),
        (b"IHDR", header),
        (b"tRNS", b"\0"),
        (b"acTL", b"\0" * 8),
        (b"fcTL", b""),
        (name, damaged(choose, body)),
    ]
    added = choose.choice([*new, (name, body)])
    chunks = choose.choice(
        [
            [*chunks[:number], added, *chunks[number + choose.choice([0, 1]) :]],
            [*chunks[:number], *chunks[number + 1 :]],
        ]
    )
    parts = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    ]
    return content[:8] + b"".join(parts)
