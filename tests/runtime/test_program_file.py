"""torch.export files: those whose opening could run code, or fill the memory, are refused before torch reads them."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from random_weights import shaken
from tiny import tiny_spec

from effnet.arch.spec import InputSpec
from effnet.errors import ArtifactError
from effnet.exporting.export import export
from effnet.models.efficientnet import EfficientNet
from effnet.runtime.artifact import read_artifact
from effnet.runtime.select import open_session
from effnet.weights.bundle import open_bundle, save


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as effnet exports it."""
    folder = tmp_path_factory.mktemp("program")
    bundle = open_bundle(save(shaken(EfficientNet(tiny_spec())), folder / "b", input=InputSpec(32, 36)))
    return export(bundle, folder / "model.pt2", format="torch", batch=2).path


def rewritten(source: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy whose members `change` gets by their names."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        contents = {name: old.read(name) for name in old.namelist()}
        change(contents)
        for name, content in contents.items():
            new.writestr(name, content)
    return target


class Touch:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_file_that_would_run_code_is_refused(program: Path, tmp_path: Path) -> None:
    """torch.export follows a file that asks for a pickle; here it asks for one that writes a file."""
    touched = tmp_path / "touched"

    def change(contents: dict[str, bytes]) -> None:
        member = next(name for name in contents if name.endswith("_weights_config.json"))
        values = json.loads(contents[member])
        entry = next(iter(values["config"].values()))
        entry["use_pickle"] = True
        contents[member] = json.dumps(values).encode()
        weight = next(name for name in contents if name.endswith(f"/{entry['path_name']}"))
        contents[weight] = pickle.dumps(Touch(touched))

    hostile = rewritten(program, tmp_path / "hostile.pt2", change)
    with pytest.raises(ArtifactError, match=r"hostile\.pt2 cannot be read by torch\.export"):
        open_session(read_artifact(hostile))
    assert not touched.exists()


def test_a_constant_that_is_an_object_is_not_unpickled(program: Path, tmp_path: Path) -> None:
    """torch reads constants of a certain name by pickle.loads, whatever is forbidden to torch.load."""
    touched = tmp_path / "touched"

    def change(contents: dict[str, bytes]) -> None:
        weights, constants = (
            next(name for name in contents if name.endswith(f"_{kind}_config.json"))
            for kind in ("weights", "constants")
        )
        entry = next(iter(json.loads(contents[weights])["config"].values())) | {"path_name": "opaque_obj_0"}
        contents[constants] = json.dumps({"config": {"constant": entry | {"use_pickle": True}}}).encode()
        contents[f"{constants.rpartition('/')[0]}/opaque_obj_0"] = pickle.dumps(Touch(touched))

    hostile = rewritten(program, tmp_path / "hostile.pt2", change)
    with pytest.raises(ArtifactError, match=r"hostile\.pt2"):
        open_session(read_artifact(hostile))
    assert not touched.exists()
    open_session(read_artifact(rewritten(program, tmp_path / "sound.pt2", lambda contents: None))).close()


@pytest.mark.parametrize("door", ["size", "guard", "operator", "tree", "library", "object"])
def test_a_program_that_names_code_is_refused(program: Path, tmp_path: Path, door: str) -> None:
    """torch evaluates sizes and guards as Python, calls what nodes name, and loads compiled libraries."""
    touched = tmp_path / "touched"
    code = f"lambdify.__globals__['builtins'].open({str(touched)!r}, 'w')"

    def change(contents: dict[str, bytes]) -> None:
        values = json.loads(contents["model/models/model.json"])
        inner = values["graph_module"]
        if door == "size":
            first = next(iter(inner["graph"]["tensor_values"].values()))
            first["sizes"][0] = {"as_expr": {"expr_str": code, "hint": None}}
        elif door == "guard":
            values["guards_code"] = [code]
        elif door == "operator":
            inner["graph"]["nodes"][0]["target"] = "torch.ops.aten.from_file.default"
        elif door == "tree":
            signature = inner["module_call_graph"][0]["signature"]
            signature["in_spec"] = signature["in_spec"].replace("builtins.tuple", "collections.defaultdict")
        elif door == "library":
            contents["model/data/aotinductor/model/code.so"] = b"code"
        elif door == "object":
            contents["model/data/constants/custom_obj_0"] = b"code"
        contents["model/models/model.json"] = json.dumps(values).encode()

    with pytest.raises(ArtifactError, match=r"hostile\.pt2 holds .*: opening it could run its code"):
        open_session(read_artifact(rewritten(program, tmp_path / "hostile.pt2", change)))
    assert not touched.exists()


def test_a_second_program_of_the_same_name_is_refused(program: Path, tmp_path: Path) -> None:
    """zipfile reads the last of two members of one name, and torch the first, whatever its capitals."""
    shutil.copy(program, tmp_path / "twice.pt2")
    with zipfile.ZipFile(tmp_path / "twice.pt2", "a") as archive:
        archive.writestr("model/models/MODEL.json", b"{}")
    with pytest.raises(ArtifactError, match=r"twice\.pt2"):
        open_session(read_artifact(tmp_path / "twice.pt2"))


def test_metadata_does_not_fill_the_memory(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/extra/effnet", bytes(10_000_000))
    with pytest.raises(ArtifactError, match=r"bomb\.pt2 .*compressed"):
        read_artifact(tmp_path / "bomb.pt2")
