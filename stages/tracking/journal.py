"""The journal of a tracked run: JSON lines on local disk that wait there until MLflow has taken them.

One line is one record: {"kind": "metrics", "time": 1700000000000, ...}. Beside `run.jsonl` lie
`run.jsonl.sent` (how many bytes MLflow has taken, and into which run), `run.jsonl.lock` (held by the one process
that sends) and `run.files/` (files that wait with their records, see stages/tracking/snapshots.py). The `*_record`
functions bring values into the shape that MLflow accepts; nothing here needs MLflow. Trouble with the disk raises
nothing: it must not end a training that lasted for days.
"""

import errno
import json
import math
import os
import posixpath
import re
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from stages.tracking.snapshots import Snapshots

PARAM_LIMIT = 6000  # characters of a value; mlflow.utils.validation.MAX_PARAM_VAL_LENGTH
TAG_LIMIT = 8000
DIGEST_LIMIT = 36
EMBEDDED_FILE_BYTES = 1_000_000


def say(text: str) -> None:
    """One line on stderr; a closed stderr is no reason to stop a training."""
    with suppress(OSError, ValueError):
        print(f"tracking: {text}", file=sys.stderr, flush=True)


def without_credentials(text: str) -> str:
    """`https://user:password@host` becomes `https://host`."""
    return re.sub(r"//[^@/\s]*@", "//", text)


def record(kind: str, **fields) -> dict:
    return {"kind": kind, "time": int(time.time() * 1000), **fields}


def clean_name(name: str) -> str:
    """A name that MLflow takes for metrics, params and tags: `recall@5` becomes `recall_at_5`."""
    return re.sub(r"[^/\w.\- ]", "_", str(name).replace("@", "_at_"))[:250].strip("/") or "_"


def clean_path(path: str) -> str:
    """A place below the run's artifacts: `../a//b` becomes `a/b`."""
    return posixpath.normpath(f"/{path}").strip("/")


def metrics_record(kind: str, values: Mapping, step: int | None) -> tuple[dict, list[str]]:
    """Values that float() takes, and the names of those that it does not.

    NaN and the infinities are written as the strings "nan", "inf", "-inf", because JSON has no such numbers.
    MLflow's SQL store keeps NaN as NaN and shows an infinity as +-1.8e308.
    """
    numbers, rejected = {}, []
    for name, value in values.items():
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            rejected.append(str(name))
        else:
            numbers[clean_name(name)] = number if math.isfinite(number) else str(number)
    return record(kind, values=numbers, step=None if step is None else int(step)), rejected


def flatten(values: Mapping, prefix: str = "") -> dict[str, str]:
    """{"train": {"seed": 1}} becomes {"train.seed": "1"}."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat


def params_records(values: Mapping) -> list[dict]:
    """The params; one longer than MLflow's limit is cut there and goes whole into an artifact of its own."""
    params, texts = {}, []
    for name, value in flatten(values).items():
        name = clean_name(name)
        params[name] = value[:PARAM_LIMIT]
        if len(value) > PARAM_LIMIT:
            texts.append(record("text", text=value, file=clean_path(f"params/{name}.txt")))
    return [record("params", values=params), *texts]


def tags_record(values: Mapping) -> dict:
    return record("tags", values={clean_name(name): str(value)[:TAG_LIMIT] for name, value in values.items()})


def model_record(
    name: str, snapshot: str, loader: str, example: list, step: int, metrics: Mapping, params: Mapping, registered: str,
    alias: str, about: str, description: str,
) -> dict:  # fmt: skip
    """A trained model: its snapshot's name, and under which names MLflow shall have it (see Tracker.register_model).

    MLflow allows no /:.%"' in names of models, and of aliases word characters alone, neither `latest` nor `v1`.
    """
    alias = re.sub(r"[^\w-]", "-", str(alias), flags=re.ASCII)
    if re.fullmatch(r"latest|v\d+", alias.lower()):
        alias = f"recipe-{alias}"
    return record(
        "model",
        name=_model_name(name),
        snapshot=snapshot,
        loader=loader,
        example=list(example),
        step=int(step),
        values=metrics_record("", metrics, step)[0]["values"],
        params=params_records(params)[0]["values"],
        registered=_model_name(registered),
        alias=alias,
        about=about,
        description=description,
    )


def _model_name(name: str) -> str:
    return re.sub(r'[/:.%"\']', "-", str(name))


def child_record(
    key: str, name: str, started: float, params: Mapping, metrics: Mapping, tags: Mapping, texts: Mapping
) -> dict:
    """A finished run below the journal's own: all of it in one record. texts: {artifact file: content}."""
    return record(
        "child",
        session=key,
        name=name,
        started=int(1000 * started),
        params=params_records(params)[0]["values"],
        values=metrics_record("", metrics, 0)[0]["values"],
        tags=tags_record(tags)["values"],
        texts={clean_path(file): str(text) for file, text in texts.items()},
    )


def table_record(rows: list[dict], artifact_file: str) -> dict:
    """Rows as MLflow stores a table (pandas' `orient="split"`); columns: the union of the rows' keys."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    plain = (str, int, float, bool, type(None))

    def cell(value):
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value if isinstance(value, plain) else json.dumps(value, default=str, ensure_ascii=False)

    data = [[cell(row.get(name)) for name in columns] for row in rows]
    if not artifact_file.endswith(".json"):
        artifact_file += ".json"
    text = json.dumps({"columns": columns, "data": data}, ensure_ascii=False)
    return record("table", text=text, file=clean_path(artifact_file))


def file_record(path: Path, artifact_path: str | None, snapshots: Snapshots) -> dict:
    """A file or folder to upload, as it is now: a small text in the journal itself, all else as a copy beside it."""
    path = Path(path).absolute()
    if path.is_file() and path.stat().st_size <= EMBEDDED_FILE_BYTES:
        with suppress(UnicodeDecodeError), path.open(encoding="utf-8", newline="") as file:
            return record("text", text=file.read(), file=clean_path(f"{artifact_path or ''}/{path.name}"))
    where = clean_path(artifact_path or "") or None
    name = path.name if path.is_file() else "content"
    return record("file", snapshot=snapshots.take({}, {name: path}), name=name, artifact_path=where)


def dataset_record(name: str, digest: str, source: str, context: str, profile: Mapping) -> dict:
    """What MLflow keeps of a data set: its name, digest, origin, use and a few numbers; never the data."""
    source = str(source)
    kind, key = (source.split("://")[0], "uri") if "://" in source else ("local", "uri")
    if kind in ("http", "https"):
        kind, key = "http", "url"
    return record(
        "dataset",
        name=str(name)[:500],
        digest=str(digest)[:DIGEST_LIMIT],
        source_type=kind,
        source=json.dumps({key: source}),
        context=str(context),
        profile=json.dumps(profile, default=str),
    )


class Journal:
    """An append-only file of records, and the position up to which they were sent.

    path: the journal of one training, on a disk that outlives the process. `state` is what is remembered
    between processes: `offset` (bytes sent), and what mlflow_run.MlflowRun adds. Records that could not be
    written (disk full) wait in `unwritten` and are tried again with each new one, so the order stays.
    """

    def __init__(self, path: Path):
        self.path = Path(path).absolute()
        self.snapshots = Snapshots(self.path)
        self.unwritten: list[dict] = []
        self._mutex = threading.Lock()
        self._lock = FileLock(f"{self.path}.lock", thread_local=False)  # the sending thread releases it
        self._warned = False
        self.state = {"offset": 0}
        with suppress(OSError, ValueError):
            self.state |= json.loads(self._sent_path.read_text())
        if self.state["offset"] > self._size():  # the journal was removed by hand and starts anew
            self.state = {"offset": 0}

    @property
    def _sent_path(self) -> Path:
        return self.path.with_name(self.path.name + ".sent")

    def _size(self) -> int:
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    def lock(self, timeout: float) -> bool:
        """False: another process sends this journal. Else it is ours until `release` or the process's end."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=timeout)
        except Timeout:
            return False
        except OSError:
            pass  # an unwritable folder: nobody else can write there either
        return True

    def release(self) -> None:
        with suppress(OSError):
            self.snapshots.folder.rmdir()  # unless something waits there
        with suppress(OSError):
            self._lock.release()

    def append(self, entry: dict) -> None:
        """Writes one record, and those that could not be written before it. TypeError: it is not JSON."""
        json.dumps(entry, default=str)
        with self._mutex:
            self.unwritten.append(entry)
            try:
                while self.unwritten:
                    self._write(json.dumps(self.unwritten[0], default=str).encode() + b"\n")
                    self.unwritten.pop(0)
            except OSError as error:
                if not self._warned:
                    self._warned = True
                    say(f"cannot write {self.path} ({error}); the training goes on, records wait in memory")

    def _write(self, line: bytes) -> None:
        """Opens the file each time, so that a journal that was moved away is started again."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+", buffering=0) as file:
            if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
                line = b"\n" + line  # the last writer was killed, or out of space, inside its line
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def take(self, limit: int = 200) -> list[tuple[dict, int | None]]:
        """The next unsent records, each with the offset behind it (None: only in memory). Removes nothing."""
        taken = []
        if self.state["offset"] > self._size():
            self.state["offset"] = 0
        offset = self.state["offset"]
        with suppress(OSError), self.path.open("rb") as file:
            file.seek(offset)
            while len(taken) < limit and (line := file.readline()).endswith(b"\n"):
                offset += len(line)
                taken.append((_parse(line), offset))
        if not taken:
            with self._mutex:
                taken = [(entry, None) for entry in self.unwritten[:limit]]
        return taken

    def mark_sent(self, taken: list[tuple[dict, int | None]]) -> None:
        """Moves the position behind these records and writes it, with `state`, to disk."""
        for entry, offset in taken:
            if offset is None:  # unless it was written to the file meanwhile: then it is sent a second time
                with self._mutex:
                    self.unwritten = [one for one in self.unwritten if one is not entry]
            else:
                self.state["offset"] = offset
        temporary = self._sent_path.with_name(self._sent_path.name + ".tmp")
        with suppress(OSError):
            temporary.write_text(json.dumps(self.state))
            os.replace(temporary, self._sent_path)
        for entry, _ in taken:
            if "snapshot" in entry:
                self.snapshots.drop(entry["snapshot"])

    def drop_orphans(self) -> None:
        """Removes snapshots that no unsent record names, left by a killed process; before any new one is taken."""
        self.snapshots.keep_only({entry["snapshot"] for entry in self._waiting() if "snapshot" in entry})

    def _waiting(self) -> list[dict]:
        waiting = list(self.unwritten)
        with suppress(OSError), self.path.open("rb") as file:
            file.seek(self.state["offset"])
            waiting += [entry for line in file if (entry := _parse(line))]
        return waiting

    def logged_steps(self) -> set[int]:
        """The steps of the metrics that this file holds for the run that a resumed training goes on in."""
        steps: set[int] = set()
        with suppress(OSError), self.path.open("rb") as file:
            for line in file:
                entry = _parse(line)
                if entry.get("kind") == "close" and entry.get("status") == "FINISHED":
                    steps = set()
                elif entry.get("kind") == "metrics" and entry.get("step") is not None:
                    steps.add(entry["step"])
        return steps

    def unsent(self) -> int:
        """How many records wait, in the file and in memory."""
        return len(self._waiting())


def _parse(line: bytes) -> dict:
    """A torn line (the process was killed while writing it) counts as an empty record."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}
