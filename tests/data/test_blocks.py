"""The order for slow disks: each image once an epoch, blocks read as a whole and in time, the same after a stop."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranges import serve
from short_run import QUICK, CrashError, Recorder
from tiny import draw_images, same, weights, write_spec

from effnet.data import blocks as module
from effnet.data.blocks import Blocks, find_blocks
from effnet.data.dataset import read_data
from effnet.data.loader import Order, Parts
from effnet.data.shards import member_of
from effnet.packing.pack import pack
from effnet.training.train import resume, train


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few of the tiny images, three to a window."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 10_000)
    monkeypatch.setattr(module, "WINDOW", 3)


def files_of(folder: Path) -> list[Path]:
    data = read_data(folder)
    return [data.file(sample) for sample in data.samples]


def blocks_of(sizes: list[int], window: int) -> Blocks:
    bounds = np.cumsum([0, *sizes])
    images = np.random.default_rng(1).permutation(bounds[-1])
    ranges = tuple(((f"{number}", 0, size),) for number, size in enumerate(sizes))
    return Blocks(images, bounds, ranges, window)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 8), st.integers(0, 3), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_every_image_once_and_each_window_whole(sizes: list[int], window: int, epoch: int, seed: int) -> None:
    blocks = blocks_of(sizes, window)
    order = blocks.permutation(np.random.default_rng((seed, epoch))).tolist()
    assert sorted(order) == list(range(sum(sizes)))
    block_of = {image: n for n in range(len(sizes)) for image in blocks.images[blocks.bounds[n] : blocks.bounds[n + 1]]}
    seen: list[int] = []  # blocks in the order in which they are first met
    for image in order:
        if block_of[image] not in seen:
            seen.append(block_of[image])
    at = 0
    for first in range(0, len(seen), window):
        inside = seen[first : first + window]
        count = sum(sizes[block] for block in inside)
        assert {block_of[image] for image in order[at : at + count]} == set(inside)
        at += count


def test_epochs_and_windows_are_mixed() -> None:
    blocks = blocks_of([50] * 12, 4)
    orders = [Order(600, 30, 30, 0, blocks=blocks).epoch(epoch) for epoch in (0, 0, 1)]
    one, again, other = ([key[1] for part in order for key in part] for order in orders)
    assert one == again
    assert one != other
    block_of = {image: place // 50 for place, image in enumerate(blocks.images.tolist())}
    assert len({block_of[image] for image in one[:30]}) == 4  # a step has images of all blocks of its window


@pytest.mark.parametrize("world", [1, 2])
def test_processes_parts_and_a_later_start_see_the_same_steps(world: int) -> None:
    blocks = blocks_of([7, 9, 4, 4, 8, 8], 2)
    whole = list(Order(40, 12, 12, 3, blocks=blocks).epoch(2))
    shares = [list(Order(40, 12, 3, 3, rank, world, blocks).epoch(2)) for rank in range(world)]
    for number, step in enumerate(whole):
        parts = 12 // (3 * world)
        seen = [key for share in shares for part in share[number * parts : (number + 1) * parts] for key in part]
        assert sorted(seen) == sorted(step)
    assert list(Order(40, 12, 12, 3, blocks=blocks).epoch(2, 1)) == whole[1:]


@pytest.mark.parametrize("start", [0, 5])
def test_blocks_are_read_before_their_images_are_needed(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = blocks_of([10] * 20, 4)
    read: list[int] = []
    monkeypatch.setattr(Blocks, "read_soon", lambda _, block: read.append(block))
    order = Order(200, 10, 5, 0, blocks=blocks)
    parts = Parts(order)
    parts.position = 3, start
    block_of = {image: place // 10 for place, image in enumerate(blocks.images.tolist())}
    needed = set()
    for number, part in enumerate(parts):
        needed |= {block_of[index] for _, index in part}
        assert needed <= set(read)
        assert len(read) <= 4 * (1 + (number * 5 + start * 10) // 40 - start * 10 // 40) + 4  # a window ahead at most
    assert len(read) == len(set(read)) == 20 - start * 10 // 40 * 4
    assert needed == set(read)


def test_blocks_of_shards_are_ranges_of_their_files(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_images(tmp_path / "shapes", 8)
    pack(read_data(tmp_path / "shapes"), tmp_path / "shards", 30_000)
    files = files_of(tmp_path / "shards")
    blocks = find_blocks(files)
    assert blocks.window == 3
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *rest: asked.append(rest))
    for number in range(len(blocks.ranges)):
        [(shard, first, count)] = blocks.ranges[number]
        inside = [files[index] for index in blocks.images[blocks.bounds[number] : blocks.bounds[number + 1]]]
        members = [member_of(file) for file in inside]
        assert {each[0] for each in members if each} == {shard}
        offsets = [each[1].offset for each in members if each]
        assert offsets == sorted(offsets)
        assert (first, first + count) == (offsets[0], offsets[-1] + members[-1][1].size)  # type: ignore[index]
        assert sum(each[1].size for each in members if each) <= 10_000
        blocks.read_soon(number)
        assert asked[-1] == (first, count, os.POSIX_FADV_WILLNEED)
    assert len(blocks.ranges) > 6


def test_blocks_of_a_folder_and_of_a_url(tmp_path: Path, small: None) -> None:
    folder = draw_images(tmp_path / "shapes", 8)
    files = files_of(folder)
    blocks = find_blocks(files)
    assert blocks.images.tolist() == list(range(24))
    assert [file for ranges in blocks.ranges for file, *_ in ranges] == list(map(str, files))
    assert all(sum(count for *_, count in ranges) <= 10_000 for ranges in blocks.ranges)
    blocks.read_soon(0)
    pack(read_data(folder), tmp_path / "shards", 30_000)
    with serve(tmp_path) as (address, asked):
        behind, beside = find_blocks(files_of(Path(f"{address}/shards"))), find_blocks(files_of(tmp_path / "shards"))
        assert np.array_equal(behind.images, beside.images)
        assert np.array_equal(behind.bounds, beside.bounds)
        assert not any(behind.ranges)
        asked.clear()
        behind.read_soon(0)
        assert not asked


def test_a_small_data_set_is_one_block(tmp_path: Path) -> None:
    assert len(find_blocks(files_of(draw_images(tmp_path, 4))).ranges) == 1


def test_a_stopped_run_in_blocks_goes_on_to_the_same_weights(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_draw", "write_report"):
        monkeypatch.setattr(f"effnet.training.result.{name}", lambda *_: None)
    spec = write_spec(tmp_path / "spec.yaml")
    pack(read_data(draw_images(tmp_path / "shapes", 16)), tmp_path / "shards", 30_000)
    options = {**QUICK, "epochs": 2}
    train(tmp_path / "shards", spec, "scratch", out=tmp_path / "one", shuffle="block", **options)
    with pytest.raises(CrashError):
        train(
            tmp_path / "shards",
            spec,
            "scratch",
            out=tmp_path / "two",
            shuffle="block",
            progress=Recorder(stop=5),
            **options,
        )
    resume(tmp_path / "two", workers=1)
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))
    train(tmp_path / "shards", spec, "scratch", out=tmp_path / "full", **options | {"shuffle": "full"})
    assert not same(weights(tmp_path / "one"), weights(tmp_path / "full"))
