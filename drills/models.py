"""Damaged and malicious models, checkpoints, networks, rules, recipes, manifests, shards and run folders.

    python drills/models.py [--seed 0] [--tries 2000] [--minutes 60] [--short] [--only NUMBER]

Each file is a valid one with a change, or a trick of attacks/tricks.py. It must be refused in one line, or give what
the valid file gave; nothing may crash or hang, and no code in a file may run: the canary must never appear.
"""

from __future__ import annotations

import random
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from attacks.tricks import tricks
from attacks.watched import Watched
from verdict import Drill, Scale, begin

SCALE = Scale(tries=2000, minutes=60, short_tries=60, short_minutes=2)
SLOW = 30.0  # seconds of processor time
SPARE_MB = 1500.0
EVERY = 12  # the short form tries one in this many tricks
# exact: the same answer. numbers: the format has no checksum, so its numbers may differ, but nothing else. edited: the
# file is written by hand, so other values are valid. part: images may be missing, but not different.
Rule = Literal["exact", "numbers", "edited", "part"]


@dataclass(frozen=True)
class Target:
    """A file to change, and what is opened."""

    kind: str  # for opener.py
    root: str  # what is opened
    file: str = ""  # inside it
    rule: Rule = "exact"


LAYOUTS = ("native", "tutorial", "torchvision", "timm", "lukemelas", "hf")
TARGETS = (
    *(Target("model", "bundle", file) for file in ("config.json", "model.safetensors")),
    *(Target("model", "openvino", file) for file in ("model.xml", "model.bin")),
    *(Target("model", file) for file in ("model.onnx", "model.pt2")),
    *(Target("model", f"{layout}.pth") for layout in LAYOUTS),
    *(Target("model", f"{layout}.safetensors", rule="numbers") for layout in LAYOUTS),
    *(Target("model", file, rule="numbers") for file in ("older.pth", "keras.h5")),
    Target("model", "hub", "model.safetensors", "numbers"),
    *(Target("model", "hub", f"{name}.json", "edited") for name in ("config", "preprocessor_config")),
    *(Target(name, f"{name}.yaml", rule="edited") for name in ("spec", "rule", "recipe")),
    Target("data", "manifest.csv", rule="edited"),
    *(Target("data", "shards", file, "part") for file in ("shards.json", "*.index", "*.tar")),
    Target("data", "shards", "manifest.csv", "edited"),
    *(Target("run", "run", file) for file in ("args.yaml", "split.csv", "last.ckpt")),
)


def change(file: bytes, draw: random.Random) -> bytes:
    """A changed copy of a file: changed bytes, or changed words."""
    changed = bytearray(file)
    text = not file[:4096].strip(bytes(range(32, 127)) + b"\r\n\t")
    if file[8:9] == b"{" and draw.random() < 0.6:  # the header of safetensors
        length = struct.unpack("<Q", file[:8])[0]
        header = _words(bytearray(file[8 : 8 + length]), draw)
        return struct.pack("<Q", len(header)) + header + file[8 + length :]
    if text and draw.random() < 0.8:
        return bytes(_words(changed, draw))
    for _ in range(draw.choice((1, 1, 1, 3, 20))):
        draw.choice((_flip, _flip, _flip, _cut, _hole, _repeat, _zero, _swap, _extend))(changed, draw)
    return bytes(changed)


def _words(text: bytearray, draw: random.Random) -> bytearray:
    """Replace a word, a number or a line."""
    if draw.random() < 0.3:
        lines = bytes(text).splitlines(keepends=True)
        place, other = (draw.randrange(len(lines)) for _ in range(2))
        draw.choice((lambda: lines.pop(place), lambda: lines.insert(other, lines[place]), lambda: lines.reverse()))()
        return bytearray(b"".join(lines))
    pieces = _split(bytes(text))
    places = [place for place, piece in enumerate(pieces) if piece[:1].isalnum()]
    if not places:
        return text
    place = draw.choice(places)
    pieces[place] = draw.choice(WORDS) if draw.random() < 0.7 else pieces[draw.choice(places)]
    return bytearray(b"".join(pieces))


def _split(text: bytes) -> list[bytes]:
    """Words and numbers, and the text between them."""
    pieces, kinds = list[bytes](), list[bool]()
    for byte in text:
        kind = chr(byte).isalnum() or byte in b"._"
        if kinds and kinds[-1] == kind:
            pieces[-1] += bytes([byte])
        else:
            pieces.append(bytes([byte]))
            kinds.append(kind)
    return pieces


WORDS = (
    *(b"0", b"1", b"-1", b"2", b"3.5", b"1e400", b"-0.0", b"NaN", b"Infinity", b".nan", b".inf", b"9" * 400),
    *(
        b"null",
        b"true",
        b"~",
        b"[]",
        b"{}",
        b'""',
        b"'",
        b'"',
        b"a" * 100_000,
        b"\xff\xfe",
        b"\0",
        b"I32",
        b"F16",
        b"BF16",
    ),
    *(
        b"!!python/name:os.system",
        b"&a [*a]",
        b"relu",
        b"b0",
        b"../../etc/passwd",
        b"[" * 5000,
        b"{" * 5000,
        b"\xe2\x80\xa8",
    ),
)


def _flip(file: bytearray, draw: random.Random) -> None:
    if file:
        file[draw.randrange(len(file))] ^= 1 << draw.randrange(8)


def _cut(file: bytearray, draw: random.Random) -> None:
    del file[draw.choice((draw.randrange(len(file) + 1), max(0, len(file) - draw.randrange(1, 100)))) :]


def _hole(file: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(file) + 1)
    del file[start : start + draw.choice((1, 4, 64, 4096))]


def _repeat(file: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(file) + 1)
    file[start:start] = file[start : start + draw.choice((1, 4, 64, 4096))]


def _zero(file: bytearray, draw: random.Random) -> None:
    start, length = draw.randrange(len(file) + 1), draw.choice((1, 8, 512))
    file[start : start + length] = draw.choice((b"\0", b"\xff")) * len(file[start : start + length])


def _swap(file: bytearray, draw: random.Random) -> None:
    length = draw.choice((4, 64, 512))
    if len(file) > 2 * length:
        a, b = sorted(draw.randrange(len(file) - length) for _ in range(2))
        if b - a >= length:
            file[a : a + length], file[b : b + length] = file[b : b + length], file[a : a + length]


def _extend(file: bytearray, draw: random.Random) -> None:
    file += draw.choice((b"\0", b"PK\5\6" + bytes(18), bytes(file[-4096:]), draw.randbytes(100)))


def prepare(target: Target, sound: Path, folder: Path, edit: Callable[[bytes], bytes]) -> Path:
    """Copy what is opened, with its file changed; return the path to open."""
    root = folder / target.root
    if (sound / target.root).is_dir():
        shutil.copytree(sound / target.root, root)
    else:
        shutil.copy(sound / target.root, root)
        if target.kind == "data":
            (folder / "data").symlink_to(sound / "data")
    file = next(iter(sorted(root.glob(target.file)))) if target.file else root
    file.write_bytes(edit(file.read_bytes()))
    return root


def judge(target: Target, told: dict[str, Any], sound: dict[str, Any]) -> str:
    """What is wrong with an answer, or ""."""
    if told["raised"]:
        return f"raises {told['raised']}"
    if "\n" in told["refused"] or len(told["refused"]) > 2000:
        return f"is refused in several lines: {told['refused'][:300]!r}"
    if told["seconds"] > SLOW or told["mb"] > SPARE_MB:
        return f"takes {told['seconds']:.1f} s and {told['mb']:,.0f} MB"
    if told["refused"] or target.rule == "edited":
        return ""
    if target.rule == "part":
        others = [each for each in told["items"] if each[1][1] and each not in sound["items"]]
        return f"holds {others[0]}" if others else ""
    context, numbers = (a == b for a, b in zip(told["digests"], sound["digests"], strict=True))
    if target.rule == "numbers":
        return "" if context else "is taken for another network"
    return (
        "" if context and (numbers or told["digests"][1] == told["nothing"]) else "answers otherwise, and says nothing"
    )


def main() -> int:
    """Run the drill and return its exit code."""
    drill = begin("models", SCALE, __doc__)
    with tempfile.TemporaryDirectory() as place:
        sound, canary = Path(place) / "sound", Path(place) / "canary" / "canary"
        sound.mkdir()
        canary.parent.mkdir()
        opener = Watched("opener", str(sound))
        try:
            opener.start()
            known = {each.root: opener.tell([each.kind, str(sound / each.root)]) for each in TARGETS}
            for root, told in known.items():
                if isinstance(told, str) or told["refused"] or told["raised"]:
                    raise RuntimeError(f"the sound {root}: {told}")
            try_changes(drill, opener, sound, known)
            if drill.only is None:
                try_tricks(drill, opener, sound, canary)
        finally:
            opener.close()
    return drill.finish()


def try_changes(drill: Drill, opener: Watched, sound: Path, known: dict[str, Any]) -> None:
    """Open changed files, each in its own folder."""
    for number in drill.numbers():
        if drill.over:
            break
        draw = drill.draws(number)
        target = TARGETS[number % len(TARGETS)]
        with tempfile.TemporaryDirectory(dir=sound.parent) as folder:
            path = prepare(target, sound, Path(folder), lambda content, draw=draw: change(content, draw))
            told = opener.tell([target.kind, str(path)])
            drill.done += 1
            wrong = told if isinstance(told, str) else judge(target, told, known[target.root])
            if wrong:
                drill.fault(number, f"{target.root}/{target.file} {wrong}"[:400].replace(folder, "..."))
            elif isinstance(told, dict):
                drill.count("refused" if told["refused"] else "read as before or edited")


def try_tricks(drill: Drill, opener: Watched, sound: Path, canary: Path) -> None:
    """Open malicious files, and look for the canary after each."""
    step = EVERY if drill.short else 1
    with tempfile.TemporaryDirectory(dir=sound.parent) as folder:
        for number, (kind, path) in enumerate(tricks(Path(folder), sound, canary)):
            if (number + drill.seed) % step:
                continue
            told = opener.tell([kind, str(path)])
            drill.done += 1
            drill.count("tricks")
            wrong = told if isinstance(told, str) else judge(Target(kind, path.name, rule="edited"), told, {})
            if canary.exists():
                wrong, _ = "runs code of the file", canary.unlink()
            if wrong:
                drill.fault(number, f"the trick {path.name} {wrong}"[:400].replace(folder, "..."))


if __name__ == "__main__":
    sys.exit(main())
