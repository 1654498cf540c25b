import pytest

from effnet import fields
from effnet.errors import ArgumentError
from effnet.fields import parse_bytes, parse_count, parse_seconds, write_count


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("1G", 10**9),
        ("390M", 390 * 10**6),
        ("1.5B", 15 * 10**8),
        ("1e9", 10**9),
        ("12 k", 12_000),
        (7, 7),
        ("7", 7),
        ("1,000,000", 10**6),
        ("1,500M", 15 * 10**8),
        ("1_000", 1000),
        (".5M", 500_000),
        (".29G", 290_000_000),  # .29 is no binary number
    ],
)
def test_counts(written, number):
    assert parse_count("macs", written) == number


@pytest.mark.parametrize(
    ("written", "number"),
    [("100MB", 10**8), ("100MiB", 100 * 2**20), ("1.5 GiB", 3 * 2**29), ("8gb", 8 * 10**9), ("512B", 512), (99, 99)],
)
def test_bytes(written, number):
    assert parse_bytes("memory", written) == number


@pytest.mark.parametrize(
    ("written", "number"), [("20ms", 0.02), ("0.02s", 0.02), ("500us", 5e-4), ("500 µs", 5e-4), (0.02, 0.02)]
)
def test_seconds(written, number):
    assert parse_seconds("latency", written) == pytest.approx(number)


@pytest.mark.parametrize(
    ("parse", "written", "words"),
    [
        (parse_count, "1X", "390M, 1G"),
        (parse_count, "-1G", "390M, 1G"),
        (parse_count, "", "390M, 1G"),
        (parse_count, "0", "at least 1 and at most"),
        (parse_count, True, "390M, 1G"),
        (parse_count, None, "390M, 1G"),
        (parse_bytes, "100", "100MB"),
        (parse_bytes, "10M", "Did you mean 10MB"),
        (parse_bytes, "100Mb", "A small b is a bit. Did you mean 100MB"),
        (parse_bytes, "8Gib", "Did you mean 8GiB"),
        (parse_count, "1GB", "Did you mean 1G"),
        (parse_count, "0.5", "at least 1"),
        (parse_count, "1e400", "at most"),
        (parse_count, "1,5G", "Did you mean 1.5G"),  # not 15G
        (parse_count, "15,00", "Did you mean 15.00"),
        (parse_count, "1,2,3", "390M, 1G"),
        (parse_seconds, "0,5s", "Did you mean 0.5s"),
        (parse_bytes, "10Gi", "Did you mean 10GiB"),
        (parse_seconds, "20", "20ms"),
        (parse_seconds, "20m", "Did you mean 20ms"),
        (parse_seconds, float("inf"), "20ms"),
        (parse_seconds, "1e999s", "at most"),
    ],
)
def test_wrong_amounts_list_the_right_ones(parse, written, words):
    with pytest.raises(ArgumentError, match=words) as caught:
        parse("limit", written)
    assert "`limit`" in str(caught.value)


def test_one_is_not_written_as_several():
    assert [write_count(count, "image") for count in (0, 1, 2000)] == ["0 images", "1 image", "2,000 images"]
    assert [write_count(count, "image", "have") for count in (1, 2)] == ["1 image has", "2 images have"]
    assert [write_count(count, "image", "are") for count in (1, 2)] == ["1 image is", "2 images are"]


@pytest.mark.parametrize("check", [fields.positive_float, fields.rate, fields.ratio, fields.non_negative_float])
def test_whole_numbers_beyond_floats(check):
    with pytest.raises(ArgumentError, match=r"`phi` \(=1000"):
        check("phi", 10**400)


@pytest.mark.parametrize("check", [fields.positive_int, fields.non_negative_int])
def test_whole_numbers_beyond_64_bits(check):
    assert check("batch", 2**63 - 1) == 2**63 - 1
    with pytest.raises(ArgumentError, match=r"`batch` \(=9223372036854775808\) must be at most 2\^63 - 1"):
        check("batch", 2**63)


def test_a_seed_has_32_bits():
    assert fields.seed_number("seed", 2**32 - 1) == 2**32 - 1
    for wrong in (2**32, -1, 1.5, None):
        with pytest.raises(ArgumentError, match="`seed`"):
            fields.seed_number("seed", wrong)
