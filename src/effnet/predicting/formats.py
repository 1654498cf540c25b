"""How predictions look: a table for a person, JSON lines, CSV."""

from __future__ import annotations

from effnet.console import csv_lines, json_line
from effnet.errors import ImageError
from effnet.runtime.classifier import Prediction


class PredictionTable:
    """A line for each class, for a person."""

    def begin(self) -> str:
        """The first line."""
        return f"{'file':<40} {'probability':>11}  class\n"

    def answer(self, file: str, answer: Prediction | ImageError) -> str:
        """The lines of one file; a long name gets a line of its own."""
        head = f"{file:<40}" if len(file) <= 40 else f"{file}\n{'':<40}"
        if isinstance(answer, ImageError):
            return f"{head} {'-':>11}  unreadable: {answer}\n"
        lines = [f"{score.probability:>11.1%}  {score.label}" for score in answer]
        return f"{head} " + f"\n{'':<40} ".join(lines) + "\n"


class PredictionJson:
    """One object a line: {"file", "predictions": [{"index", "label", "probability"}]} or {"file", "error"}."""

    def begin(self) -> str:
        """Nothing: every line stands for itself."""
        return ""

    def answer(self, file: str, answer: Prediction | ImageError) -> str:
        """The line of one file."""
        if isinstance(answer, ImageError):
            return json_line({"file": file, "error": str(answer)})
        return json_line({"file": file, "predictions": [vars(score) for score in answer]})


class PredictionCsv:
    """A line for each class, ranked from 1, or one line with the error."""

    def begin(self) -> str:
        """The header."""
        return csv_lines([("file", "rank", "index", "label", "probability", "error")])

    def answer(self, file: str, answer: Prediction | ImageError) -> str:
        """The lines of one file."""
        if isinstance(answer, ImageError):
            return csv_lines([(file, "", "", "", "", answer)])
        return csv_lines((file, rank, s.index, s.label, s.probability, "") for rank, s in enumerate(answer, start=1))
