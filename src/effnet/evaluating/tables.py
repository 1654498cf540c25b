"""What effnet val prints: the figures of one model, or the difference of two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from effnet import console
from effnet.arch.spec import Calibration
from effnet.metrics.evaluate import Evaluation
from effnet.metrics.intervals import Difference, Interval

LISTED, WORST = 20, 10  # classes up to which all are shown, and how many where there are more
INTERVALS = (
    "Intervals at 95 %: Wilson's for shares, a bootstrap over all images for macro F1. They hold for images drawn like "
    "these."
)
TEST = (
    "p is of McNemar's exact test on the images that only one of them names correctly; the interval of the difference "
    "is Bonett and Price's, at 95 %, for models on the same images."
)


def show_evaluation(
    evaluation: Evaluation, calibration: Calibration | None, fitted_on: str, model: str, data: str, split: str
) -> None:
    """Print the figures, the classes, and what the confidence is worth."""
    figures = ("top-1", evaluation.top1), ("top-5", evaluation.top5), ("macro F1", evaluation.macro_f1)
    lines = [(name, f"{figure.value:.2%}", _bounds(figure)) for name, figure in figures if figure is not None]
    console.paragraphs((f"{model} on {_name(split)} of {data}: {evaluation.n:,} images",))
    console.table(("<", "value", "95 % interval"), lines)
    scores = [score for score in evaluation.scores if score.n]
    heading = f"{len(scores)} classes"
    if len(scores) > LISTED:
        scores = sorted(scores, key=lambda score: score.f1 or 0.0)[:WORST]
        heading = f"The {WORST} classes of lowest F1, of {heading}"
    taken_for: dict[str, str] = {}
    for mistake in evaluation.mistakes:
        taken_for.setdefault(mistake.true, f"{mistake.named} ({mistake.count})")
    rows = []
    for score in scores:
        precision = "-" if score.precision is None else f"{score.precision:.1%}"
        recall = score.recall and (f"{score.recall.value:.1%}", _bounds(score.recall, 1))
        rows.append((score.name, score.n, precision, *(recall or ()), f"{score.f1:.1%}", taken_for.get(score.name, "")))
    columns = "<class", "images", "precision", "recall", "95 % interval", "F1", "<taken for"
    console.table(columns, rows, title=heading)
    console.paragraphs((*_describe_confidence(evaluation, calibration, fitted_on), INTERVALS))


def show_comparison(found: Difference, models: Sequence[str], data: str, split: str) -> None:
    """Print the accuracy of both models, and what their difference means."""
    rows = [
        (name, model, f"{accuracy.value:.2%}", _bounds(accuracy), only)
        for name, model, accuracy, only in zip(
            "AB", models, (found.accuracy_a, found.accuracy_b), (found.only_a, found.only_b), strict=True
        )
    ]
    console.paragraphs((f"Two models on {_name(split)} of {data}: {found.n:,} images",))
    console.table(("<", "<model", "top-1", "95 % interval", "only this right"), rows)
    gain, low, high = (100 * value for value in (found.accuracy.value, found.accuracy.low, found.accuracy.high))
    p = "p < 0.001" if found.p < 0.001 else f"p = {found.p:.2g}"
    if found.significant and gain < 0:
        verdict = f"A is better by {-gain:.1f} points ({-high:.1f} to {-low:.1f}), {p}."
    elif found.significant:
        verdict = f"B is better by {gain:.1f} points ({low:.1f} to {high:.1f}), {p}."
    else:
        verdict = f"The images show no difference: B minus A is {gain:+.1f} points ({low:+.1f} to {high:+.1f}), {p}."
    console.paragraphs((verdict, TEST))


def _describe_confidence(evaluation: Evaluation, calibration: Calibration | None, fitted_on: str) -> Iterator[str]:
    before, after, given = evaluation.before, evaluation.after, evaluation.abstention
    worth = f"ECE {before.ece:.1%}, Brier {before.brier:.3f}, loss {before.loss:.4f}"
    if calibration is None:
        yield (
            f"Confidence as it is: {worth}. No temperature and no threshold: they are fitted on a val split, never on "
            "what is evaluated."
        )
        return
    yield (
        f"Confidence as it is: {worth}; at a temperature of {after.temperature:.3g}: ECE {after.ece:.1%}, "
        f"Brier {after.brier:.3f}, loss {after.loss:.4f}."
    )
    yield f"Temperature and threshold are fitted on {fitted_on}."
    if given is None:
        yield (
            f"Abstaining: no threshold there ensures that at most {calibration.error:.3g} of the answers are wrong; "
            "that takes fewer mistakes or more images."
        )
        return
    error = f"{given.error.value:.1%} ({_bounds(given.error, 1)}) of the answers are" if given.error else "nothing is"
    rule = f"Abstaining below {given.threshold:.1%} confidence" if given.threshold else "Abstaining is not needed"
    yield (
        f"{rule} to have at most {calibration.error:.3g} of the answers wrong, with 95 % confidence for images like "
        f"those. Here {given.coverage.value:.1%} of the images are answered, and {error} wrong."
    )


def _name(split: str) -> str:
    return "all" if split == "all" else f"the {split} split"


def _bounds(figure: Interval, digits: int = 2) -> str:
    return f"{figure.low:.{digits}%} to {figure.high:.{digits}%}"
