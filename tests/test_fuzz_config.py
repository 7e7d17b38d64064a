"""Whatever is given as run.toml or --set is taken, or refused in lines that are printable and bounded."""

import os
import random
import re

from launch import ROOT

from hpcmoe.config import Config, list_keys, read_config
from hpcmoe.errors import ConfigError

VALUES = [b"1", b"a b", b"[1, 2]", b'["a"]', b"1.5", b"true", b"[[1.0, 2]]"]
NUM_MUTATIONS, LONGEST_LINE, MOST_LINES = 1000, 1400, 41
MANUAL = (ROOT / "inputs" / "run.toml").read_bytes()
KEYS = [f"{name}.{key}" for name, key, _ in list_keys()]
SPICE = [  # what mutations put in
    b"\x00", b"\n", b"\r", b"\x1b[31m", b"\xff", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xed\xa0\x80", b"\xc2\x9b",
    b'"', b"'", b'"""', b"[", b"]", b"[[", b"{", b"}", b"=", b".", b",", b"#", b"\\", b" ", b"\t", b"", b"\xfe\xff",
    b"\\u0000", b"\\n", b"\\uD800", b"\\U0010FFFF", "\u00fc\u20ac\U0001f600".encode(), b"x" * 20000,
    b"nan", b"-inf", b"1e999", b"1e-50", b"0xbeef", b"0x" + b"f" * 5000, b"9" * 5000, b"-" + b"9" * 400,
    b"9223372036854775808", b"1_0", b"0o7", b"true", b"2026-11-30", b"2026-11-30T12:00:00+23:59", b"25:00:00",
    b"[" * 3000, b"[" * 3000 + b"]" * 3000, b"{a=" * 500, b"a." * 3000 + b"a = 1\n", b"[a" + b".a" * 3000 + b"]\n",
    b"[run]\n", b"[[run]]\n", b"run = 3\n", b"[model]\nhidden = [[[[[[[[[[[1]]]]]]]]]]]\n",
]  # fmt: skip


def check(path, words=()):
    """Read a file: lines, each printable and bounded; or a Config that the text kept of it gives again."""
    try:
        config, text = read_config(path, words)
    except ConfigError as fault:
        lines = str(fault).split("\n")
        assert len(lines) <= MOST_LINES
        for line in lines:
            assert line and line.isprintable() and len(line) <= LONGEST_LINE, line
        return
    assert isinstance(config, Config) and text.count("\n# --set ") >= len(words)
    path.write_text(text)
    assert read_config(path, words)[0] == config


def mutate(chance, content):
    """Cut, repeat, exchange or spice a few places of some bytes."""
    for _ in range(chance.choice((1, 1, 2, 5))):
        at, to = sorted(chance.randrange(len(content) + 1) for _ in range(2))
        match chance.randrange(5):
            case 0:
                content = content[:at] + content[min(to, at + 50) :]
            case 1:
                content = content[:to] + content[at : at + 200] + content[to:]
            case 2:
                content = content[:at] + bytes([chance.randrange(256)]) + content[at + 1 :]
            case _:
                content = content[:at] + chance.choice(SPICE) + content[at + chance.randrange(8) :]
    return content


def test_no_file_escapes(tmp_path):
    chance, path = random.Random(0), tmp_path / "run.toml"
    manual = re.sub(rb" *#[^\n\"]*\n", b"\n", MANUAL).splitlines(keepends=True)
    for _ in range(NUM_MUTATIONS):
        some = b"".join(line for line in manual if line.startswith(b"[") or chance.random() < 0.1)
        path.write_bytes(mutate(chance, some))
        check(path)


def test_no_override_escapes(tmp_path):
    chance, path = random.Random(1), tmp_path / "run.toml"
    for _ in range(NUM_MUTATIONS):
        value = mutate(chance, chance.choice(VALUES + SPICE))
        override = f"{chance.choice((*KEYS, 'a.b', 'run', 'run.name.x'))}=".encode() + value
        if chance.random() < 0.2:
            override = mutate(chance, override)
        words = [os.fsdecode(override)] * chance.choice((1, 1, 2))
        path.write_text("")
        check(path, words)
