"""Every test in this folder starts with the same random seed."""

from typing import Any

import pytest
import torch

from effnet.models import kernels


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parameters each segment had that went through the kernels."""
    counts: list[int] = []
    apply = kernels.Step.apply

    class Counted:
        @staticmethod
        def apply(*arguments: Any) -> Any:
            counts.append(len(arguments) - 6)
            return apply(*arguments)

    monkeypatch.setattr("effnet.models.native.Step", Counted)
    return counts
