#!/usr/bin/env bash
# Expected: all streaming interfaces of one decompressor return the same bytes for the same valid input. RFC
#   8878 allows several frames in a row, and skippable frames between them; gzip in Python reads all members.
# Actual: zstandard's `read_to_iter`, `decompressobj` and `decompress` stop at the end of the first frame and
#   return what they have without an error, while `stream_reader`, `copy_stream` and `open` read on. With a
#   skippable frame in front, `decompressobj` and `read_to_iter` return nothing at all, again without an error.
# Versions: zstandard 0.25.0 (PyPI).
# Why a registry cache must care: a zstd:chunked layer is a row of frames, about one a chunk, with skippable
#   frames behind them, so that clients fetch chunks by range. A check that reads such a layer by an iterator
#   (diff_id, list of files, bill of materials) sees its first file and calls the layer whole. Compare the
#   number of bytes, or the diff_id; `unused_data` of the decompressobj is the only sign of what is left.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install --disable-pip-version-check zstandard==0.25.0
timeout 60 "$work/venv/bin/python" - <<'PYTHON'
import gzip
import io
import struct
import sys
from collections.abc import Callable

import zstandard

FILES = [bytes([65 + number]) * 70_000 for number in range(3)]
WHOLE = b"".join(FILES)
frames = [zstandard.ZstdCompressor().compress(file) for file in FILES]
table = b"table of contents"
skippable = struct.pack("<II", 0x184D2A50, len(table)) + table  # RFC 8878, 3.1.2
chunked = b"".join([*frames, skippable])
in_front = skippable + chunked


def copied(content: bytes) -> bytes:
    zstandard.ZstdDecompressor().copy_stream(io.BytesIO(content), target := io.BytesIO())
    return target.getvalue()


def read_in_pieces(content: bytes) -> bytes:
    reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content))
    return b"".join(iter(lambda: reader.read(16_384), b""))


READERS: dict[str, Callable[[bytes], bytes]] = {
    "decompress": lambda content: zstandard.ZstdDecompressor().decompress(content),
    "decompressobj": lambda content: zstandard.ZstdDecompressor().decompressobj().decompress(content),
    "read_to_iter": lambda content: b"".join(zstandard.ZstdDecompressor().read_to_iter(io.BytesIO(content))),
    "stream_reader": lambda content: zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content)).read(),
    "stream_reader, 16 KiB at a time": read_in_pieces,
    "copy_stream": copied,
    "open": lambda content: zstandard.open(io.BytesIO(content), "rb").read(),
}


def count(name: str, content: bytes) -> int | None:
    try:
        result = READERS[name](content)
    except zstandard.ZstdError:
        return None  # decompress() wants the size of the content in the first header
    assert WHOLE.startswith(result)
    return len(result)


print(f"zstandard {zstandard.__version__}; {len(WHOLE)} bytes in {len(frames)} frames")
seen = {name: (count(name, chunked), count(name, in_front)) for name in READERS}
for name, (behind, front) in seen.items():
    print(f"  {name}: {behind} bytes; with a skippable frame in front {'ZstdError' if front is None else front}")
members = b"".join(map(gzip.compress, FILES))
print(f"  gzip.decompress of {len(FILES)} members, to compare: {len(gzip.decompress(members))} bytes")

first, all_bytes = len(FILES[0]), len(WHOLE)
holds = (
    seen["decompress"][0] == first
    and seen["decompressobj"] == seen["read_to_iter"] == (first, 0)
    and seen["stream_reader"] == seen["copy_stream"] == seen["open"] == (all_bytes, all_bytes)
)
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON
