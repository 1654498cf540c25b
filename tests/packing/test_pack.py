"""effnet pack: other readers read it, a second pack reuses shards, and trainings give the same results."""

from __future__ import annotations

import csv
import dataclasses
import gc
import io
import json
import os
import shlex
import tarfile
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ranges import serve
from short_run import QUICK, CrashError, Recorder
from timm.data.readers import create_reader
from tiny import draw_images, same, weights, write_spec
from webdataset import WebDataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from effnet.cli import main
from effnet.data.dataset import read_data
from effnet.data.duplicates import find_duplicates
from effnet.data.held_out import match_split
from effnet.errors import ArgumentError, DataError
from effnet.files import hold_lock
from effnet.packing import pack as module
from effnet.packing.pack import member_names, pack
from effnet.training.train import resume, train

SIZE = 30_000  # bytes of a shard: several shards


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    return draw_images(tmp_path / "shapes", 8)


def webdataset_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """What webdataset's own reader makes of the shards of a folder."""
    for shard in sorted(folder.glob("*.tar")):
        with shard.open("rb") as stream:
            yield from group_by_keys(tar_file_expander([{"url": str(shard), "stream": stream}]))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_webdataset_reads_every_image_with_its_class(shapes: Path, tmp_path: Path) -> None:
    data = read_data(shapes)
    packed = pack(data, tmp_path / "out", SIZE)
    assert packed.shards == len(list((tmp_path / "out").glob("*.tar"))) > 2
    found = {row["__key__"]: row for row in webdataset_rows(tmp_path / "out")}
    expected = {sample.path.removesuffix(".png"): sample for sample in data.samples}
    assert found.keys() == expected.keys()
    for key, row in found.items():
        assert row["png"] == data.file(expected[key]).read_bytes()
        assert int(row["cls"]) == expected[key].label


def test_webdatasets_pipeline_and_timms_reader_read_shards(shapes: Path, tmp_path: Path) -> None:
    data = read_data(shapes)
    pack(data, tmp_path / "out", SIZE)
    shards = sorted(str(shard) for shard in (tmp_path / "out").glob("*.tar"))
    expected = sorted((sample.label, np.asarray(Image.open(data.file(sample))).tobytes()) for sample in data.samples)
    names = f"images-{{000000..{Path(shards[-1]).stem.removeprefix('images-')}}}.tar"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves the last shard to the garbage collector
        pipeline = WebDataset(shards, shardshuffle=False, empty_check=False).decode("pil").to_tuple("png", "cls")
        assert sorted((label, np.asarray(photo).tobytes()) for photo, label in pipeline) == expected
        reader = create_reader("wds/shapes", str(tmp_path / "out"), split=f"{names}|{len(data)}")
        assert len(reader) == len(data)
        assert sorted((label, np.asarray(photo).tobytes()) for photo, label in reader) == expected
        del pipeline, reader
        gc.collect()


def test_the_index_names_the_bytes_of_the_tar(shapes: Path, tmp_path: Path) -> None:
    pack(read_data(shapes), tmp_path / "out", SIZE)
    for shard in (tmp_path / "out").glob("*.tar"):
        assert shard.stat().st_size <= SIZE
        rows = [line.split("\t") for line in shard.with_suffix(".index").read_text().splitlines()]
        with tarfile.open(shard) as tar:
            images = {info.name: info for info in tar if not info.name.endswith(".cls")}
            assert images.keys() == {row[0] for row in rows}
            for name, offset, size, crc, _ in rows:
                assert (images[name].offset_data, images[name].size) == (int(offset), int(size))
                assert zlib.crc32(tar.extractfile(name).read()) == int(crc)  # type: ignore[union-attr]


def test_a_shard_mixes_the_classes_of_one_split(tmp_path: Path) -> None:
    for split in ("train", "val"):
        draw_images(tmp_path / "data" / split, 12)
    pack(read_data(tmp_path / "data"), tmp_path / "out", 10**9)
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        names = [info.name for info in tar if info.name.endswith(".png")]
    assert names != sorted(names)
    assert {name.split("/")[0] for name in names} == {"train"}
    assert {name.split("/")[1] for name in names[:12]} == {"disc", "ring", "square"}


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/1.jpg", "b.c/2.PNG"], ["a/1.jpg", "b.c/2.PNG"]),
        (["a/1.jpg", "a/1.png"], ["000000000/a/1.jpg", "000000001/a/1.png"]),  # one key for two images
        (["a/1.2.jpg", "a/3.jpg"], ["000000000/a/1_2.jpg", "000000001/a/3.jpg"]),  # webdataset: the suffix is 2.jpg
        (["/photos/a/1.jpg"], ["000000000/photos/a/1.jpg"]),
        (["../a/1.jpg", "b/x"], ["000000000/a/1.jpg", "000000001/b/x.img"]),
        (["a/1\t.jpg"], ["000000000/a/1_.jpg"]),
    ],
)
def test_member_names(paths: list[str], names: list[str]) -> None:
    assert member_names(paths) == names


def test_images_of_any_name_come_through(tmp_path: Path) -> None:
    names = ["cat/a.b.c.png", "cat/a.b.png", "dog/ü日本.png", "dog/" + "x" * 150 + ".png", "dog/ü日本.jpg", "cat/a.png"]
    for number, name in enumerate(names):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "data" / name, "PNG")
    data = read_data(tmp_path / "data")
    pack(data, tmp_path / "out", 15_000)
    packed = read_data(tmp_path / "out")
    assert all(shard.stat().st_size <= 15_000 for shard in (tmp_path / "out").glob("*.tar"))
    before, after = (find_duplicates([each.file(s) for s in each.samples]) for each in (data, packed))
    assert before.fingerprints == after.fingerprints  # the same images in the same order
    assert [s.label for s in packed.samples] == [s.label for s in data.samples]
    rows = [*webdataset_rows(tmp_path / "out")]
    assert len(rows) == len(names)
    assert Counter(int(row["cls"]) for row in rows) == {0: 3, 1: 3}


def test_splits_and_groups_are_kept(shapes: Path, tmp_path: Path) -> None:
    data = read_data(shapes)
    rows = [
        (s.path, data.classes[s.label], "train" if i % 3 else "val", f"g{i // 6}") for i, s in enumerate(data.samples)
    ]
    with (shapes / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split", "group"), *rows])
    pack(read_data(shapes / "list.csv"), tmp_path / "out", SIZE)
    packed = read_data(tmp_path / "out")
    assert [(s.name, packed.classes[s.label], s.split, s.group) for s in packed.samples] == rows


@pytest.mark.parametrize("later", [10**9, -(10**12)])  # -: an older image took its place
def test_a_second_pack_writes_nothing_and_a_changed_image_only_its_shard(
    shapes: Path, tmp_path: Path, later: int
) -> None:
    out = tmp_path / "out"
    first = pack(read_data(shapes), out, SIZE)
    before = contents(out)
    again = pack(read_data(shapes), out, SIZE)
    assert (again.kept, contents(out)) == (first.shards, before)
    changed = shapes / "disc" / "003.png"
    pixels = bytearray(changed.read_bytes())
    pixels[-20] ^= 1  # as many bytes as before
    changed.write_bytes(pixels)
    date = (out / "images-000000.index").stat().st_mtime_ns + later
    os.utime(changed, ns=(date, date))
    assert pack(read_data(shapes), out, SIZE).kept == first.shards - 1
    assert pixels in b"".join(contents(out).values())


def test_a_relabelled_image_is_written_again(shapes: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out", read_data(shapes)
    shards = pack(data, out, SIZE).shards
    moved = (dataclasses.replace(data.samples[0], label=2), *data.samples[1:])
    assert pack(dataclasses.replace(data, samples=moved), out, SIZE).kept == shards - 1


def test_a_killed_pack_goes_on_and_is_not_read(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data, opened = tmp_path / "out", read_data(shapes), Counter[str]()
    pack(data, tmp_path / "whole", SIZE)

    def crash(file: Any) -> io.BytesIO:
        opened["files"] += 1
        if opened["files"] == 13:
            raise CrashError
        return io.BytesIO(Path(file).read_bytes())

    monkeypatch.setattr(module, "open_file", crash)
    with pytest.raises(CrashError):
        pack(data, out, SIZE)
    assert not (out / "shards.json").exists()
    with pytest.raises(DataError, match="is an unfinished pack; to finish it: effnet pack") as refused:
        read_data(out)
    shards = sorted(out.glob("*.tar"))
    assert shards  # whole ones only
    assert all(each.read_bytes() == (tmp_path / "whole" / each.name).read_bytes() for each in shards)
    (out / ".images-000001.tar.abc").mkdir()  # as kill -9 leaves it
    monkeypatch.undo()
    command = str(refused.value).partition("it: effnet ")[2]
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(command))
    assert ended.value.code == 0
    assert f"{len(shards)} of them were there already" in capsys.readouterr().err
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("harm", ["cut", "flip", "gone", "index"])
def test_a_second_pack_repairs_a_shard(shapes: Path, tmp_path: Path, harm: str) -> None:
    out, data = tmp_path / "out", read_data(shapes)
    shards = pack(data, out, SIZE).shards
    before, shard = contents(out), out / "images-000001.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 255
    match harm:
        case "cut":
            shard.write_bytes(content[:20_000])
        case "flip":
            shard.write_bytes(content)
        case "gone":
            shard.unlink()
        case "index":
            shard.with_suffix(".index").write_bytes(b"x\ty\n")
    assert pack(data, out, SIZE).kept == shards - 1
    assert contents(out) == before


def test_another_size_replaces_all(shapes: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out", read_data(shapes)
    pack(data, out, SIZE)
    packed = pack(data, out, 10**9)
    assert sorted(contents(out)) == ["images-000000.index", "images-000000.tar", "manifest.csv", "shards.json"]
    assert (packed.shards, packed.kept, len(read_data(out))) == (1, 0, len(data))


def test_a_folder_with_something_else_is_left_alone(shapes: Path) -> None:
    with pytest.raises(ArgumentError, match="holds something else"):
        pack(read_data(shapes), shapes, SIZE)
    assert (shapes / "disc" / "000.png").exists()


def test_command(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shapes / "list.csv").write_text("path,label\ndisc/000.png,disc\nring/000.png,ring\nring/gone.png,ring\n")
    with pytest.raises(SystemExit) as ended:
        main(["pack", str(shapes / "list.csv"), str(tmp_path / "out"), "--shard-size", "1MB"])
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert "2 images in 1 shard" in said
    assert "left out: ring/gone.png does not exist" in said
    assert json.loads((tmp_path / "out" / "shards.json").read_text())["classes"] == ["disc", "ring"]


def test_training_from_shards_gives_the_bits_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("_draw", "write_report"):
        monkeypatch.setattr(f"effnet.training.result.{name}", lambda *_: None)
    shapes, spec = draw_images(tmp_path / "shapes", 16), write_spec(tmp_path / "spec.yaml")
    pack(read_data(shapes), tmp_path / "shards", SIZE)
    options = {**QUICK, "epochs": 2}
    train(shapes, spec, "scratch", out=tmp_path / "one", **options)
    with pytest.raises(CrashError):
        train(tmp_path / "shards", spec, "scratch", out=tmp_path / "two", progress=Recorder(stop=5), **options)
    resume(tmp_path / "two", workers=1)  # which opens the shards in a process of its own
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))
    with serve(tmp_path) as (address, _):
        train(f"{address}/shards", spec, "scratch", out=tmp_path / "three", **options)
        assert same(weights(tmp_path / "one"), weights(tmp_path / "three"))
        for model in ("one", "three"):  # val knows the images that either was trained on
            with pytest.raises(SystemExit) as ended:
                main(["val", str(tmp_path / model / "best"), f"{address}/shards", "--json", "--engine", "torch"])
            told = json.loads(capsys.readouterr().out)
            assert (ended.value.code, told["split"], told["seen_in_training"]) == (0, "test", 0)
    # a model of the folder knows in the shards which images it was trained on
    text, packed = (tmp_path / "one" / "split.csv").read_text(), read_data(tmp_path / "shards")
    assert match_split(text, shapes, packed).keys() == {sample.path for sample in packed.samples}


def test_two_packs_into_one_folder(tmp_path: Path) -> None:
    """The second would sweep away what the first is writing."""
    data, out = read_data(draw_images(tmp_path / "shapes", 2)), tmp_path / "packed"
    out.mkdir()
    with hold_lock(out), pytest.raises(ArgumentError, match=r"`out` .*packed'\) is in use by another process"):
        pack(data, out, SIZE)
    pack(data, out, SIZE)
