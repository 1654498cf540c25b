import pytest

from ran import Run


@pytest.fixture
def run(capsys, request):
    """Run the module's COMMAND: its exit code, what it printed, what it remarked."""

    def typed(*words):
        ran = Run(capsys, request.module.COMMAND, *words)
        return ran.code, ran.out, ran.err

    return typed
