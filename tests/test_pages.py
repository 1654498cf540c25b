"""Every command on the pages: parsed by the command line's own parser, and run unless NOT_RUN or NEEDS says why not.

Of commands that differ only in names and values the first is run. Console blocks are run by docs/transcripts.py and
Python by test_readme.py.
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from ran import Run

import effnet
from effnet.cli import COMMANDS, build_app
from effnet.training.recipe import read_recipe, recipe_value

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
LANGUAGES = {"sh", "bash", "console", "python", "text", "yaml", ""}  # text and "" are not typed by anyone

# What a line of a shell may begin with, beside effnet and torchrun.
OTHERS = {"pip", "python", "python3", "make", "ray", "docker", "curl", "."}
# Commands that are read and not run, by their first words, and why.
NOT_RUN = {
    "fit": "it takes minutes; tests/fitting runs them",
    "train": "one of them is run, for all that follow; tests/training runs the others",
    "search": "it takes minutes; tests/searching runs them",
    "bench": "it times for half a minute; tests/benchmarking runs it",
    "profile": "it times for seconds; tests/profiling runs it",
    "serve": "it does not end; tests/serving runs it",
    "explain photos --check": "380 passes a photo; tests/explaining runs it",
    "explain photo.jpg": "the same, at 224 px",
}
NEEDS = {  # words that stand for what is not here
    "b0": "its weights come from the internet; tests/weights has them of random numbers",
    "cuda": "a GPU; tests/runtime/test_device.py has a pretend one",
    "auto": "a Ray cluster; tests/predicting has one",
    "int8": "NNCF, and minutes; tests/exporting runs it",
    "flowers.keras": "Keras; tests/weights writes such files",
}
# Options that pages name and that belong to other programs.
FOREIGN = {"--model-ema", "--smoothing", "--clip-grad", "--amp", "--mixup", "--aa", "--drop-path", "--opt", "--mean"}
FOREIGN |= {
    "--max-restarts",
    "--standalone",
    "--rdzv-backend",
    "--img-size",
    "--check",
    "--short",
    "--traceback",
    "--key",
}


def lines(page: Path) -> Iterator[list[str]]:
    """The commands in a page's blocks, in words."""
    for language, block in FENCE.findall(page.read_text("utf-8")):
        assert language in LANGUAGES, f"{page.name}: nothing checks {language}"
        for line in block.splitlines() if language in ("sh", "bash") else []:
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):  # a variable of the environment
                del words[0]
            if words:
                yield words


def spans(page: Path) -> Iterator[str]:
    """The code within a page's sentences and tables."""
    for span in SPAN.findall(FENCE.sub("", page.read_text("utf-8"))):
        yield " ".join(span.replace(r"\|", "|").split())


def typed() -> Iterator[tuple[str, list[str]]]:
    """Each effnet command of the pages' blocks and of their right-hand columns, without `effnet`, once."""
    seen = set()
    for page in PAGES:
        shown = list(lines(page))
        if page.name == "coming.md":
            shown += [shlex.split(span) for span in spans(page) if re.match(r"effnet |torchrun .* -m effnet ", span)]
        for words in shown:
            if words[0] == "torchrun":
                words = words[words.index("-m") + 1 :] if "-m" in words else ["..."]
            words = words[: words.index(">")] if ">" in words else words
            if words[0] == "effnet" and len(words) > 2 and tuple(words) not in seen:
                seen.add(tuple(words))
                yield page.name, words[1:]


@cache
def options(command: str) -> frozenset[str]:
    """The names of a command's options."""
    found = build_app([command])[command].assemble_argument_collection(parse_docstring=False)
    return frozenset(name for argument in found for name in argument.names)


def kind(words: list[str]) -> tuple[object, ...]:
    """What commands have in common that differ only in names and values: the first of them is run."""
    return words[0], sorted(word.partition("=")[0] for word in words if word.startswith("--"))


def is_run(words: list[str]) -> bool:
    line = " ".join(words)
    return not any(f"{line} ".startswith(f"{begin} ") for begin in NOT_RUN) and NEEDS.keys().isdisjoint(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_read(page: Path) -> None:
    for name, words in typed():
        if name == page.name:
            build_app(words).parse_args(words, print_error=False, exit_on_error=False)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for words in lines(page):
        assert words[0] in OTHERS | {"effnet", "torchrun"}, words
        if words[0] == "python":
            assert (ROOT / words[1]).exists(), words
    for names in re.findall(r"effnet\[([\w,]+)\]", page.read_text("utf-8")):
        assert set(names.split(",")) <= extras.keys(), names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_options_exist(page: Path) -> None:
    known = FOREIGN.union(*map(options, COMMANDS))
    for span in spans(page):
        words = span.split()
        if words[0] == "effnet" and words[1:] and page.stem != "troubleshooting":  # which has sentences of ours
            assert words[1] in COMMANDS or words[1] == "COMMAND", span
            own = options(words[1]) if words[1] in COMMANDS else known
            assert {word.partition("=")[0] for word in words[2:] if word.startswith("--")} - {"--help"} <= own, span
        elif span.startswith("--"):
            assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, span
    for name, value in re.findall(r"--set ([a-z_]+)=([\w.]+)", page.read_text("utf-8")):
        read_recipe("finetune", **{name: recipe_value(value)})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages' commands name."""
    place = tmp_path_factory.mktemp("pages")
    for name in ("src", "docs", "benchmarks"):
        (place / name).symlink_to(ROOT / name)
    (place / "examples").mkdir()
    (place / "examples/fashion").symlink_to(place / "photos")
    for split, source, first, count in (("train", "train", 0, 6), ("val", "train", 6, 6), ("test", "test", 0, 4)):
        for label in ("bag", "coat", "sandal"):
            folder = place / "photos" / split / label
            folder.mkdir(parents=True)
            for image in sorted((ROOT / "examples/fashion" / source / label).iterdir())[first : first + count]:
                shutil.copy(image, folder)
    coffee = ROOT / "src/effnet/data/photos/coffee.png"
    for name in ("photo.jpg", "cat.jpg", "coffee.jpg", "a.jpg", "b.jpg", "holiday/1.png", "new/1.png"):
        (place / name).parent.mkdir(exist_ok=True)
        shutil.copy(coffee, place / name)
    (mine,) = (
        block for language, block in FENCE.findall((ROOT / "docs/budgets.md").read_text("utf-8")) if language == "yaml"
    )
    (place / "mine.yaml").write_text(mine)
    (place / "found").mkdir()
    shutil.copy(ROOT / "examples/baselines/mbconv.yaml", place / "found/baseline.yaml")
    (place / "found/rule.yaml").write_text("alpha: 1.2\nbeta: 1.1\ngamma: 1.15\n")
    return place


def test_commands_run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(place)
    quick = ("--resolution", "32", "--epochs", "1", "--batch", "6", "--workers", "0", "--threads", "1")
    assert Run(capsys, "train", "photos", "--model", "lite0", *quick).code == 0
    best = place / "runs/train/latest/best"
    for name in ("MODEL", "A", "B", "best", "flowers", "runs/fit/photos/model", "runs/fashion/best"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(best, place / name)
    failed, done = {}, []
    for page, words in typed():
        if is_run(words) and kind(words) not in done:
            done.append(kind(words))
            ran = Run(capsys, *words)
            if ran.code != 0:
                failed[f"{page}: effnet {shlex.join(words)}"] = (ran.code, ran.err[-300:])
    assert not failed, "\n".join(f"{line}\n    {said}" for line, said in failed.items())


def test_reasons_are_needed() -> None:
    shown = [words for _, words in typed()]
    for begin in NOT_RUN:
        assert any(f"{' '.join(words)} ".startswith(f"{begin} ") for words in shown), begin
    for word in NEEDS:
        assert any(word in words for words in shown), word


def sentences(tree: ast.AST) -> Iterator[str]:
    """Texts of a module, with ... for what is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_quoted_messages_exist() -> None:
    """A message of troubleshooting.md is one text of the source, or what begins in one and goes on in another."""
    files = sorted((ROOT / "src/effnet").rglob("*.py"))
    source = [" ".join(text.split()) for file in files for text in sentences(ast.parse(file.read_text("utf-8")))]
    page = (ROOT / "docs/troubleshooting.md").read_text("utf-8").partition("## No message")[0]
    quoted = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    assert len(quoted) > 40
    pieces = [piece.strip() for message in quoted for piece in message.split("...") if len(piece.split()) > 1]
    assert len(pieces) >= len(quoted)
    lost = [piece for piece in pieces if not any(piece in text for text in source)]
    assert not lost, "no message says this any more:\n" + "\n".join(lost)


def test_pythons_page_lists_every_public_name() -> None:
    listed = re.findall(r"^- `effnet\.(\w+)`", (ROOT / "docs/python.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted({*effnet.__all__} - {"__version__"})
