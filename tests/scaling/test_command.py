"""The command effnet scale."""

import json
from pathlib import Path

import pytest

import effnet
from effnet.arch.memory import inference_memory
from effnet.arch.specfile import read_spec
from effnet.cli import main
from effnet.scaling.compound import RULES, scale

COMMAND = "scale"  # what `run` runs

B0 = effnet.spec("b0")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def present(folder):
    return [path.name for path in folder.iterdir()]


def rows(out, *names):
    return {line.split()[0]: line.split() for line in out.splitlines() if line.split()[:1] and line.split()[0] in names}


def test_one_network(run):
    code, out, err = run("--phi", 1.5)
    assert code == 0
    price = effnet.cost(scale(B0, 1.5))
    for text in ("280", "24", "ceil", f"{price.macs / 1e9:.3f} G", f"{2 * price.macs / 1e9:.3f} G", "FLOPs"):
        assert text in out
    assert "Dropout 0.3, interpolated between b2 and b3" in out
    assert "promises 2.661x, 3.565x is built (+34%), which is phi 1.95" in out  # 1.92027^1.5
    assert err == "Next: effnet scale --phi 1.5 --save b0-phi1.5.yaml\n"


def test_one_network_as_json(run):
    code, out, err = run("--phi", 1, "--rule", "fast", "--json")
    network, price = scale(B0, 1, RULES["fast"]), effnet.cost(scale(B0, 1, RULES["fast"]))
    values = json.loads(out)
    assert (code, err) == (0, "Next: effnet scale --rule fast --phi 1 --save b0-phi1-fast.yaml\n")
    expected = {
        "width": network.width,
        "depth": network.depth,
        "resolution": 232,
        "depth_rounding": "ceil",
        "phi": 1,
        "dropout": network.dropout,
        "drop_connect": 0.2,
        "params": price.params,
        "macs": price.macs,
        "flops": 2 * price.macs,
        "activations": price.activations,
        "nominal_ratio": pytest.approx(2),
        "realised_ratio": price.macs / effnet.cost(B0).macs,
        "rule": vars(RULES["fast"]),
    }
    assert {name: values[name] for name in expected} == expected


def test_the_next_command_repeats_what_was_typed(run, folder):
    *_, err = run("--phi", -2, "--rule", "1.3,1,1.2", "--from", "lite0", "--depth-rounding", "ceil")
    _, command = err.strip().split("Next: effnet scale ")
    code, _, err = run(*command.split())
    assert code == 0
    (saved,) = present(folder)
    assert read_spec(saved).name == saved.removesuffix(".yaml") == "lite0-phi-2-a1.3-b1-g1.2-ceil"
    assert err == f"Next: effnet info {saved}\n"


def test_a_saved_network_is_a_model(run, capsys):
    run("--phi", 1, "--save", "new/my net.yaml")
    assert read_spec("new/my net.yaml") == scale(B0, 1)
    with pytest.raises(SystemExit) as left:
        main(["info", "new/my net.yaml", "--json"])
    assert left.value.code == 0
    assert json.loads(capsys.readouterr().out)["macs"] == effnet.cost(scale(B0, 1)).macs
    code, out, _ = run("--phi", 1, "--from", "new/my net.yaml", "--json")
    assert code == 0
    assert json.loads(out)["width"] == pytest.approx(1.1**2)


def test_the_rules_table(run):
    code, out, err = run()
    assert code == 0
    table = rows(out, "-2", "-1", *"1234567", *(f"b{number}" for number in range(1, 8)))
    assert len(table) == 9 + 7
    assert table["1"][-3:] == ["1.92x", "2.229x", "+16%"]
    assert table["-2"][-3:-1] == ["0.2712x", "0.3374x"]
    # d w^2 r^2, counted, phi by depth, width, resolution and multiply-adds
    assert table["b4"][5:] == ["10.15x", "11.39x", "+12%", "3.22", "3.53", "3.78", "3.73"]
    assert table["b7"][5:] == ["88.97x", "97.83x", "+10%", "6.21", "7.27", "7.05", "7.02"]
    assert "what the paper calls FLOPS" in out
    assert err == "Next: effnet scale --phi 1\n"


def test_the_rules_table_as_json(run):
    values = json.loads(run("--rule", "width", "--json")[1])
    assert values["rule"] == vars(RULES["width"])
    assert [row["phi"] for row in values["steps"]] == [-2, -1, 1, 2, 3, 4, 5, 6, 7]
    assert [row["name"] for row in values["published"]] == [f"b{number}" for number in range(1, 8)]
    assert values["published"][0]["implied_phi"]["depth"] is None


def test_lites_table_and_a_table_without_a_family(run):
    _, out, err = run("--from", "lite0", "--rule", "depth")
    assert set(rows(out, *(f"lite{number}" for number in range(1, 5)))) == {"lite1", "lite2", "lite3", "lite4"}
    assert set(rows(out, "6", "7")) == {"6"}  # 2^7 times the depth is beyond what is allowed
    assert err == "Next: effnet scale --from lite0 --rule depth --phi 1\n"
    assert "published" not in run("--from", "b4")[1]
    assert run("--from", "l2", "--rule", "depth")[0] == 0


def test_laws(run):
    code, out, err = run("--laws")
    assert code == 0
    table = rows(out, "depth", "width", "resolution")
    assert table["depth"][1:3] == ["2.03x", "2x"]
    assert table["width"][1:3] == ["3.76x", "4x"]
    assert table["resolution"][1:3] == ["3.99x", "4x"]
    assert "stem, head and classifier, 8.3% of the MACs, do not deepen" in out
    assert err == "Next: effnet scale\n"
    values = json.loads(run("--laws", "--from", "lite0", "--json")[1])
    assert [law["dimension"] for law in values] == ["depth", "width", "resolution"]
    assert values[0]["counted"]["macs"] == pytest.approx(1.855, abs=5e-4)


# budgets


def test_a_budget_and_its_reasons(run):
    code, out, err = run("--macs", "1G", "--params", "10M")
    shown = " ".join(out.split())
    assert code == 0
    assert "binds" in shown
    assert "b2 at 260 px, 0.9936 GMACs, top-1 80.1 %" in shown
    assert "10% more MACs would buy" in shown
    assert "not measured here" in shown
    assert "Next: effnet scale --macs 1G --params 10M --save b0-" in err


def test_a_network_saved_for_a_budget_is_a_model(run, folder):
    _, out, err = run("--macs", "100M", "--num-classes", "10", "--save", "small.yaml", "--json")
    values, saved = json.loads(out), read_spec("small.yaml")
    assert err.endswith("Next: effnet info small.yaml\n")
    assert {name: values[name] for name in ("width", "depth", "resolution", "num_classes")} == {
        name: getattr(saved, name) for name in ("width", "depth", "resolution", "num_classes")
    }
    assert (values["macs"], values["memory_bytes"]) == (effnet.cost(saved).macs, inference_memory(saved))


def test_a_training_budget_and_its_picture(run):
    words = "--train-memory", "2GB", "--batch", "8", "--no-ema", "--precision", "fp32", "--keep", "convolutions"
    code, out, err = run(*words, "--plot", "budget.png")
    assert code == 0
    assert "8 images a step, rmsprop, fp32, convolutions kept" in " ".join(out.split())
    assert Path("budget.png").stat().st_size > 10_000
    assert f"effnet scale {' '.join(words)} --save" in err


def test_published_networks_lead_to_their_weights(run):
    _, out, err = run("--macs", "1G", "--pretrained", "--json")
    assert json.loads(out)["name"] == "b2"
    _, out, err = run("--macs", "200M", "--pretrained")
    assert "top-1 77.1 % at 224 px" in " ".join(out.split())
    assert "--pretrained" not in out
    assert err.endswith("Next: effnet predict photo.jpg --model b0\n")


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_latency_on_this_machine(run, engine):
    _, out, err = run("--latency", "1s", "--macs", "20M", "--threads", "1", "--engine", engine, "--json")
    values = json.loads(out)
    assert {"torch": "torch, fp32", "onnxruntime": "ONNX Runtime, fp32"}[engine] in err
    assert 0 < values["latency_ms"] <= 1000
    assert values["trials"]
    assert values["macs"] <= 20e6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--laws", "--phi", "1"], "`phi` (=1.0) does not go with --laws"),
        (["--laws", "--depth-rounding", "nearest"], "`depth-rounding` (='nearest') does not go with --laws"),
        (["--save", "x.yaml"], "say which, for example --phi 1"),
        (["--phi", "1", "--save", "x.json"], "must end in .yaml"),
        (["--phi", "nan"], "must be a finite number"),
        (["--phi", "1", "--resolution-step", "2.5"], "'2.5' is not a whole number"),
        (["--rule", "fats"], "Did you mean 'fast'?"),
        (["--phi", "1", "--depth-rounding", "up"], '"ceil", "nearest"'),
        (["--from", "nowhere.yaml"], "'nowhere.yaml') does not exist"),
        (["--from", "."], "is not a bundle"),
        (["--macs", "lots"], "390M, 1G"),
        (["--macs", "1k"], "cannot be met"),
        (["--macs", "1G", "--phi", "1"], "`phi` (=1.0) does not go with a budget"),
        (["--threads", "1"], "`threads` (=1) needs a budget"),
        (["--macs", "1G", "--threads", "1"], "`threads` (=1) needs --latency"),
        (["--macs", "1G", "--plot", "plot.gif"], "must end in .png"),
        (["--macs", "1G", "--pretrained", "--plot", "plot.png"], "--pretrained"),
        (["--macs", "1G", "--pretrained", "--rule", "fast"], "`rule` (='fast') does not go with --pretrained"),
        (["--macs", "1G", "--max-resolution", "5"], "at least 32 pixels"),
        (["--latency", "1s", "--plot", "plot.png"], "only a latency"),
        (["--latency", "1ms", "--engine", "openvio"], "openvino"),
        (["--latency", "1s", "--threads", "100000"], "the cores of this machine"),
    ],
)
def test_wrong_usage_is_one_line_and_leaves_nothing(run, folder, words, message):
    code, out, err = run(*words)
    assert code == 2
    assert message in err
    assert out == ""
    assert present(folder) == []
