"""The pages of docs agree with the code, and their pictures exist."""

import contextlib
import dataclasses
import io
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torchvision
from matplotlib.figure import Figure

from effnet.arch.spec import NetworkSpec
from effnet.describing import RIVALS
from effnet.profiling.compare import count

DOCS = Path(__file__).parents[1] / "docs"
METHOD, SEARCH = DOCS / "method.md", DOCS / "searching.md"
PAGES = sorted(DOCS.glob("*.md"))


@pytest.fixture(scope="module")
def draw() -> Iterator[ModuleType]:
    sys.path.insert(0, str(DOCS))
    try:
        import draw

        yield draw
    finally:
        sys.path.remove(str(DOCS))


@pytest.fixture
def copy(draw: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """method.md among copies of the pages, which draw.py takes for docs; no pictures: they differ by version."""
    monkeypatch.setattr(draw, "DOCS", tmp_path)
    monkeypatch.setattr(draw, "PICTURES", {})
    for page in PAGES:
        shutil.copy(page, tmp_path)
    return tmp_path / METHOD.name


def test_the_numbers_are_the_codes(draw: ModuleType, copy: Path) -> None:
    assert draw.main(["--check"]) == 0, "run: python docs/draw.py"


def test_a_wrong_number_is_found_and_mended(draw: ModuleType, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = copy.read_text("utf-8")
    copy.write_text(page.replace("5,288,548", "5,288,549"), "utf-8")
    assert draw.main(["--check"]) == 1
    assert "method.md is out of date" in capsys.readouterr().out
    assert draw.main([]) == 0
    assert copy.read_text("utf-8") == page


def test_markers_come_in_pairs_and_stay_out_of_the_readers_way(draw: ModuleType) -> None:
    page = "".join(path.read_text("utf-8") for path in PAGES)
    marked = [match[2] for match in draw.MARKED.finditer(page)]
    assert page.count("<!-- ") == 2 * len(marked)
    assert sorted(marked) == sorted(draw.BLOCKS)
    for line in page.splitlines():  # a line that opens with a comment is raw HTML to markdown, and shown as it is
        assert not line.startswith("<!--") or re.fullmatch(r"<!-- (begin|end): [\w-]+ -->", line), line


def test_pictures_and_links_agree(draw: ModuleType) -> None:
    linked = {path for page in PAGES for path in re.findall(r"!\[[^]]+\]\((pictures/\S+)\)", page.read_text("utf-8"))}
    assert linked == {f"pictures/{name}.svg" for name in draw.PICTURES} | {"pictures/report.png", "pictures/labels.jpg"}
    drawn = {f"pictures/{path.name}" for path in (DOCS / "pictures").iterdir()}
    assert drawn == linked | {"pictures/run.png", "pictures/serve.png"}  # a real run's and a real page, in README.md


@pytest.mark.parametrize(("name", "title"), [("resnet50", "ResNet-50"), ("resnet152", "ResNet-152")])
def test_residual_networks_keep_what_the_page_says(draw: ModuleType, name: str, title: str) -> None:
    def kept(batch: int) -> int:
        tensors: dict[int, torch.Tensor] = {}
        with torch.device("meta"):
            network, images = getattr(torchvision.models, name)().train(), torch.empty(batch, 3, 224, 224)
        weights = {weight.untyped_storage()._cdata for weight in network.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            tensors[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network(images)
        return sum(tensor.untyped_storage().nbytes() for key, tensor in tensors.items() if key not in weights)

    macs, said = sys.modules["counted"].RESNETS[title]
    assert said == kept(2) - kept(1)
    assert macs == round(count(title)[0].macs / 1e9, 2)


def test_the_pages_code_runs_and_its_names_exist() -> None:
    page = METHOD.read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    assert printed.getvalue().splitlines()[-1] == "385814752"
    fields = {field.name for field in dataclasses.fields(NetworkSpec)}
    assert set(re.findall(r"`NetworkSpec\.(\w+)`", page)) <= fields


def test_figure_1_has_the_papers_points(draw: ModuleType, tmp_path: Path, drawn: list[Figure]) -> None:
    draw.rivals(tmp_path / "rivals.svg")
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", (tmp_path / "rivals.svg").read_text("utf-8"))
    for name in [f"B{i}" for i in range(8)] + [rival.name for rival in RIVALS]:
        assert texts.count(name) == (1 if name == "GPipe" else 2), name
    printed = [77.1, 79.1, 80.1, 81.6, 82.9, 83.6, 84.0, 84.3]  # top-1 of B0 ... B7 in Table 2 (v5)
    params, macs = [5.3, 7.8, 9.2, 12, 19, 30, 43, 66], [0.39, 0.70, 1.0, 1.8, 4.2, 9.9, 19, 37]  # millions, billions
    for axes, column, others in zip(drawn[0].axes, (params, macs), (16, 15), strict=True):
        (line,) = axes.lines
        assert list(line.get_ydata()) == printed
        assert list(line.get_xdata()) == pytest.approx(column, rel=0.05)
        (points,) = axes.collections
        assert len(points.get_offsets()) == others
