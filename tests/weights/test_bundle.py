from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import SETS, familiarity
from safetensors.torch import save_file
from torch import nn

import effnet
from effnet.arch.spec import Calibration, InputSpec, NumericPolicy
from effnet.data.dataset import Dataset, Sample
from effnet.errors import ArgumentError, BundleError, EffnetError
from effnet.weights.bundle import (
    Record,
    find_splits,
    open_bundle,
    read_config,
    read_record,
    read_split,
    save,
)

SPEC = effnet.spec("b0", width=0.25, depth=0.4, resolution=64, num_classes=3)
INPUT = InputSpec(64, 72, interpolation="bilinear", fit="pad")
CALIBRATION = Calibration(1.5, 0.7, 0.05, 300, "val")
SPLIT = "path,label,split,group\ncat/ü 1.jpg,cat,train,\n"
RECORD = Record(CALIBRATION, {"data": {"sha256": "ab", "n": 3}, "versions": ["0.1"]}, SPLIT)


@pytest.fixture
def network() -> effnet.EfficientNet:
    torch.manual_seed(0)
    return effnet.EfficientNet(SPEC, policy=NumericPolicy(1e-4, 0.05, "same")).eval()


@pytest.fixture
def folder(network: effnet.EfficientNet, tmp_path: Path) -> Path:
    context = {"classes": ["a", "b", "c"], "input": INPUT, "source": "here", "metrics": {"top1": 0.5}}
    return save(network, tmp_path / "bundle", **context)  # type: ignore[arg-type]


def test_everything_comes_back(network: effnet.EfficientNet, folder: Path) -> None:
    bundle = open_bundle(folder)
    assert bundle.config == read_config(folder)
    assert (bundle.config.spec, bundle.config.input, bundle.config.classes) == (SPEC, INPUT, ("a", "b", "c"))
    assert bundle.config.policy == network.policy == bundle.network.policy
    assert (bundle.config.source, bundle.config.metrics) == ("here", {"top1": 0.5})
    assert not bundle.network.training
    images = torch.randn(2, 3, 64, 50)
    assert torch.equal(network(images), bundle.network(images))


def test_a_stem_stride_comes_back(network: effnet.EfficientNet, folder: Path, tmp_path: Path) -> None:
    plain = effnet.create(effnet.spec(SPEC, stem_stride=1), weights=folder)
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[key]), key
    bundle = open_bundle(save(plain, tmp_path / "x"))
    assert bundle.config.spec.stem_stride == bundle.network.spec.stem_stride == 1
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(plain(images), bundle.network(images))


def test_a_bundle_from_before_stem_strides_has_a_stride_of_2(folder: Path) -> None:
    """Its digest is over the entries that it has."""
    values = json.loads((folder / "config.json").read_text())
    del values["digest"], values["spec"]["stem_stride"]
    values["digest"] = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    (folder / "config.json").write_text(json.dumps(values))
    assert open_bundle(folder).network.spec == SPEC


def test_a_channels_last_half_trained_network_is_saved_too(network: effnet.EfficientNet, tmp_path: Path) -> None:
    network = network.to(memory_format=torch.channels_last).train()
    network(torch.randn(4, 3, 64, 64)).sum().backward()
    bundle = open_bundle(save(network, tmp_path / "x"))
    for key, tensor in bundle.network.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[key]), key


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel, torch.compile])
def test_the_network_inside_a_wrapper_is_saved(network: effnet.EfficientNet, tmp_path: Path, wrap: Any) -> None:
    saved = open_bundle(save(wrap(network), tmp_path / "a")).network.state_dict()
    assert all(torch.equal(tensor, saved[key]) for key, tensor in network.state_dict().items())
    for other, words in ((network.state_dict(), "load_state_dict"), (nn.Linear(2, 2), "EfficientNet")):
        with pytest.raises(ArgumentError, match=rf"^`network` \(='{type(other).__name__}'\) must be .*{words}"):
            save(other, tmp_path / "b")  # type: ignore[arg-type]


def test_saving_replaces_a_bundle_and_nothing_else(network: effnet.EfficientNet, folder: Path) -> None:
    save(network, folder, classes=["x", "y", "z"])
    assert read_config(folder).classes == ("x", "y", "z")
    foreign = folder.parent / "foreign"
    (foreign / "sub").mkdir(parents=True)
    (foreign / "sub" / "data.txt").write_text("mine")
    (foreign / "config.json").write_text('{"format": "voc"}')
    (folder / "notes.txt").write_text("mine")
    for taken in (folder, foreign):
        with pytest.raises(ArgumentError, match="choose another folder"):
            save(network, taken)
    assert (folder / "notes.txt").exists()
    assert (foreign / "sub" / "data.txt").exists()


def test_nothing_half_written_stays(
    network: effnet.EfficientNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        save(network, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["model.safetensors", "config.json"])
def test_damage_is_noticed(folder: Path, where: str) -> None:
    blob = (folder / where).read_bytes()
    for damaged in (blob[: len(blob) // 2], blob[:-5] + bytes([blob[-5] ^ 1]) + blob[-4:]):
        (folder / where).write_bytes(damaged)
        with pytest.raises(BundleError, match=where.replace(".", r"\.")) as caught:
            open_bundle(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"classes": ["a", "b"]}, "must name the network's 3 outputs"),
        ({"input": {"size": -1}}, r"`size` \(=-1\) must be"),
        ({"policy": {"padding": "valid"}}, "Did you mean|choose from symmetric, same"),
        ({"sprec": 1}, "Did you mean 'spec'"),
        ({"spec": {"name": "x"}}, "was changed"),
        ({"spec": None}, "was changed"),
        ({"spec": effnet.spec(SPEC, depth=1.0).to_dict()}, "was changed since it was written"),
        ({"policy": vars(NumericPolicy(0.1))}, "was changed since it was written"),
        ({"format": 2, "effnet": "9.0", "anything": "new"}, r"newer effnet \(9\.0\).*format 2"),
        ({"calibration": vars(CALIBRATION)}, "changed since it was written"),
        ({"calibration": vars(CALIBRATION) | {"temperature": 0}}, "`temperature`"),
        ({"calibration": {"temperature": 2}}, "is missing"),
        ({"calibration": "hot"}, "must be a mapping"),
    ],
)
def test_a_changed_config(folder: Path, values: dict[str, object], words: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(BundleError, match=words):
        open_bundle(folder)


def test_weights_that_are_not_floating_point(folder: Path) -> None:
    """An engine gets float32 and nothing else, also from a config that was written anew."""
    whole = {name: torch.from_numpy(array).long() for name, array in open_bundle(folder).weights.items()}
    save_file(whole, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    del values["digest"]
    values["sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    values["digest"] = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(BundleError, match="does not hold the network"):
        open_bundle(folder)


def test_what_the_layers_compute_is_what_is_saved(network: effnet.EfficientNet, tmp_path: Path) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = 0.1, 0.3
    bundle = open_bundle(save(network, tmp_path / "x"))
    assert bundle.config.policy == NumericPolicy(0.1, 0.3, "same")
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(network(images), bundle.network(images))
    network.stem.norm.eps = 0.2  # type: ignore[assignment]
    with pytest.raises(ArgumentError, match="one eps and momentum"):
        save(network, tmp_path / "y")


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_the_input_has_the_networks_channels(channels: int, tmp_path: Path) -> None:
    network = effnet.EfficientNet(effnet.spec(SPEC, in_channels=channels))
    assert read_config(save(network, tmp_path / "x")).input.channels == channels
    larger = InputSpec(96, 96).with_channels(channels)
    assert read_config(save(network, tmp_path / "x", input=larger)).spec.resolution == 96
    with pytest.raises(ArgumentError, match=f"must have the network's {channels}"):
        save(network, tmp_path / "y", input=InputSpec(64, 72))


def test_a_config_that_is_nested_too_deeply(folder: Path) -> None:
    (folder / "config.json").write_text('{"effnet": "1", "format": ' + "[" * 100_000)
    with pytest.raises(BundleError, match=r"config\.json is damaged.*nested too deeply"):
        open_bundle(folder)
    with pytest.raises(EffnetError):
        effnet.load(folder)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a bundle: it has no config\.json"):
        open_bundle(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": []}')
    with pytest.raises(BundleError, match="not effnet's"):
        open_bundle(tmp_path)


def test_wrong_arguments(network: effnet.EfficientNet, tmp_path: Path) -> None:
    for classes, words in ((["one"], "the network's 3 outputs"), ("abc", "a sequence of names"), (list("aba"), "'a'")):
        with pytest.raises(ArgumentError, match=f"`classes`.*{words}"):
            save(network, tmp_path / "x", classes=classes)
    grouped = effnet.EfficientNet(SPEC, norm=lambda channels: nn.GroupNorm(8, channels))
    with pytest.raises(ArgumentError, match="must have the tensors of its spec"):
        save(grouped, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_what_a_training_leaves_comes_back(network: effnet.EfficientNet, tmp_path: Path) -> None:
    folder = save(network, tmp_path / "x", classes=["a", "b", "c"], record=RECORD)
    config = open_bundle(folder).config
    assert config == read_config(folder)
    assert (config.calibration, config.provenance) == (CALIBRATION, RECORD.provenance)
    assert config.files == {"split.csv": hashlib.sha256(SPLIT.encode()).hexdigest()}
    assert read_split(folder) == SPLIT
    assert read_record(folder) == RECORD
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "split.csv"]
    assert read_split(save(network, tmp_path / "x")) is None
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["config.json", "model.safetensors"]


def test_what_a_model_knows_of_its_limits_comes_back(network: effnet.EfficientNet, tmp_path: Path) -> None:
    known = familiarity(SPEC.head_channels, 3)
    folder = save(network, tmp_path / "x", record=Record(CALIBRATION, sets=SETS, familiarity=known))
    config = open_bundle(folder).config
    assert (config.sets, config.familiarity) == (SETS, known)
    assert read_record(folder) == Record(CALIBRATION, sets=SETS, familiarity=known)
    written = json.loads((folder / "config.json").read_text())
    assert written["familiarity"]["tensors"] == ""  # they are in a file of their own
    assert list(written["files"]) == ["familiarity.safetensors"]
    again = save(network, folder, record=read_record(folder))  # such a folder is replaced
    assert read_config(again) == config

    content = bytearray((folder / "familiarity.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "familiarity.safetensors").write_bytes(content)
    with pytest.raises(BundleError, match=r"familiarity\.safetensors was changed or cut short"):
        open_bundle(folder)


def test_a_score_of_logits_has_no_file(network: effnet.EfficientNet, tmp_path: Path) -> None:
    known = familiarity(SPEC.head_channels, 3, "energy")
    folder = save(network, tmp_path / "x", record=Record(familiarity=known))
    assert read_config(folder).familiarity == known
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"score": "mahalonobis"}, "Did you mean 'mahalanobis'"),
        ({"threshold": "low"}, "`threshold`"),
        ({"n": 0}, "`n`"),
        ({"aurocs": {"energy": (0.9, 0.8, 1.0)}}, "mahalanobis among them"),
        ({"aurocs": {"mahalanobis": (0.9, 0.8)}}, "three numbers"),
        ({"tensors": None}, "`tensors`"),
    ],
)
def test_familiarity_has_sensible_values(values: dict[str, Any], words: str) -> None:
    known = familiarity(8, 2)
    fields = {name: getattr(known, name) for name in known.__dataclass_fields__}
    with pytest.raises(ArgumentError, match=words):
        type(known)(**fields | values)
    with pytest.raises(ArgumentError, match="safetensors file in base64"):
        _ = type(known)(**fields | {"tensors": "AAAA"}).arrays


@pytest.mark.parametrize("floors", [(0.5,) * 51, (1.5,), ("a",)])
def test_floors_are_probabilities(floors: tuple[Any, ...]) -> None:
    with pytest.raises(ArgumentError, match="`floors`"):
        type(SETS)(30, "val", floors)


def test_a_plain_bundle_is_what_it_always_was(folder: Path) -> None:
    config = read_config(folder)
    assert (config.calibration, config.provenance, config.files) == (None, {}, {})
    assert read_split(folder) is None
    written = json.loads((folder / "config.json").read_text())
    names = ["format", "effnet", "spec", "policy", "input", "classes", "source", "metrics", "sha256", "digest"]
    assert list(written) == names
    digest = written.pop("digest")  # over the entries that are there, as of the first version on
    assert digest == hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()


def test_a_changed_split_is_noticed(network: effnet.EfficientNet, tmp_path: Path) -> None:
    folder = save(network, tmp_path / "x", record=RECORD)
    (folder / "split.csv").write_text(SPLIT.replace("train", "test"), encoding="utf-8")
    with pytest.raises(BundleError, match=r"split\.csv was changed or cut short"):
        read_split(folder)
    (folder / "split.csv").unlink()
    with pytest.raises(BundleError, match=r"split\.csv cannot be read"):
        read_split(folder)
    assert open_bundle(folder).config.calibration == CALIBRATION


def test_the_parts_of_images_are_read_for_a_bundle_with_a_split(
    network: effnet.EfficientNet, folder: Path, tmp_path: Path
) -> None:
    text = 'path,label,split,group\n"a, b/1.jpg",a,train,\nb/2.jpg,b,test,7\n'
    trained = save(network, tmp_path / "x", record=Record(provenance={"data": "x"}, split=text))
    data = Dataset(tmp_path, ("a", "b"), (Sample("a, b/1.jpg", 0), Sample("b/2.jpg", 1)))
    parts = find_splits(str(trained), data)
    assert parts is not None
    assert [parts.get(sample.path) for sample in data.samples] == ["train", "test"]
    assert find_splits(str(folder), data) is None
    assert find_splits("lite0", data) is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": 0}, "`temperature`"),
        ({"temperature": float("nan")}, "`temperature`"),
        ({"threshold": 1.5}, r"`threshold` \(=1\.5\) must be from 0 to 1"),
        ({"error": -0.1}, "`error`"),
        ({"n": 0}, "`n`"),
    ],
)
def test_a_calibration_has_sensible_values(values: dict[str, float], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        Calibration(**{**vars(CALIBRATION), **values})
    assert Calibration(**{**vars(CALIBRATION), "threshold": None}).threshold is None


def test_provenance_is_what_json_can_hold(network: effnet.EfficientNet, tmp_path: Path) -> None:
    for provenance in ({"folder": tmp_path}, {"loss": float("nan")}):
        with pytest.raises(ArgumentError, match=r"`provenance`.*JSON"):
            save(network, tmp_path / "x", record=Record(provenance=provenance))
    assert list(tmp_path.iterdir()) == []
    config = read_config(save(network, tmp_path / "x", record=Record(provenance={"sizes": (1, 2)})))
    assert config.provenance == {"sizes": [1, 2]}
