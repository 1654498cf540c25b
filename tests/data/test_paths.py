"""expand and read_ahead: the named files lazily and in order, with exactly one answer each."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from glob import iglob
from itertools import count, islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet.data import paths as module
from effnet.data.paths import expand, read_ahead
from effnet.errors import ArgumentError, ImageError

# fmt: off
TREE = [
    "2.jpg", "10.jpg", "1.JPG", "notes.txt", ".hidden.jpg", "raw.cr2",
    "cats/a.png", "cats/b/c.webp", "cats/b/.d.png", ".git/e.png",
    "dogs/f.gif", "dogs/10/g.tif", "dogs/9/h.AVIF", "dogs/notes.md",
    "empty/readme.txt",
]
# fmt: on


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in TREE:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


IMAGES = ["1.JPG", "2.jpg", "10.jpg", "cats/a.png", "cats/b/c.webp", "dogs/9/h.AVIF", "dogs/10/g.tif", "dogs/f.gif"]


@pytest.mark.parametrize("folder", ["photos", "./photos/", "photos/../photos"])
def test_a_folder_gives_its_images_in_natural_order(tree: Path, folder: str) -> None:
    assert list(expand([folder])) == [f"{folder.rstrip('/')}/{name}" for name in IMAGES]


def test_natural_order_counts_numbers_and_ignores_case(tree: Path) -> None:
    names = ["01.png", "1.png", "2b3.png", "2B20.png", "10.png", "A.png", "B1.png", "b02.png", "B.10.png", "²5.png"]
    for name in reversed(names):
        (tree / "photos/empty" / name).touch()
    assert list(expand(["photos/empty"])) == [f"photos/empty/{name}" for name in names]


def test_names_are_passed_on_as_they_are(tree: Path) -> None:
    named = ["missing.jpg", "./photos/notes.txt", "photos//2.jpg", "photos/.hidden.jpg", "", "x" * 300, "a\0b"]
    assert list(expand(named)) == named
    assert list(expand("photos/2.jpg")) == ["photos/2.jpg"]
    assert list(expand([])) == []
    dogs = [f"photos/{name}" for name in IMAGES[5:]]  # in the order of the sources
    assert list(expand(["photos/dogs", "b.jpg", "photos/cats/*.png"])) == [*dogs, "b.jpg", "photos/cats/a.png"]


def test_links_are_followed_but_not_in_circles(tree: Path) -> None:
    (tree / "photos/cats/b/up").symlink_to(tree / "photos/cats")
    (tree / "photos/empty/pets").symlink_to(tree / "photos/cats/b")
    (tree / "photos/empty/self.jpg").symlink_to(tree / "photos/empty/self.jpg")
    (tree / "photos/empty/gone.jpg").symlink_to(tree / "nowhere")
    assert list(expand(["photos/cats"])) == ["photos/cats/a.png", "photos/cats/b/c.webp"]
    found = list(expand(["photos/empty"]))
    assert found[:2] == ["photos/empty/gone.jpg", "photos/empty/pets/c.webp"]
    assert found[-1] == "photos/empty/self.jpg"  # its reader says what is wrong with it
    assert len(found) == len(set(found)) == 4  # and pets/up/a.png


def test_a_folder_that_cannot_be_listed_is_passed_on(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: str) -> Iterator[os.DirEntry[str]]:
        if path.endswith("cats"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert list(expand(["photos"]))[2:5] == ["photos/10.jpg", "photos/cats", "photos/dogs/9/h.AVIF"]
    assert list(expand(["photos/cats"])) == ["photos/cats"]


def test_a_folder_without_images_is_an_error(tree: Path) -> None:
    with pytest.raises(ArgumentError, match=r"`sources` \(='photos/empty'\) is a folder without an image.*\.jpg"):
        list(expand(["photos/empty"]))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("photos/*.jpg", ["2.jpg", "10.jpg"]),
        ("photos/?.[jJ][pP]*", ["1.JPG", "2.jpg"]),
        ("photos/*", ["1.JPG", "2.jpg", "10.jpg"]),  # images only
        ("photos/*.cr2", ["raw.cr2"]),  # unless the suffix is asked for
        ("photos/*/*", ["cats/a.png", "dogs/f.gif"]),
        ("photos/**/*.png", ["cats/a.png"]),
        ("photos/**", IMAGES),
        ("photos/**/*", IMAGES),
        ("photos/**/**/*.*", IMAGES),
        ("photos/**/b/**/*.webp", ["cats/b/c.webp"]),
        ("photos/[cd]*/*/*", ["cats/b/c.webp", "dogs/9/h.AVIF", "dogs/10/g.tif"]),
        ("ph*/dogs/1*/g.tif", ["dogs/10/g.tif"]),
    ],
)
@pytest.mark.parametrize("root", ["", "./", "/"])
def test_patterns(tree: Path, pattern: str, names: list[str], root: str) -> None:
    root = f"{tree}/" if root == "/" else root
    assert list(expand([root + pattern])) == [f"{root}photos/{name}" for name in names]


NAMES = st.sampled_from(["a", "b", "ab", "a.jpg", "b.jpg", "ab.png"])
PARTS = st.sampled_from(["*", "**", "a*", "?", "*.jpg", "[ab].jpg", "a", "[!a]*", "*b*"])


@settings(max_examples=100, deadline=None)
@given(
    files=st.sets(st.lists(NAMES, min_size=1, max_size=4).map("/".join), max_size=12),
    parts=st.lists(PARTS, min_size=1, max_size=4),
)
def test_patterns_equal_those_of_the_standard_library(
    tmp_path_factory: pytest.TempPathFactory, files: set[str], parts: list[str]
) -> None:
    root = tmp_path_factory.mktemp("tree")
    for name in files:
        path = root / name
        if not any(parent.is_file() for parent in path.parents) and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    pattern = "/".join([str(root), *parts])
    expected = {
        path
        for path in iglob(pattern, recursive=True)  # noqa: PTH207
        if path.endswith((".jpg", ".png")) and Path(path).is_file()
    }
    if any(character in "".join(parts) for character in "*?[") and not Path(pattern).exists():
        try:
            found = list(expand([pattern]))
        except ArgumentError:
            found = []
        assert len(found) == len(set(found))
        assert set(found) == expected


def test_a_name_that_exists_is_no_pattern(tree: Path) -> None:
    (tree / "cat[1].jpg").touch()
    (tree / "cat1.jpg").touch()
    (tree / "album[1]").mkdir()
    (tree / "album[1]/x.jpg").touch()
    assert list(expand(["cat[1].jpg"])) == ["cat[1].jpg"]
    assert list(expand(["cat[12].jpg"])) == ["cat1.jpg"]
    assert list(expand(["album[1]"])) == ["album[1]/x.jpg"]
    assert list(expand(["album[1]/*.jpg"])) == ["album[1]/x.jpg"]


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [("photos/2.[p]ng", "2.jpg"), ("phtos/*.jpg", "photos"), ("photos/catz/b/*.jpg", "cats"), ("empty/*", None)],
)
def test_a_pattern_without_images_names_the_nearest(tree: Path, pattern: str, hint: str | None) -> None:
    with pytest.raises(ArgumentError, match="is a pattern that no image matches") as caught:
        list(expand([pattern]))
    assert (f"Did you mean '{hint}'?" in str(caught.value)) is (hint is not None)


def test_only_folders_that_can_match_are_listed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    assert list(expand(["photos/c*/*.png"])) == ["photos/cats/a.png"]
    assert listed == ["photos/", "photos/cats"]


def test_a_list_is_read_as_it_comes(tree: Path) -> None:
    drawn = []

    def lines() -> Iterator[str]:
        for number in count():
            drawn.append(number)
            yield f"./photos/{number} *.jpg\r\n" if number % 2 else "\n"

    paths = expand(["first.jpg", "-"], lines())  # type: ignore[arg-type]
    assert next(paths) == "first.jpg"
    assert drawn == []
    assert list(islice(paths, 3)) == ["./photos/1 *.jpg", "./photos/3 *.jpg", "./photos/5 *.jpg"]
    assert drawn == [0, 1, 2, 3, 4, 5]


def test_a_list_keeps_spaces_and_its_last_line(tree: Path) -> None:
    listing = io.StringIO(" a b.jpg \n\nphotos\nc.jpg")
    assert list(expand(["-", "b.jpg"], listing)) == [" a b.jpg ", "photos", "c.jpg", "b.jpg"]
    with pytest.raises(ArgumentError, match=r"`sources` \(='-'\) needs a list of paths on standard input"):
        list(expand(["-"]))


@settings(max_examples=25, deadline=None)
@given(total=st.integers(0, 40), threads=st.integers(1, 5), window=st.integers(1, 9), seed=st.integers(0, 99))
def test_one_answer_for_each_path_in_order(total: int, threads: int, window: int, seed: int) -> None:
    delays = random.Random(seed)

    def read(number: int) -> int:
        time.sleep(delays.random() / 2000)
        if number % 3 == 1:
            raise ImageError(f"reason {number}")
        return number * number

    answers = list(read_ahead(range(total), read, threads=threads, window=window))
    assert [path for path, _ in answers] == list(range(total))
    for path, answer in answers:
        assert str(answer) == f"reason {path}" if path % 3 == 1 else answer == path * path
        assert isinstance(answer, ImageError) is (path % 3 == 1)


def test_at_most_window_paths_are_drawn_and_threads_share_the_work() -> None:
    drawn, working, most = 0, 0, 0
    lock = threading.Lock()

    def paths() -> Iterator[int]:
        nonlocal drawn
        while True:
            drawn += 1
            yield drawn

    def read(number: int) -> int:
        nonlocal working, most
        with lock:
            working += 1
            most = max(most, working)
        time.sleep(0.002)
        with lock:
            working -= 1
        return number

    answers = read_ahead(paths(), read, threads=3, window=8)
    for position, (path, _) in enumerate(islice(answers, 30)):
        assert path == position + 1
        assert drawn == position + 8  # this answer and seven more
    answers.close()
    assert most == 3
    for wrong in ({"threads": 0, "window": 2}, {"threads": 2, "window": 1.5}):
        with pytest.raises(ArgumentError, match="positive whole number"):
            next(read_ahead([], abs, **wrong))


def test_answers_are_ready_while_the_caller_works() -> None:
    begun: list[int] = []
    ready = threading.Event()
    answers = read_ahead(
        range(9), lambda number: begun.append(number) or (number == 4 and ready.set()), threads=1, window=5
    )
    assert next(answers)[0] == 0
    assert ready.wait(10)  # the caller works
    assert begun == [0, 1, 2, 3, 4]
    answers.close()


def test_closing_early_drops_what_has_not_begun() -> None:
    begun: list[int] = []

    def read(number: int) -> int:
        begun.append(number)
        time.sleep(0.01)
        return number

    answers = read_ahead(range(1000), read, threads=2, window=900)
    assert next(answers) == (0, 0)
    answers.close()
    assert len(begun) < 200
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read_ahead")]


@pytest.mark.parametrize("source", ["read", "paths"])
def test_other_errors_are_raised_in_their_turn(source: str) -> None:
    def fail_at_three(number: int) -> int:
        if number == 3:
            raise RuntimeError("a bug")
        return number

    paths, read = (range(100), fail_at_three) if source == "read" else (map(fail_at_three, count()), abs)
    answers = read_ahead(paths, read, threads=4, window=20)
    assert list(islice(answers, 3)) == [(0, 0), (1, 1), (2, 2)]
    with pytest.raises(RuntimeError, match="a bug"):
        next(answers)
    assert list(answers) == []


def test_an_answer_that_is_an_error_holds_no_pixels() -> None:
    def read(path: str) -> None:
        raise ImageError("reason") from OSError(path)

    (_, answer), = read_ahead(["a"], read, threads=1, window=1)  # fmt: skip
    assert isinstance(answer, ImageError)
    assert answer.args == ("reason",)
    assert (answer.__traceback__, answer.__cause__, answer.__context__) == (None, None, None)


def test_control_c_ends_at_once() -> None:
    code = (
        "import time\n"
        "from effnet.data.paths import read_ahead\n"
        "for path, _ in read_ahead(range(10**6), lambda path: time.sleep(0.05), threads=2, window=1000):\n"
        "    print(path, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout
        run.stdout.readline()
        begin = time.perf_counter()
        run.send_signal(signal.SIGINT)
        _, complaint = run.communicate(timeout=10)
    assert b"KeyboardInterrupt" in complaint
    assert time.perf_counter() - begin < 2


def test_the_suffixes_are_kinds_that_pillow_reads() -> None:
    from PIL import Image

    assert set(module.SUFFIXES) <= set(Image.registered_extensions())
