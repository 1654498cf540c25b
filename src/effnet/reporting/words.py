"""Sentences about confidence, temperature and threshold, for the report and effnet val."""

from __future__ import annotations

from collections.abc import Iterator

from effnet.arch.spec import Calibration
from effnet.metrics.evaluate import Evaluation
from effnet.metrics.intervals import Interval


def bounds(figure: Interval, digits: int = 2) -> str:
    """The interval of a share, as text."""
    return f"{figure.low:.{digits}%} to {figure.high:.{digits}%}"


def between(figure: Interval, digits: int = 1) -> str:
    """A share with its interval, as text."""
    return f"{figure.value:.{digits}%} ({bounds(figure, digits)})"


def describe_confidence(evaluation: Evaluation, calibration: Calibration | None, fitted_on: str) -> Iterator[str]:
    """Describe how far confidence is from accuracy, and what a threshold does.

    Args:
        evaluation: the figures.
        calibration: None if nothing was fitted.
        fitted_on: description of the images that it was fitted on.
    """
    before, after = evaluation.before, evaluation.after
    figures = f"ECE {before.ece:.1%}, Brier {before.brier:.3f}, loss {before.loss:.4f}"
    if calibration is None:
        yield (
            f"Confidence as it is: {figures}. No temperature and no threshold: they are fitted on a val split, never "
            "on what is evaluated."
        )
        return
    yield (
        f"Confidence as it is: {figures}; at a temperature of {after.temperature:.3g}: ECE {after.ece:.1%}, "
        f"Brier {after.brier:.3f}, loss {after.loss:.4f}."
    )
    yield f"Temperature and threshold are fitted on {fitted_on}."
    yield describe_threshold(evaluation, calibration)


def describe_threshold(evaluation: Evaluation, calibration: Calibration) -> str:
    """Describe what the threshold of a calibration ensures, and its effect on the evaluated images."""
    abstention = evaluation.abstention
    if abstention is None:
        return (
            f"Abstaining: no threshold there ensures that at most {calibration.error:.3g} of the answers are wrong; "
            "that takes fewer mistakes or more images."
        )
    threshold, error = abstention.threshold, abstention.error
    rule = f"Abstaining below {threshold:.1%} confidence" if threshold else "Abstaining is not needed"
    wrong = f"{between(error)} of the answers are" if error else "nothing is"
    return (
        f"{rule} to have at most {calibration.error:.3g} of the answers wrong, with 95 % confidence for images like "
        f"those. Here {abstention.coverage.value:.1%} of the images are answered, and {wrong} wrong."
    )
