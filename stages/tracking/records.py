"""The records of a journal: values in the shape that MLflow accepts, each {"kind", "time", ...}. Nothing here needs MLflow."""

import json
import math
import posixpath
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from stages.tracking.snapshots import Snapshots

PARAM_LIMIT = 6000  # characters of a value; mlflow.utils.validation.MAX_PARAM_VAL_LENGTH
TAG_LIMIT = 8000
DIGEST_LIMIT = 36
EMBEDDED_FILE_BYTES = 1_000_000


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
