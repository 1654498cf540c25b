"""effnet pack: packs a data set into shards, indexed tar files that are read from disk or over HTTP."""

from __future__ import annotations

import shlex
from pathlib import Path

from effnet import console
from effnet.console import FINDING, OK, Amount
from effnet.data.dataset import read_data
from effnet.fields import parse_bytes, write_count
from effnet.packing.pack import pack as write


def pack(data: Path, out: Path, *, shard_size: Amount = "1GB") -> int:
    """Pack a data set into a few large tar files, in webdataset's layout, that every command reads like a folder.

    Images are packed byte for byte, shuffled within each split. To finish an interrupted pack, repeat the command.

    Args:
        data: A folder of class folders, split or not, or a manifest.
        out: A new folder for the shards, their indices and their manifest.
        shard_size: Maximum bytes per shard; a single image may exceed it.
    """
    limit = parse_bytes("shard_size", shard_size)
    with console.Display(f"reading {data}") as progress:
        packed = write(read_data(data), out, limit, progress=progress)
    kept = f", {packed.kept} of them were there already" if packed.kept else ""
    size = console.size(packed.bytes)
    held = f"{write_count(packed.images, 'image')} in {write_count(packed.shards, 'shard')}"
    console.remark(f"{out}: {held}{kept}, {size}")
    for path in packed.missing:
        console.remark(f"left out: {path} does not exist")
    console.remark(f"Next: effnet train {shlex.quote(str(out))}")
    return FINDING if packed.missing else OK
