"""Commands in words, as a person would type them."""

from __future__ import annotations

from effnet.console import command_line


def test_a_command_line_says_every_value_in_full() -> None:
    options = {"from_": "net-1.0", "phi": 1.23456789, "width": 2.0, "ema": False, "set": ["flip=0", "lr=1e-3"]}
    expected = "effnet scale --from net-1.0 --phi 1.23456789 --width 2 --no-ema --set flip=0 --set lr=1e-3"
    assert command_line("scale", options) == expected
