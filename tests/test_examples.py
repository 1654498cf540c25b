"""The images in examples/, and the program that made them."""

from __future__ import annotations

import gzip
import importlib.util
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
FASHION = ROOT / "examples" / "fashion"
SCRIPT = ROOT / "benchmarks" / "datasets.py"
CLASSES = {"t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot"}


@pytest.fixture(scope="module")
def datasets() -> ModuleType:
    found = importlib.util.spec_from_file_location("benchmark_datasets", SCRIPT)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses look there for their types
    found.loader.exec_module(module)
    return module


def idx(values: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_clothes(folder: Path, count: int) -> np.ndarray:
    """The four files with `count` images each, two of a class in a row; image i is i everywhere but in its corner."""
    folder.mkdir()
    images = np.arange(count, dtype=np.uint8)[:, None, None].repeat(3, 1).repeat(4, 2)
    images[:, 0, 0] = 255
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        labels = (np.arange(count) // 2 % 10).astype(np.uint8)
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return images


def test_counts_names_and_size() -> None:
    files = [path for path in FASHION.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_000_000
    images = [path.relative_to(FASHION).parts for path in files if path.name != "README.md"]
    assert len(files) == len(images) + 1
    expected = {(part, name): count for part, count in (("train", 100), ("test", 50)) for name in CLASSES}
    assert Counter((part, name) for part, name, _ in images) == expected
    for part, largest in (("train", 60_000), ("test", 10_000)):
        numbers = [Path(file).stem for its, _, file in images if its == part]
        assert len(set(numbers)) == len(numbers)  # an image has one class
        assert all(len(number) == 5 and int(number) < largest for number in numbers)


def test_every_image_decodes_and_is_there_once() -> None:
    seen = Counter()
    for path in FASHION.rglob("*.png"):
        with Image.open(path) as image:
            assert (image.size, image.mode, image.format) == ((28, 28), "L", "PNG"), path
            seen[image.tobytes()] += 1
    assert len(seen) == 1500  # so train and test share none


def test_the_licence_is_with_the_images() -> None:
    text = " ".join((FASHION / "README.md").read_text().split())
    assert "The MIT License (MIT) Copyright © 2017 Zalando SE, https://tech.zalando.com" in text
    assert "Permission is hereby granted, free of charge" in text
    assert 'THE SOFTWARE IS PROVIDED "AS IS"' in text
    assert "python benchmarks/datasets.py sample" in text


def test_idx_files_are_read(datasets: ModuleType, tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(idx(values)))
    assert np.array_equal(datasets.read_idx(path), values)
    for content, words in (
        (gzip.compress(idx(values)[:-1]), r"a\.gz is cut short: its header says \(2, 3, 4\), and 23 bytes follow"),
        (gzip.compress(idx(values)[:6]), "cut short"),
        (gzip.compress(b"\0\0\x0d\1" + idx(values)[4:]), "no idx file of bytes"),  # 13: floats
        (gzip.compress(b""), "no idx file"),
        (gzip.compress(idx(values))[:-12], "a.gz: "),
        (idx(values), "a.gz: "),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            datasets.read_idx(path)


def test_a_sample_has_the_first_of_each_class(datasets: ModuleType, tmp_path: Path) -> None:
    images = write_clothes(tmp_path / "gz", 60)
    written = dict(datasets.fashion(tmp_path / "gz", {"train": 3, "test": 1}))
    assert len(written) == 30 + 10
    assert [name for name in written if "trouser" in name] == [
        "train/trouser/00002",
        "train/trouser/00003",
        "train/trouser/00022",
        "test/trouser/00002",
    ]
    assert np.array_equal(np.asarray(written["train/trouser/00022"]), images[22])
    assert len(dict(datasets.fashion(tmp_path / "gz"))) == 120


def test_stamps_stand_on_white_and_drawings_are_left_out(datasets: ModuleType, tmp_path: Path) -> None:
    for place in (
        "animals/mammals/cats",
        "animals/mammals/cats/cartoon",
        "animals/marsupials",
        "plants/flowers/plastic",
    ):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(tmp_path / place / f"{Path(place).name}.png")
    Image.new("RGBA", (2, 2), (10, 20, 30, 255)).save(tmp_path / "animals/marsupials/koala.png")
    written = dict(datasets.tuxpaint(tmp_path))
    assert sorted(written) == ["mammal/cats", "mammal/koala", "mammal/marsupials"]
    assert {image.mode for image in written.values()} == {"RGB"}
    assert written["mammal/cats"].getpixel((0, 0)) == (255, 255, 255)
    assert written["mammal/koala"].getpixel((0, 0)) == (10, 20, 30)


def small(datasets: ModuleType, count: int) -> object:
    return datasets.Source("a-package", "nowhere", count, datasets.fashion, Path(), "fashion")


def test_made_once_and_whole_or_not_at_all(
    datasets: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gz, target = tmp_path / "gz", tmp_path / "out" / "fashion"
    write_clothes(gz, 20)
    with pytest.raises(ValueError, match="a-package holds 40 images of this kind, not 41"):
        datasets.make(small(datasets, 41), target, gz)
    assert not list((tmp_path / "out").iterdir())  # neither a half nor what it was made in

    target.mkdir()
    (target / "README.md").write_text("kept")
    datasets.make(small(datasets, 40), target, gz)
    assert (target / "README.md").read_text() == "kept"
    assert sorted(path.name for path in target.iterdir()) == ["README.md", "test", "train"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["fashion"]

    before = {path: path.stat().st_mtime_ns for path in target.rglob("*.png")}
    datasets.make(small(datasets, 40), target, tmp_path / "absent")
    assert "is there already: 40 images" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in target.rglob("*.png")}

    next(iter(before)).unlink()
    with pytest.raises(ValueError, match=r"holds something else \(39 images\); remove it"):
        datasets.make(small(datasets, 40), target, gz)


def test_the_command_makes_what_stands_in_examples(tmp_path: Path) -> None:
    """From the original files where they are installed; else the message of a folder without them."""
    package = Path("/usr/share/datasets/fashion-mnist")
    done = subprocess.run(
        [sys.executable, SCRIPT, "sample", "--out", tmp_path, "--from", package],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    if not package.is_dir():
        assert done.returncode == 1
        assert done.stderr.startswith("datasets.py: [Errno 2] No such file or directory")
        assert not list(tmp_path.iterdir())
        return
    assert done.stdout == "fashion: 1,500 images, 0.8 MB\nNext: effnet train fashion\n"
    for path in FASHION.rglob("*.png"):
        with Image.open(path) as ours, Image.open(tmp_path / path.relative_to(FASHION.parent)) as theirs:
            assert ours.tobytes() == theirs.tobytes()
