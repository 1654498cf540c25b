"""Wrong types given to functions are refused by argument; commands work with standard output closed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import effnet
from effnet.data.image import PHOTOS

SMALL = effnet.spec("b0", width=0.25, depth=0.3, resolution=32, num_classes=3)


@pytest.mark.parametrize("wrong", [None, 5, [], b"x", "", torch.zeros(3)], ids=str)
@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (effnet.train, "data"),
        (lambda data: effnet.fit(data, macs="1G"), "data"),
        (lambda folder: effnet.save(effnet.create(SMALL), folder), "folder"),
    ],
    ids=("train", "fit", "save"),
)
def test_what_is_not_a_path(function: Callable[[Any], Any], argument: str, wrong: Any) -> None:
    with pytest.raises(effnet.EffnetError, match=f"^`{argument}` .* must be a path"):
        function(wrong)


@pytest.mark.parametrize("wrong", [None, 5, "b0", (1.2, 1.1, 1.15)])
def test_scale_takes_a_spec_and_a_rule(wrong: Any) -> None:
    with pytest.raises(effnet.EffnetError, match=r"^`baseline` .* must be a NetworkSpec, such as effnet.spec makes"):
        effnet.scale(wrong, 1)
    with pytest.raises(effnet.EffnetError, match=r"^`rule` .* must be a Rule, such as effnet.Rule makes"):
        effnet.scale(SMALL, 1, wrong)


@pytest.mark.parametrize("wrong", ["coffee.png", PHOTOS / "coffee.png", b"coffee.png"])
def test_one_photo_is_not_a_stream(wrong: Any) -> None:
    with (
        effnet.load("lite0") as classifier,
        pytest.raises(effnet.EffnetError, match=r"^`photos` .* `predict` takes one"),
    ):
        classifier.stream(wrong)


@pytest.mark.skipif(sys.platform == "win32", reason="another shell")
@pytest.mark.parametrize(("closed", "said"), [(">&-", "Next: effnet info b0 --blocks\n"), (">&- 2>&-", "")])
def test_a_closed_output(closed: str, said: str, tmp_path: Path) -> None:
    command = ["/bin/sh", "-c", f'exec "$0" -m effnet info b0 {closed}', sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", said)
