"""The command effnet val."""

import csv
import dataclasses
import json
import re
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from limits import SETS, familiarity
from PIL import Image
from prepared import preprocess

import effnet
from effnet.arch.spec import Calibration, InputSpec
from effnet.data.dataset import manifest, match_classes, read_data, split_data
from effnet.data.image import load_pixels
from effnet.metrics.evaluate import evaluate, predict_logits
from effnet.metrics.intervals import wilson
from effnet.metrics.sureness import measure_sureness
from effnet.weights.bundle import Record, open_bundle

COMMAND = "val"  # what `run` runs

NAMES = "blue", "green", "red"
TINY = effnet.spec("b0", width=0.25, depth=0.4, resolution=32, num_classes=3)
SEE = InputSpec(32, 36)


def painted(folder, each=24, noise=40):
    """A folder of coloured noise for each class, always the same."""
    random = np.random.default_rng(0)
    for channel, name in ((2, "blue"), (1, "green"), (0, "red")):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = random.normal(100, noise, (40, 48, 3)) + random.normal(0, noise, 3)
            pixels[:, :, channel] += 60
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def trained(data, steps):
    """A small network that has seen all images `steps` times, so that there is something to tell apart."""
    torch.manual_seed(0)
    network = effnet.EfficientNet(TINY).train()
    images = torch.from_numpy(np.stack([preprocess(data.file(sample), SEE) for sample in data.samples]))
    labels = torch.tensor([sample.label for sample in data.samples])
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # the statistics of these images alone
    with torch.no_grad():
        network(images)
    for norm in norms:
        norm.momentum = 0.01
    return network.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """photos; of the bundles "good" and "poor" with their split.csv, "plain" without, "nameless" without names."""
    folder = tmp_path_factory.mktemp("val")
    data = split_data(read_data(painted(folder / "photos")), val=0.25, test=0.25)
    record = Record(split=manifest(data))
    good, poor = trained(data, 8), trained(data, 0)
    effnet.save(good, folder / "good", classes=NAMES, input=SEE, record=record)
    effnet.save(poor, folder / "poor", classes=NAMES, input=SEE, record=record)
    effnet.save(good, folder / "plain", classes=NAMES, input=SEE)
    effnet.save(good, folder / "nameless", input=SEE)
    own = Record(Calibration(2.0, 0.4, 0.1, 18, "val"), split=manifest(data))
    effnet.save(good, folder / "calibrated", classes=NAMES, input=SEE, record=own)
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A folder to write into, with links to what was made."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def expected(split="test", model="good", **more):
    """The report by the library."""
    classifier = effnet.load(model)
    data = split_data(match_classes(read_data("photos"), classifier.classes, ""), val=0.25, test=0.25)
    logits, labels, _ = predict_logits(classifier.logits, classifier.input, data.subset(split))
    return evaluate(logits, labels, NAMES, **more)


def test_one_model(run, folder) -> None:
    code, out, err = run("good", "photos")
    assert code == 0
    found = expected()
    assert found.n == 18
    assert out.startswith("good on the test split of photos: 18 images\n")
    assert re.search(rf"top-1 +{found.top1.value:.2%} +{found.top1.low:.2%} to {found.top1.high:.2%}", out)
    assert re.search(rf"macro F1 +{found.macro_f1.value:.2%} +{found.macro_f1.low:.2%} to ", out)
    assert "top-5" not in out  # of three classes
    for score in found.scores:
        assert re.search(rf"{score.name} +6 .*{score.recall.low:.1%} to {score.recall.high:.1%}", out)
    assert f"ECE {found.before.ece:.1%}" in out
    assert "fitted on the 18 images of the data's val split" in out
    assert "Wilson's" in out
    assert "bootstrap" in out
    assert "Note: the splits are those of split.csv in good." in err
    assert err.endswith("Next: effnet val good photos --out val\n")


def test_one_model_in_json(run, folder) -> None:
    code, out, _ = run("good", "photos", "--json", "--split", "val")
    assert code == 0
    values = json.loads(out)
    found = expected("val")
    assert [values[name] for name in ("model", "data", "split", "n")] == ["good", "photos", "val", 18]
    assert values["top1"] == pytest.approx(asdict(found.top1))
    assert values["temperature"] == 1.0
    assert values["calibrated_on"] is None  # val is what is evaluated
    assert values["unreadable"] == {}


def test_files_are_written_where_asked(run, folder) -> None:
    code, _, err = run("good", "photos", "--out", "new/report")
    assert code == 0
    files = sorted(path.name for path in (folder / "new" / "report").iterdir())
    assert files == ["cams.jpg", "confusion_matrix.png", "mistakes.jpg", "per_class.csv", "reliability.png"]
    with (folder / "new" / "report" / "per_class.csv").open() as file:
        assert [row["images"] for row in csv.DictReader(file)] == ["6", "6", "6"]
    assert "Written: new/report/confusion_matrix.png, " in err
    assert err.endswith("Next: effnet predict PHOTO --model good\n")
    assert not (folder / "val").exists()


def test_a_page_is_written_where_asked(run, folder) -> None:
    code, _, err = run("good", "photos", "--report", "new/page.html")
    assert code == 0
    assert "Report: new/page.html" in err
    page = (folder / "new" / "page.html").read_text("utf-8")
    top1 = expected().top1
    assert f"{top1.value:.1%} ({top1.low:.1%} to {top1.high:.1%}) of 18 images of the test split" in page
    assert "The splits are those of split.csv in good." in page
    assert "effnet val good photos --split test --report new/page.html" in page
    assert "Nearest training images" in page  # split.csv says which these are


def test_a_bundles_own_calibration_is_used(run, folder) -> None:
    _, out, _ = run("calibrated", "photos", "--json")
    values = json.loads(out)
    assert (values["temperature"], values["threshold"]) == (2.0, 0.4)
    assert "18 val images of the run that trained calibrated" in values["calibrated_on"]
    answered = expected(temperature=2.0, threshold=0.4).abstention
    assert values["abstention"]["coverage"]["value"] == pytest.approx(answered.coverage.value)
    _, out, _ = run("calibrated", "photos")
    assert "Abstaining below 40.0% confidence to have at most 0.1 of the answers wrong" in " ".join(out.split())
    values = json.loads(run("calibrated", "photos", "--error", 0.9, "--json")[1])
    assert values["temperature"] != 2.0  # fitted again, on the data's val split
    assert values["threshold"] == 0.0


def test_what_a_model_says_of_its_limits_is_measured(run, folder) -> None:
    """Label sets and the score are the bundle's; the images are those of the test split."""
    network, data = open_bundle("good").network, split_data(read_data("photos"), val=0.25, test=0.25)
    known = familiarity(network.spec.head_channels, 3)
    classifier = effnet.load("good")
    logits, labels, _ = predict_logits(classifier.logits, classifier.input, data.subset("test"))
    pixels = np.stack([load_pixels(data.file(sample), classifier.input) for sample in data.subset("test").samples])
    scores = known.of(logits, classifier.maps(pixels)[1].mean((2, 3)))
    known = dataclasses.replace(known, threshold=float(np.sort(scores)[7]) + 1e-9)
    record = Record(Calibration(2.0, 0.4, 0.1, 30, "val"), split=manifest(data), sets=SETS, familiarity=known)
    effnet.save(network, folder / "limited", classes=NAMES, input=SEE, record=record)

    values = json.loads(run("limited", "photos", "--json")[1])["sureness"]
    assert values == json.loads(
        json.dumps(measure_sureness(logits, labels, 2.0, sets=SETS, told=(known, scores)).to_dict())
    )
    assert values["unfamiliar"] == asdict(wilson(8, 18))
    assert [each["coverage"] for each in values["sets"]] == [0.9, 0.95]
    assert values["curve"][0]["accuracy"]["value"] == (logits.argmax(1) == labels).mean()
    out = " ".join(run("limited", "photos")[1].split())
    assert f"Unfamiliar: {8 / 18:.1%} ({wilson(8, 18).low:.1%} to {wilson(8, 18).high:.1%}) of these images" in out
    assert "told by mahalanobis" in out
    assert "AUROC was 0.900 (0.800 to 0.970)" in out
    assert "Label sets for a coverage of 90% have the true label in" in out

    used = json.loads(run("limited", "photos", "--split", "val", "--json")[1])["sureness"]
    assert (used["sets"], used["unfamiliar"]) == ([], None)  # by what was fitted on these images
    assert "not measured" in run("limited", "photos", "--split", "val")[1]


def test_label_sets_of_a_model_without_its_own_are_calibrated_on_the_datas_val_split(run, folder) -> None:
    values = json.loads(run("good", "photos", "--json")[1])["sureness"]
    assert [each["coverage"] for each in values["sets"]] == [0.9]  # 18 images; 95 % takes 19
    assert values["unfamiliar"] is None
    assert "calibrated on the 18 images of the data's val split" in " ".join(run("good", "photos")[1].split())


def test_val_is_never_fitted_on_what_is_evaluated(run, folder) -> None:
    _, out, _ = run("good", "photos", "--split", "val")
    assert "No temperature and no threshold" in out
    code, _, err = run("good", "photos", "--split", "all", "--error", 0.1)
    assert code == 2
    assert "needs a val split besides the evaluated one" in err


def test_two_models(run, folder) -> None:
    code, out, err = run("poor", "good", "photos", "--json")
    assert code == 0
    values = json.loads(out)
    a, b = expected(model="poor"), expected()
    assert (values["a"], values["b"]) == ("poor", "good")
    assert values["accuracy_a"] == pytest.approx(asdict(a.top1))
    assert values["accuracy_b"] == pytest.approx(asdict(b.top1))
    assert values["accuracy"]["value"] == pytest.approx(b.top1.value - a.top1.value)
    assert values["only_b"] - values["only_a"] == round(18 * (b.top1.value - a.top1.value))
    assert values["significant"]
    assert err.endswith("Next: effnet val good photos\n")
    gain = 100 * values["accuracy"]["value"]
    for models, better in ((("poor", "good"), "B"), (("good", "poor"), "A")):
        _, out, _ = run(*models, "photos")
        assert re.search(rf"{better} is better by {gain:.1f} points \([\d.]+ to [\d.]+\), p [=<] 0", out)
    _, out, err = run("good", "plain", "photos")
    assert "B minus A is +0.0 points" in out
    assert "p = 1." in out
    assert "plain has no split.csv that lists these images" in err


def test_models_with_their_classes_in_another_order(run, folder) -> None:
    turned = effnet.load("good").network
    with torch.no_grad():
        for parameter in (turned.classifier.weight, turned.classifier.bias):
            parameter.copy_(parameter[[2, 0, 1]].clone())
    effnet.save(turned, folder / "turned", classes=("red", "blue", "green"), input=SEE)
    for models in (("good", "turned"), ("turned", "good")):
        _, out, _ = run(*models, "photos", "--json")
        values = json.loads(out)
        assert values["accuracy_a"] == values["accuracy_b"] == pytest.approx(asdict(expected().top1))
        assert (values["only_a"], values["only_b"]) == (0, 0)


def test_unsplit_data_is_refused_without_an_option(run, folder) -> None:
    code, out, err = run("plain", "photos")
    assert code == 2
    assert out == ""
    assert "photos is not split, and plain has no split.csv" in err
    assert "--split all evaluates all 72 images" in err
    code, out, _ = run("plain", "photos", "--split", "all", "--json")
    assert (code, json.loads(out)["n"]) == (0, 72)


def test_an_unreadable_image_is_a_finding(run, folder) -> None:
    painted(folder / "own" / "test", 3)
    (folder / "own" / "test" / "red" / "bad.png").write_bytes(b"no image")
    code, out, err = run("plain", "own", "--json")
    assert code == 1
    values = json.loads(out)
    assert values["n"] == 9
    assert list(values["unreadable"]) == ["test/red/bad.png"]
    assert "unreadable: test/red/bad.png: is not an image" in err
    assert "1 of 10 images unreadable and not counted" in err
    for photo in (folder / "own").rglob("*.png"):
        photo.write_bytes(b"no image")
    code, _, err = run("plain", "own")
    assert code == 2
    assert re.search(r"none of the 10 images can be read; test/blue/\d.png: is not an image", err)


def test_a_leak_is_a_finding(run, folder) -> None:
    data = split_data(read_data("photos"), val=0.25, test=0.25)
    lines = manifest(data).replace(",train,", ",swap,").replace(",test,", ",train,").replace(",swap,", ",test,")
    (folder / "photos.csv").write_text(re.sub(r"^(?=\w+/)", "photos/", lines, flags=re.M))
    code, _, err = run("good", "photos.csv")
    assert code == 0  # other paths: nobody can know
    (folder / "here").mkdir()
    for name in NAMES:
        (folder / "here" / name).symlink_to(folder / "photos" / name)
    (folder / "here" / "split.csv").write_text(lines)
    code, out, err = run("good", "here/split.csv", "--json")
    assert code == 1
    values = json.loads(out)
    assert values["seen_in_training"] == values["n"] == 36
    assert "trained on 36 of these 36 images: the figures are too good" in err


def test_a_model_without_names(run, folder) -> None:
    code, _, err = run("nameless", "photos", "--split", "all")
    assert code == 2
    assert "nameless does not name its 3 outputs" in err
    assert "add --by-order" in err
    _, out, _ = run("nameless", "photos", "--split", "all", "--by-order", "--json")
    _, named, _ = run("plain", "photos", "--split", "all", "--json")
    assert json.loads(out)["top1"] == json.loads(named)["top1"]
    code, _, err = run("plain", "photos", "--split", "all", "--by-order")
    assert code == 2
    assert "plain has them" in err
    for name in ("a", "c"):
        (folder / "own" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(folder / "own" / name / "1.png")
    code, _, err = run("nameless", "own", "--split", "all", "--by-order")
    assert code == 2
    assert "its 3 outputs, and the data has 2 classes" in err
    assert "--by-order" not in err


def test_the_worst_of_many_classes(run, folder, monkeypatch) -> None:
    monkeypatch.setattr("effnet.evaluating.ALL_CLASSES", 2)
    monkeypatch.setattr("effnet.evaluating.WORST", 1)
    _, out, _ = run("poor", "photos")
    worst = min(expected(model="poor").scores, key=lambda score: score.f1)
    assert "The 1 classes of lowest F1, of 3 classes" in out
    assert [name for name in NAMES if re.search(rf"^ ?{name} +6", out, re.M)] == [worst.name]


def test_lite0_on_class_folders_of_its_names(run, folder, photos) -> None:
    for name, photo in (("tiger cat", "chelsea.png"), ("espresso", "coffee.png")):
        (folder / "own" / "test" / name).mkdir(parents=True)
        (folder / "own" / "test" / name / photo).write_bytes((photos / photo).read_bytes())
    code, out, _ = run("lite0", "own")
    assert code == 0
    assert re.search(r"top-1 +100.00% +34.24% to 100.00%", out)
    assert re.search(r"top-5 +100.00%", out)
    assert "2 classes with images, of 1000 classes" in out
    assert re.search(r"Without images here, .*: 'tench', .* and 990 more", " ".join(out.split()))


def test_imagenets_own_folders(run, folder, photos) -> None:
    for name, photo in (("n02123159", "chelsea.png"), ("n07920052", "coffee.png")):
        (folder / "own" / "val" / name).mkdir(parents=True)
        (folder / "own" / "val" / name / "1.png").write_bytes((photos / photo).read_bytes())
    code, out, _ = run("lite0", "own")
    assert code == 0
    assert re.search(r"top-1 +100.00%", out)
    assert "tiger cat" in out
    (folder / "own" / "val" / "n02123159").rename(folder / "own" / "val" / "n99999999")
    code, _, err = run("lite0", "own")
    assert code == 2
    assert "'n99999999' not among ImageNet's 1000" in err
    code, _, err = run("plain", "own")
    assert "'n07920052', 'n99999999' are unknown to it" in err


def test_a_class_without_images_is_listed(run, folder) -> None:
    for number, colour in enumerate(NAMES[:2]):
        shutil.copytree(folder / "photos" / colour, folder / "own" / "test" / f"{colour}{' ' * number}")
    code, out, _ = run("plain", "own")
    assert code == 0
    assert "3 classes" in out
    assert re.search(rf"^ ?{NAMES[2]} +0 ", out, re.M)
    assert f"Without images here, so not in these figures: '{NAMES[2]}'." in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["good"], "must be MODEL DATA, or MODEL OTHER-MODEL DATA"),
        (["a", "b", "c", "photos"], "must be MODEL DATA"),
        (["good", "good", "photos"], "name two models"),
        (["good", "photoss"], "Did you mean 'photos'?"),
        (["bad", "photos", "--split", "all"], "(='bad') is not known"),
        (["good", "photos", "--split", "trian"], "Did you mean 'train'?"),
        (["good", "photos", "--error", "5"], "`error` (=5.0) must be a share"),
        (["good", "poor", "photos", "--out", "x"], "is for one model"),
        (["good", "poor", "photos", "--report", "x.html"], "is for one model"),
        (["good", "poor", "photos", "--error", "0.1"], "is for one model"),
        (["good", "photos", "--report", "good"], "is a folder; name a file"),
        (["good", "photos", "--batch", "0"], "`batch` (=0)"),
        (["good", "photos", "--out", "good/config.json"], "is a file; name a folder"),
    ],
)
def test_wrong_usage(run, folder, words, message) -> None:
    code, out, err = run(*words)
    assert code == 2
    assert message in err
    assert out == ""


def test_without_matplotlib_the_extra_is_named_first(run, folder, monkeypatch) -> None:
    monkeypatch.setattr("effnet.plots.style.find_spec", lambda name: None)
    monkeypatch.setattr("effnet.evaluating.load", lambda *_, **__: pytest.fail("opened"))
    code, _, err = run("good", "photos", "--out", "x")
    assert code == 2
    assert "pip install 'effnet[plots]'" in err


def test_without_jinja2_the_extra_is_named_first(run, folder, monkeypatch) -> None:
    monkeypatch.setattr("effnet.evaluating.find_spec", lambda name: None)
    monkeypatch.setattr("effnet.evaluating.load", lambda *_, **__: pytest.fail("opened"))
    code, _, err = run("good", "photos", "--report", "x.html")
    assert code == 2
    assert "pip install 'effnet[report]'" in err
