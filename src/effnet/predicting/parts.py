"""Answers for many photos in a folder of files, each whole or absent, computed by this process or a Ray cluster.

request.json           the request; a command with another request for the same folder is refused
answers-000000.jsonl   the answers for the first --part photos in order, as printed by effnet predict --json
answers.json           written last: how many photos, how many of them unreadable or flagged, the model, the versions

Only this process writes, so the machines of a cluster need no shared disk for the answers. This process lists the names
once and keeps them compressed; each process of the cluster opens the model once.

Ray Data is not used: it needs pandas and pyarrow, its machines write the files, and every run names them differently.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import platform
import zlib
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from effnet.cluster import Cluster
from effnet.console import json_text
from effnet.data.shards import file_size
from effnet.errors import ArgumentError, ClusterError, DataError, ImageError
from effnet.fields import write_count
from effnet.files import hold_lock, names_in, parse_json, sweep, write_text
from effnet.predicting.lines import FLAGS, json_object
from effnet.predicting.settings import AnswerOptions, OutputOptions
from effnet.progress import SILENT, Progress
from effnet.runtime.artifact import Model, metadata
from effnet.runtime.classifier import Classifier
from effnet.runtime.load import load, read_model
from effnet.runtime.options import LoadOptions
from effnet.runtime.select import version_of
from effnet.version import __version__
from effnet.weights.bundle import Bundle, entries_of

REQUEST, RESULT, PART = "request.json", "answers.json", "answers-{:06}.jsonl"
NOTES = "source", "metrics", "provenance", "files", "sha256"  # of a model, without effect on answers


@dataclass(frozen=True)
class AnswerRequest:
    """What answers depend on besides the photos, and what names are relative to."""

    model: str  # as given; a path is absolute
    fingerprint: str
    answer: AnswerOptions
    options: LoadOptions  # with the engine and precision that were chosen here
    folder: str  # that relative names start from

    def to_dict(self) -> dict[str, Any]:
        """What two commands must share to write to the same folder."""
        options = {name: value for name, value in vars(self.options).items() if name not in ("threads", "source")}
        return {"effnet": __version__, "model": self.fingerprint, **vars(self.answer), **options}


@dataclass(frozen=True)
class Names:
    """The photos' names in order, in parts that are answered together: compressed JSON lists."""

    parts: tuple[bytes, ...]
    count: int
    digest: str


def open_request(
    model: str, answer: AnswerOptions, options: LoadOptions, progress: Progress = SILENT
) -> tuple[AnswerRequest, Classifier]:
    """The request for a model, and the model, opened here.

    All machines use the engine and precision that the rules choose for this one.
    """
    found = fingerprint(read_model(model, None, options.source, progress=progress))
    classifier = load(model, **vars(options))
    classifier.stream((), topk=answer.topk, batch=options.batch, sets=answer.sets)  # checks them
    assert classifier.selection is not None  # set by `load`
    backend = classifier.selection.backend
    options = dataclasses.replace(options, engine=backend.engine, precision=backend.precision)
    path = str(Path(model).absolute()) if Path(model).exists() else model
    return AnswerRequest(path, found, answer, options, str(Path.cwd())), classifier


def fingerprint(model: Model) -> str:
    """A hash of everything that a model's answers depend on: the same for a bundle and a copy of it."""
    form = None if isinstance(model, Bundle) else metadata(model.config, model.form)["form"]
    entries = {name: value for name, value in entries_of(model.config).items() if name not in NOTES}
    found = hashlib.sha256(json.dumps([form, entries], sort_keys=True).encode())
    if isinstance(model, Bundle):
        for _, array in sorted(model.weights.items()):
            found.update(np.ascontiguousarray(array).data)
    else:
        for file in (model.path, model.path.with_suffix(".bin")):
            found.update(file.read_bytes() if file.is_file() else b"")
    return found.hexdigest()[:16]


def write_answers(
    out: Path,
    names: Iterable[str],
    request: AnswerRequest,
    classifier: Classifier,
    output: OutputOptions,
    progress: Progress = SILENT,
) -> Counter[str]:
    """Write the answers that are still missing in a folder; `classifier` computes them unless a cluster does.

    Returns:
        The number of `photos`, and of those that are `unreadable`, `unsure` and `unfamiliar`.

    Raises:
        ArgumentError: the folder holds something else, or other answers.
        ClusterError: workers die, or a machine has other files or another version of effnet. Answers so far are kept.
        DataError: a file in the folder was changed.
    """
    listed = divide(names, output.part)
    photos = f"{listed.count} with names {listed.digest[:16]}"
    _claim(out, {"part": output.part, "photos": photos, **request.to_dict()})
    with hold_lock(out / REQUEST, "out"):
        sweep(out)
        parts = {PART.format(place): part for place, part in enumerate(listed.parts)}
        missing = {name: part for name, part in parts.items() if not (out / name).exists()}
        total, there = len(parts), len(parts) - len(missing)
        files = f"{write_count(total, 'file')} of answers, {there:,} of them there already"
        progress.message(f"{write_count(listed.count, 'photo')} in {files}")
        with closing(_answer(missing, request, classifier, output, progress)) as answered:
            for done, (name, (text, absent)) in enumerate(answered, start=there + 1):
                for photo in absent:
                    if file_size(Path(photo)) >= 0:
                        raise ClusterError(f"{photo} is here but not on every machine of the cluster")
                write_text(out / name, text)
                progress.update("files of answers", done, total)
        counts = _count(out, listed, output.part)
        versions = {"effnet": __version__, request.options.engine: version_of(request.options.engine)}
        values = {"model": request.model, "files": total, **counts, "versions": versions}
        write_text(out / RESULT, json_text(values))
    return counts


def divide(names: Iterable[str], part: int) -> Names:
    """The names in parts of this size."""
    parts, count, found = [], 0, hashlib.sha256()
    names = iter(names)
    while some := list(itertools.islice(names, part)):
        text = json.dumps(some).encode()
        found.update(text)
        parts.append(zlib.compress(text))
        count += len(some)
    return Names(tuple(parts), count, found.hexdigest())


def answer_part(classifier: Classifier, request: AnswerRequest, names: bytes) -> tuple[str, list[str]]:
    """The lines for a part's photos, and the photos that are not on this machine."""
    answer, absent, lines = request.answer, [], []
    photos = json.loads(zlib.decompress(names))
    answers = classifier.stream(photos, topk=answer.topk, batch=request.options.batch, sets=answer.sets)
    for photo, (_, found) in zip(photos, answers, strict=True):
        lines.append(json_object(photo, found))
        if isinstance(found, ImageError) and file_size(Path(photo)) < 0:
            absent.append(photo)
    return "".join(lines), absent


def _answer_there(request: AnswerRequest, names: bytes) -> tuple[str, list[str]]:
    """Answer a part in a job on a cluster."""
    return answer_part(_open(request), request, names)


@functools.cache
def _open(request: AnswerRequest) -> Classifier:
    """The model on a machine of a cluster, opened once in each process."""
    with suppress(OSError):  # if it is missing here, relative names are reported as missing
        os.chdir(request.folder)
    options = request.options
    if fingerprint(read_model(request.model, None, options.source)) != request.fingerprint:
        raise ClusterError(f"{request.model} is another model on {platform.node()}: every machine needs the same")
    return load(request.model, **vars(options))


def _answer(
    missing: dict[str, bytes], request: AnswerRequest, classifier: Classifier, output: OutputOptions, progress: Progress
) -> Generator[tuple[str, tuple[str, list[str]]]]:
    """Each part's name with the result of `answer_part`, as they finish."""
    if output.ray is None or not missing:
        yield from ((name, answer_part(classifier, request, part)) for name, part in missing.items())
        return
    with Cluster(output.ray, request.options.threads or 1) as cluster:
        options = dataclasses.replace(request.options, threads=cluster.each)
        shared = cluster.share(dataclasses.replace(request, options=options))
        yield from cluster.run(_answer_there, ((name, (shared, part)) for name, part in missing.items()), progress)


def _claim(out: Path, wanted: dict[str, Any]) -> None:
    """Write request.json, or compare it to an existing one."""
    if not (out / REQUEST).is_file():
        if out.exists() and not (out.is_dir() and not names_in(out)):
            raise ArgumentError("out", str(out), "exists and holds something else; choose another folder.")
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / REQUEST, json_text(wanted))
        return
    try:
        found = dict(parse_json((out / REQUEST).read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise ArgumentError("out", str(out), f"has a {REQUEST} that cannot be read; choose another folder.") from error
    for name, value in wanted.items():
        if found.get(name) != value:
            rule = f"holds answers for another `{name}` ({found.get(name)}, not {value}); choose another folder."
            raise ArgumentError("out", str(out), rule)


def _count(out: Path, listed: Names, part: int) -> Counter[str]:
    """Count what the files hold. Quotes in JSON strings have a backslash, so names cannot contain these marks."""
    counts = Counter[str]()
    for place in range(len(listed.parts)):
        text = (out / PART.format(place)).read_bytes()
        lines = text.count(b"\n")
        if lines != min(part, listed.count - place * part):
            raise DataError(f"{out / PART.format(place)} was changed: delete it and run the same command again")
        counts.update(photos=lines, unreadable=text.count(b', "error": "'))
        counts.update({name: text.count(b'"%s": true' % name.encode()) for name in FLAGS})
    return counts
