"""Natural Questions in local folders of the hub's layout, and one clear line where the hub is out of reach."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from stages.reading.natural_questions import open_tables
from stages.settings.data import Nq

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """Both repositories as the hub lays them out: questions in one file a split, passages in several."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"where is tower number{i}", "answer": ["Oslo", "Christiania"]} for i in range(60)]
    write(tmp_path / "nq_open/nq_open/train-00000-of-00001.parquet", rows[:50])
    write(tmp_path / "nq_open/nq_open/validation-00000-of-00001.parquet", rows[50:])
    passages = [
        {"id": str(i + 1), "text": f"Tower number{i} stands in Oslo.", "title": f"Tower {i}"} for i in range(60)
    ]
    for part in range(3):
        folder = tmp_path / "wiki_dpr/data/psgs_w100/no_embeddings"
        write(folder / f"train-0000{part}-of-00003.parquet", passages[part * 20 : part * 20 + 20])
    return tmp_path


def settings(**changes) -> Nq:
    return Nq(**(SHIPPED["data"]["nq"] | {"questions": "nq_open", "passages": "wiki_dpr"} | changes))


def test_the_splits_and_all_parts_are_streamed_in_order(hub):
    tables = open_tables(settings())
    assert list(tables) == ["train", "test", "passages"]
    assert sum(1 for _ in tables["train"][0].read()) == 50 and sum(1 for _ in tables["test"][0].read()) == 10
    lines, rows = zip(*tables["passages"][0].read(), strict=True)
    assert lines == tuple(range(1, 61)) and [row["id"] for row in rows] == [str(i) for i in range(1, 61)]
    assert next(tables["passages"][0].read())[1]["text"] == "Tower number0 stands in Oslo."  # from the beginning again


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (
            lambda hub: next(hub.rglob("validation-*")).unlink(),
            "data.nq.questions: .*nq_open/validation-.* cannot be read",
        ),
        (
            lambda hub: next(hub.rglob("train-00000-of-00001*")).write_bytes(b"PAR1 no"),
            "data.nq.questions: .*cannot be read",
        ),
        (lambda hub: next(hub.rglob("train-00001-of-00003*")).write_bytes(b""), "data.nq.passages: .*cannot be read"),
    ],
)
def test_a_local_folder_with_damage(hub, break_it, says):
    break_it(hub)
    tables = open_tables(settings())
    with pytest.raises(ValueError, match=says) as error:
        for [table] in tables.values():
            list(table.read())
    assert "\n" not in str(error.value) and "the folder must have the hub's layout" in str(error.value)


def prepare(hub: Path, **changes) -> subprocess.CompletedProcess:
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for part in ("question_encoder", "context_encoder", "generator"):
        values["models"][part] = str(ROOT / values["models"][part])
    values["data"] |= {"source": "nq", "nq": values["data"]["nq"] | changes}
    (hub / "params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = (
        "from stages import inputs, prepare; from stages.machine.entry import run; run(inputs.main); run(prepare.main)"
    )
    return subprocess.run([sys.executable, "-c", command], cwd=hub, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_prepare_offline_from_local_folders(hub):
    done = prepare(hub, questions="nq_open", passages="wiki_dpr")
    assert done.returncode == 0, done.stderr
    assert "60 passages; questions: 48 train, 2 validation, 10 test" in done.stdout
    assert "nq_open/nq_open/train-00000-of-00001.parquet" in (hub / "data/inputs/data.json").read_text()


@pytest.mark.slow
def test_without_the_hub_one_line_says_what_to_fetch_and_where_to_put_it(hub):
    done = prepare(hub)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    for part in (
        "data.nq.questions", "google-research-datasets/nq_open", "nq_open/train-*.parquet", "psgs_w100.tsv.gz",
        "data.source: files", "data.files.train",
    ):  # fmt: skip
        assert part in done.stderr
    assert os.listdir(hub / "data") == ["inputs"] or set(os.listdir(hub / "data")) == {"inputs", "unusable.jsonl"}
