"""Images in shards: read by every command like files, damaged ones named, and through a server that answers ranges."""

from __future__ import annotations

import json
import multiprocessing
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranges import serve
from tiny import draw_images

from effnet.checking.findings import check, clean
from effnet.cli import main
from effnet.data.dataset import read_data, write_manifest
from effnet.data.image import open_photo
from effnet.data.paths import expand
from effnet.data.shards import file_size, name_of, open_file, url
from effnet.errors import DataError, ImageError
from effnet.packing.pack import pack

SIZE = 30_000


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    return draw_images(tmp_path / "shapes", 8)


@pytest.fixture
def shards(shapes: Path, tmp_path: Path) -> Path:
    pack(read_data(shapes), tmp_path / "shards", SIZE)
    return tmp_path / "shards"


@pytest.fixture
def server(shards: Path) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    with serve(shards.parent) as (address, asked):
        yield f"{address}/shards", asked


def test_every_image_is_that_of_the_folder(shapes: Path, shards: Path) -> None:
    folder, packed = read_data(shapes), read_data(shards)
    assert packed.classes == folder.classes
    assert [(s.name, s.label) for s in packed.samples] == [(s.path, s.label) for s in folder.samples]
    for one, two in zip(folder.samples, packed.samples, strict=True):
        assert file_size(packed.file(two)) == folder.file(one).stat().st_size
        with open_file(packed.file(two)) as file:
            assert file.read() == folder.file(one).read_bytes()


def test_predict_names_the_images_of_shards(shards: Path) -> None:
    paths = [*expand([str(shards)])]
    assert sorted(map(name_of, (path.removeprefix(f"{shards}/") for path in paths))) == sorted(
        sample.name for sample in read_data(shards).samples
    )
    one = str(shards / "images-000001.tar")
    assert [*expand([one])] == [path for path in paths if path.startswith(f"{one}/")]
    assert open_photo(paths[0]).size == (32, 32)


def test_folders_named_like_shards_are_folders(tmp_path: Path) -> None:
    draw_images(tmp_path / "odd.tar", 2)
    data = read_data(tmp_path / "odd.tar")
    assert len(data) == 6
    with open_file(data.file(data.samples[0])) as file:
        assert file.read(4) == b"\x89PNG"
    assert len([*expand([str(tmp_path / "odd.tar")])]) == 6


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".tar", "a\0.tar"])
def test_names_that_no_file_has_are_passed_on(name: str) -> None:
    assert [*expand([name])] == [name]
    assert file_size(Path(name)) == -1


def test_a_tar_without_an_index_says_so(shards: Path) -> None:
    (shards / "images-000000.index").unlink()
    with pytest.raises(ImageError, match=r"images-000000\.index is missing"):
        open_file(shards / "images-000000.tar" / "disc" / "000.png")


def test_a_name_that_is_not_in_its_shard(shards: Path) -> None:
    with pytest.raises(ImageError, match="is not in its shard"):
        open_file(shards / "images-000000.tar" / "nothing.png")
    assert file_size(shards / "images-000000.tar" / "nothing.png") == -1


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ("gone", "the shard is missing"),
        ("cut", "the shard is cut short at 15,000 of"),
        ("longer", "the shard does not match its index"),
        ("index gone", "the shard's index is missing"),
        ("index", "the shard's index does not match"),
    ],
)
def test_a_damaged_shard_is_one_line_and_costs_no_other_image(shards: Path, harm: str, words: str) -> None:
    whole, shard = read_data(shards), shards / "images-000001.tar"
    index = shard.with_suffix(".index")
    inside = {sample.path for sample in whole.samples if sample.path.startswith("images-000001")}
    good = set()
    match harm:
        case "gone":
            shard.unlink()
        case "cut":
            rows = [line.split("\t") for line in index.read_text().splitlines()]
            good = {f"{shard.name}/{row[0]}" for row in rows if int(row[1]) + int(row[2]) <= 15_000}
            assert good
            shard.write_bytes(shard.read_bytes()[:15_000])
        case "longer":
            shard.write_bytes(shard.read_bytes() * 2)
        case "index gone":
            index.unlink()
        case "index":
            index.write_bytes(index.read_bytes().replace(b"0", b"1", 1))
    data = read_data(shards)
    assert {sample.path for sample in data.samples} == {sample.path for sample in whole.samples} - inside | good
    [(name, reason)] = data.passed_over
    assert name == shard.name
    assert words in reason
    lost = len(inside - good)
    assert reason.endswith(": 1 image is left out" if lost == 1 else f": {lost} images are left out")
    findings = check(data)
    [finding] = findings.of("shard")
    assert (finding.files, finding.severity) == ((shard.name,), "error")
    assert not findings.of("unreadable")


def test_flipped_bytes_cost_one_image(shards: Path) -> None:
    data, shard = read_data(shards), shards / "images-000001.tar"
    name, offset, *_ = (shards / "images-000001.index").read_text().splitlines()[2].split("\t")
    content = bytearray(shard.read_bytes())
    content[int(offset) + 100] ^= 4  # many a decoder would not notice
    shard.write_bytes(content)
    [finding] = check(read_data(shards)).of("unreadable")
    assert finding.files == (f"images-000001.tar/{name}",)
    assert "are not those that were packed" in finding.message
    assert len(read_data(shards)) == len(data)


@pytest.mark.parametrize(
    "numbers",
    ["", "\t1\tx\t2\t3", "\t-1\t9\t0\t0", "\t0\t-1\t0\t0", "\t0\t99999999999\t0\t0", "\t99999999999999999999\t0\t0\t0"],
)
def test_an_index_that_is_none_is_a_reason(shards: Path, numbers: str) -> None:
    """Whoever wrote it may have written its crc32 into shards.json as well."""
    shard, index = shards / "images-000000.tar", shards / "images-000000.index"
    name = index.read_text().partition("\t")[0]
    index.write_text(f"{name}{numbers}\n")
    described = json.loads((shards / "shards.json").read_text())
    described["shards"][0]["index_crc32"] = zlib.crc32(index.read_bytes())
    (shards / "shards.json").write_text(json.dumps(described))
    with pytest.raises(ImageError, match="index is damaged" if numbers else "is not in its shard"):
        open_photo(shard / name)
    assert check(read_data(shards)).of("unreadable")
    with pytest.raises(DataError, match=r"images-000000\.tar .*index is damaged"):
        [*expand([str(shards)])]


def test_nothing_left(shards: Path) -> None:
    for shard in shards.glob("*.tar"):
        shard.unlink()
    with pytest.raises(DataError, match=r"holds no image: images-000000\.tar: the shard is missing"):
        read_data(shards)


@pytest.mark.parametrize(
    "text", ["", "[]", 9**5 * "[", '{"format": 1}', '{"format": 1, "shards": [{"name": "a.tar"}]}', '{"format": 1e400}']
)
def test_what_is_not_a_description_of_shards_is_refused(shards: Path, text: str) -> None:
    (shards / "shards.json").write_text(text)
    with pytest.raises(DataError, match=r"shards\.json is not what effnet pack writes"):
        read_data(shards)


@pytest.mark.parametrize("name", ["../../secret.tar", "/etc/passwd", "a\0b", ""])
def test_a_description_names_files_beside_it(shards: Path, name: str) -> None:
    described = json.loads((shards / "shards.json").read_text())
    described["shards"][0]["name"] = name
    (shards / "shards.json").write_text(json.dumps(described))
    with pytest.raises(DataError, match=r"shards\.json is not what effnet pack writes"):
        read_data(shards)


def test_shards_of_a_newer_format_are_refused(shards: Path) -> None:
    described = json.loads((shards / "shards.json").read_text())
    (shards / "shards.json").write_text(json.dumps(described | {"format": 2}))
    with pytest.raises(DataError, match=r"newer effnet.*format 2"):
        read_data(shards)


def test_a_cleaned_list_names_images_in_shards(shards: Path, tmp_path: Path) -> None:
    data = read_data(shards)
    write_manifest(clean(data, check(data)), tmp_path / "lists" / "clean.csv")
    cleaned = read_data(tmp_path / "lists" / "clean.csv")
    assert all(open_photo(cleaned.file(sample)).size == (32, 32) for sample in cleaned.samples)
    assert {cleaned.file(s).resolve() for s in cleaned.samples} <= {data.file(s).resolve() for s in data.samples}


def test_a_cleaned_list_of_a_url(server: tuple[str, list[tuple[str, str]]], shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "lists" / "clean.csv"
    with pytest.raises(SystemExit) as ended:
        main(["check", server[0], "--fix", str(out), "--pictures", str(tmp_path / "copies.jpg")])
    assert ended.value.code == 0
    cleaned, local = read_data(out), read_data(shards)
    assert all(sample.path.startswith(f"{server[0]}/images-0") for sample in cleaned.samples)
    fixed = clean(local, check(local))
    assert [(s.path.removeprefix(f"{server[0]}/"), s.label) for s in cleaned.samples] == [
        (s.path, s.label) for s in fixed.samples
    ]
    for one, two in zip(cleaned.samples, fixed.samples, strict=True):
        assert open_file(cleaned.file(one)).read() == open_file(local.file(two)).read()


@pytest.mark.parametrize("split", ["train", "images"])
def test_shards_without_their_description_are_no_empty_folder(tmp_path: Path, split: str) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / f"{split}-000000.tar").write_bytes(bytes(10_240))
    for read in (read_data, lambda folder: [*expand([str(folder)])]):
        with pytest.raises(
            DataError, match=rf"odd has shards \({split}-000000\.tar\) and no shards\.json: an unfinished"
        ):
            read(tmp_path / "odd")


def _sizes(paths: list[str]) -> list[int]:
    return [file_size(Path(path)) for path in paths]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_processes_open_shards_anew(shards: Path, method: str) -> None:
    paths = [*expand([str(shards)])]
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(_sizes, (paths,)) == _sizes(paths)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("https:/host/a", "https://host/a"),
        ("s3://bucket/a", "s3://bucket/a"),
        (Path("gs://bucket/a"), "gs://bucket/a"),
        ("C:/photos", ""),
        ("photos/a:/b", ""),
        ("/photos", ""),
    ],
)
def test_url(path: str, expected: str) -> None:
    assert url(path) == expected


def test_shards_behind_a_url(server: tuple[str, list[tuple[str, str]]], shards: Path) -> None:
    address, asked = server
    data = read_data(address)
    local = read_data(shards)
    assert data.samples == local.samples
    sample = data.samples[5]
    shard, name = sample.path.split("/", 1)
    asked.clear()
    with open_file(data.file(sample)) as file:
        assert file.read() == open_file(local.file(sample)).read()
    rows = (line.split("\t") for line in (shards / shard).with_suffix(".index").read_text().splitlines())
    start, size = next((int(row[1]), int(row[2])) for row in rows if row[0] == name)
    assert asked == [(shard, f"bytes={start}-{start + size - 1}")]  # one request, of that image
    assert check(data).findings == check(local).findings
    assert [*expand([address])] == [
        f"{address}/{path}" for path in (p.split("shards/")[1] for p in expand([str(shards)]))
    ]


def test_a_cut_shard_behind_a_url(server: tuple[str, list[tuple[str, str]]], shards: Path) -> None:
    (shards / "images-000000.tar").write_bytes((shards / "images-000000.tar").read_bytes()[:5000])
    (shards / "images-000001.tar").unlink()
    reasons = [reason for _, reason in read_data(server[0]).passed_over]
    assert ["cut short" in reasons[0], "missing" in reasons[1]] == [True, True]


def test_a_url_without_shards(server: tuple[str, list[tuple[str, str]]], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check", f"{server[0]}/nothing"])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert f"{server[0]}/nothing/shards.json" in said
    assert said.count("\n") == 1


def test_a_server_that_fails_is_one_line(server: tuple[str, list[tuple[str, str]]]) -> None:
    with pytest.raises(DataError, match=r"broken/shards\.json cannot be read: .*503"):
        read_data(f"{server[0]}/broken")


def test_a_scheme_that_needs_a_package() -> None:
    with pytest.raises(DataError, match=r"gs://bucket/a/shards.json cannot be read: Please install gcsfs"):
        read_data("gs://bucket/a")
