"""The interface to the kernels: arguments are checked before any pointer is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from effnet import native
from effnet.errors import ArgumentError
from effnet.native import NativeNetwork, instruction_set, instruction_sets, sizes

# 8 pixels, 3 channels; stem of 8, k3 s2 pad 1; SiLU; head of 16; 5 classes; a block 8 -> 8 -> 16, k3 s1, squeeze 2
NUMBERS = [8, 3, 3, 2, 1, 8, 1, 16, 5, 1, 8, 8, 16, 3, 1, 1, 2, 0, 0]
SHAPES = [(3,), (8, 3, 3, 3), (8,), (8,), (8, 1, 3, 3), (8,), (8,), (2, 8), (2,), (8, 2), (8,), (16, 8), (16,), (16,)]
SHAPES += [(16, 16), (16,), (16,), (5, 16), (5,)]
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)


def arrays() -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.normal(size=shape).astype(np.float32) for shape in SHAPES]


def network(threads: int = 1) -> NativeNetwork:
    return NativeNetwork(NUMBERS, arrays(), "fp32", threads)


def test_it_answers_and_closes() -> None:
    first = network()
    logits = first(PIXELS)
    assert logits.shape == (2, 5)
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(network(3)(PIXELS), logits)  # the same bits, whatever the threads
    np.testing.assert_array_equal(first(PIXELS[1:]), logits[1:])
    assert first(PIXELS[:0]).shape == (0, 5)
    features = np.full((2, 4, 4, 16), np.nan, np.float32)
    np.testing.assert_array_equal(first(PIXELS, features), logits)
    weight, bias = arrays()[-2:]
    np.testing.assert_allclose(features.mean((1, 2)) @ weight.T + bias, logits, rtol=1e-4, atol=1e-5)
    assert len(first.phases()) == 6
    first.close()
    first.close()
    with pytest.raises(ArgumentError, match="closed"):
        first(PIXELS)


@pytest.mark.parametrize(
    ("at", "value", "fact"),
    [
        (0, 0, "size=0 must be from 1"),
        (1, -1, "channels=-1"),
        (2, 4, "stem_kernel=4 must be odd"),
        (3, 3, "stem_stride=3"),
        (4, 3, "stem_pad=3"),
        (6, 0, "activation=0"),
        (6, 4, "activation=4"),
        (9, 2, "the numbers end before in_channels"),
        (10, 9, "in_channels=9 must be from 8 to 8"),
        (11, 9, "expands=0 must be from 1"),
        (13, 65, "kernel_size=65"),
        (15, 3, "pad=3"),
        (17, 1, "shortcut=1 must be from 0 to 0"),
        (0, 60000, "2^31"),
        (0, 2**32 + 8, "4294967304 must be below 2^31"),  # whose lowest 32 bits are 8
        (8, 10**30, "must be below 2^31"),
        (11, 2**31 - 1, "expanded_channels=2147483647"),
    ],
)
def test_numbers_that_are_no_network_are_refused(at: int, value: int, fact: str) -> None:
    numbers = [*NUMBERS]
    numbers[at] = value
    with pytest.raises(ArgumentError) as error:
        NativeNetwork(numbers, arrays(), "fp32", 1)
    assert fact in str(error.value)
    with pytest.raises(ArgumentError):
        sizes(numbers, "fp32")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit the address space")
def test_too_little_memory_is_an_error_that_says_so() -> None:
    """Maps of 2,000 x 2,000 cells; 64 MiB are left."""
    program = (
        "import resource, sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_native import NUMBERS, NativeNetwork, arrays\n"
        "with open('/proc/self/statm') as file:\n"
        "    size = int(file.read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 2**26, size + 2**26))\n"
        "NativeNetwork(NUMBERS, arrays(), 'fp32', 1)\n"
        "try:\n"
        "    NativeNetwork([4000, *NUMBERS[1:]], arrays(), 'fp32', 1)\n"
        "except MemoryError as error:\n"
        "    print(error)\n"
    )
    words = [sys.executable, "-c", program, str(Path(__file__).parent)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=150)
    assert (done.returncode, done.stdout, done.stderr) == (0, "std::bad_alloc\n", "")


def test_numbers_left_over_are_refused() -> None:
    with pytest.raises(ArgumentError, match="1 are left over"):
        NativeNetwork([*NUMBERS, 0], arrays(), "fp32", 1)
    with pytest.raises(ArgumentError, match="the numbers end before size"):
        sizes([], "fp32")


@pytest.mark.parametrize("at", range(len(SHAPES)))
def test_every_array_has_the_length_of_its_layer(at: int) -> None:
    given = arrays()
    given[at] = given[at].reshape(-1)[:-1]
    with pytest.raises(ArgumentError, match=rf"={given[at].size} values must be {given[at].size + 1}"):
        NativeNetwork(NUMBERS, given, "fp32", 1)
    with pytest.raises(ArgumentError, match="the arrays end before"):
        NativeNetwork(NUMBERS, arrays()[:at], "fp32", 1)
    with pytest.raises(ArgumentError, match="1 are left over"):
        NativeNetwork(NUMBERS, [*arrays(), arrays()[0]], "fp32", 1)


@pytest.mark.parametrize("pixels", [PIXELS[:, 1:], PIXELS[..., :2], PIXELS.astype(np.float32), PIXELS[0]])
def test_other_pixels_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(ArgumentError, match="`pixels`"):
        network()(pixels)


@pytest.mark.parametrize(
    "features",
    [
        np.empty((2, 4, 4, 15), np.float32),
        np.empty((2, 4, 4, 16)),
        np.empty((2, 16, 4, 4), np.float32).transpose(0, 2, 3, 1),
    ],
)
def test_other_features_are_refused(features: np.ndarray) -> None:
    with pytest.raises(ArgumentError, match="`features`"):
        network()(PIXELS, features)


def test_pixels_may_be_a_view() -> None:
    images = np.random.default_rng(2).integers(0, 256, (4, 9, 8, 3), np.uint8)
    view = images[::2, 1:]
    np.testing.assert_array_equal(network()(view), network()(view.copy()))


def test_the_environment_chooses_an_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert instruction_sets()[-1] == "portable"
    assert instruction_set() == instruction_sets()[0]
    for name in instruction_sets():
        monkeypatch.setenv("EFFNET_ISA", name)
        assert instruction_set() == name
        assert network()(PIXELS).shape == (2, 5)
    monkeypatch.setenv("EFFNET_ISA", "avx9")
    with pytest.raises(ArgumentError, match=r"`EFFNET_ISA` \(='avx9'\) must be one of .*portable"):
        network()


def test_without_a_library(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("EFFNET_KERNELS", str(tmp_path / "none.so"))
    native.library.cache_clear()
    try:
        assert (instruction_sets(), instruction_set()) == ((), None)
        with pytest.raises(ImportError, match="without its compiled kernels"):
            network()
    finally:
        monkeypatch.undo()
        native.library.cache_clear()


def test_sizes_are_those_of_the_weights_and_the_maps() -> None:
    weights, work = sizes(NUMBERS, "fp32")
    assert weights >= 4 * sum(array.size for array in arrays())
    assert weights < 40_000  # padded to whole vectors
    assert work >= 4 * 2 * 4 * 4 * 16
