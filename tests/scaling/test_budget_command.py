import json

import pytest
from ran import Run

import effnet


def test_a_budget_and_its_story(capsys):
    run = Run(capsys, "scale", "--macs", "1G", "--params", "10M")
    assert run.code == 0
    assert "binds" in run.out
    assert "b2 at 260 px, 0.9936 GMACs, top-1 80.1 %" in " ".join(run.out.split())
    assert "10% more MACs would buy" in run.out
    assert "not measured here" in " ".join(run.out.split())
    assert "Next: effnet scale --macs 1G --params 10M --save b0-" in run.err


def test_saved_networks_are_models(capsys, tmp_path):
    path = tmp_path / "small.yaml"
    run = Run(capsys, "scale", "--macs", "100M", "--num-classes", "10", "--save", path, "--json")
    values = json.loads(run.out)
    assert f"effnet info {path}" in run.err
    shown = json.loads(Run(capsys, "info", path, "--json").out)
    for name in ("width", "depth", "resolution", "macs", "params", "num_classes"):
        assert shown[name] == values[name], name
    assert shown["inference_memory_bytes"] == values["memory_bytes"]
    again = Run(capsys, "scale", "--from", path, "--phi", "1", "--json")
    assert json.loads(again.out)["macs"] > values["macs"]


def test_picture_of_the_candidates(capsys, tmp_path):
    picture = tmp_path / "budget.png"
    assert Run(capsys, "scale", "--train-memory", "4GB", "--batch", "8", "--plot", picture).code == 0
    assert picture.stat().st_size > 10_000


def test_pretrained(capsys):
    run = Run(capsys, "scale", "--macs", "1G", "--pretrained", "--json")
    assert json.loads(run.out)["name"] == "b2"


@pytest.mark.parametrize(("words", "way"), [((), "torch, fp32"), (("--engine", "onnxruntime"), "ONNX Runtime, fp32")])
def test_latency_on_this_machine(capsys, words, way):
    run = Run(capsys, "scale", "--latency", "1s", "--macs", "20M", "--threads", "1", "--json", *words)
    assert f"timed in {way}" in run.err
    values = json.loads(run.out)
    assert 0 < values["latency_ms"] <= 1000
    assert values["trials"]
    assert values["macs"] <= 20e6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--macs", "1G", "--phi", "1"), "does not go with --macs"),
        (("--macs", "1G", "--laws"), "does not go with --macs"),
        (("--macs", "lots"), "390M, 1G"),
        (("--batch", "16"), "needs `train_memory`"),
        (("--threads", "1"), "must limit something"),
        (("--macs", "1G", "--threads", "1"), "belongs to --latency"),
        (("--macs", "1G", "--save", "spec.txt"), "must end in .yaml"),
        (("--macs", "1G", "--plot", "plot.gif"), "must end in .png"),
        (("--macs", "1G", "--pretrained", "--plot", "plot.png"), "--pretrained"),
        (("--macs", "1k"), "cannot be met"),
        (("--latency", "1ms", "--engine", "openvio"), "openvino"),
    ],
)
def test_wrong_words(capsys, words, message):
    run = Run(capsys, "scale", *words)
    assert run.code == 2
    assert message in run.err
    assert not run.out


def test_training_memory_of_a_network(capsys):
    run = Run(capsys, "info", "b4", "--batch", "32", "--train-memory", "8GB", "--precision", "fp32", "--json")
    values = json.loads(run.out)
    rows = {row["keep"]: row for row in values["training"]}
    assert list(rows) == ["everything", "activations", "convolutions", "depthwise", "bottlenecks", "least work"]
    from effnet.arch.memory import largest_batch, training_memory

    spec = effnet.spec("b4")
    assert rows["everything"]["peak"] == training_memory(spec, 32).peak
    assert rows["bottlenecks"]["largest_batch"] == largest_batch(spec, 8 * 10**9, plan=effnet.arch.memory.Keep(0))
    assert rows["convolutions"]["extra_macs_share"] == 0
    table = Run(capsys, "info", "b4", "--batch", "32")
    assert "bottlenecks" in table.out
    assert "bf16" in table.out  # the choice of precision is said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--batch", "8"), "is about one network"),
        (("b0", "--optimizer", "adam"), "name the images per step"),
        (("b0", "--batch", "8", "--optimizer", "adamm"), "Did you mean 'adam'"),
        (("b0", "--batch", "8", "--blocks"), "does not go with"),
        (("b0", "--train-memory", "8"), "100MB"),
        (("b0", "--batch", "0"), "`batch`"),
    ],
)
def test_wrong_words_about_training(capsys, words, message):
    run = Run(capsys, "info", *words)
    assert run.code == 2
    assert message in run.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--macs", "1G", "--engine", "torch"), "belongs to --latency"),
        (("--macs", "1G", "--keep", "bottlenecks"), "train_memory"),
        (("--macs", "1G", "--pretrained", "--rule", "fast"), "does not go with --pretrained"),
        (("--macs", "1G", "--pretrained", "--width", "1"), "does not go with --pretrained"),
        (("--latency", "1s", "--plot", "plot.png"), "draws priced candidates"),
        (("--latency", "1s", "--threads", "100000"), "the cores of this machine"),
        (("--macs", "1G", "--max-resolution", "5"), "at least 32 pixels"),
    ],
)
def test_nothing_is_ignored_in_silence(capsys, words, message):
    run = Run(capsys, "scale", *words)
    assert run.code == 2
    assert message in run.err


def test_how_training_was_priced_is_said(capsys):
    run = Run(capsys, "scale", "--train-memory", "2GB", "--batch", "8", "--precision", "fp32", "--keep", "convolutions")
    assert "8 images a step, rmsprop, moving average, fp32, convolutions kept" in " ".join(run.out.split())


def test_published_networks_lead_to_their_weights(capsys):
    run = Run(capsys, "scale", "--macs", "400M", "--pretrained")
    assert "Next: effnet predict photo.jpg --model b0" in run.err


def test_the_plan_with_least_work(capsys):
    run = Run(capsys, "info", "b0", "--batch", "16", "--train-memory", "700MB", "--precision", "fp32", "--json")
    rows = {row["keep"]: row for row in json.loads(run.out)["training"]}
    assert rows["least work"]["peak"] <= 700e6 < rows["activations"]["peak"]


def test_a_published_network_with_smaller_images_is_still_published(capsys):
    run = Run(capsys, "scale", "--macs", "200M", "--pretrained")
    assert "top-1 77.1 % at 224 px" in " ".join(run.out.split())
    assert "--pretrained" not in run.out
    assert "Next: effnet predict photo.jpg --model b0" in run.err
