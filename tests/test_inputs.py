"""Own data through DVC: what a changed file reruns, what a temporary run sees, what the whole pipeline makes of it."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.test_pipeline import ROOT, SMALL, first_run, merged, ran, run

pytestmark = pytest.mark.slow
CITIES = ["Oslo", "Paris", "Rome", "Lima"]
OWN = {
    "data": {
        "source": "files",
        "files": {"train": "own/nq_train.jsonl", "passages": "own/passages.jsonl"},
        "shares": {"validation": 0.1, "test": 0.1},
    },
    "models": {"generator": "own/generator"},
}


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_questions(folder: Path, count: int) -> None:
    write(
        folder / "own/nq_train.jsonl",
        [{"question": f"Where is tower number{i}?", "answer": [CITIES[i % 4]]} for i in range(count)],
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A repository whose data and generator lie in a folder that git ignores, after its first `dvc repro`."""
    folder = tmp_path_factory.mktemp("own")
    for name in ("stages", "data/tiny", ".dvc/config", ".dvcignore", ".gitignore", "dvc.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    with open(folder / ".gitignore", "a", encoding="utf-8") as file:
        file.write("/own/\n")
    shutil.copytree(ROOT / "data/tiny/generator", folder / "own/generator")
    write_questions(folder, 80)
    write(
        folder / "own/passages.jsonl",
        [{"title": f"Tower {i}", "text": f"Tower number{i} stands in {CITIES[i % 4]}."} for i in range(80)],
    )
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    (folder / "params.yaml").write_text(yaml.safe_dump(merged(merged(params, SMALL), OWN)), encoding="utf-8")
    return first_run(folder)


def test_own_data_goes_all_the_way(project):
    evaluation = json.loads((project / "metrics/eval.json").read_text())
    assert evaluation["questions"] == 8 and evaluation["passages"] == 80
    assert evaluation["questions_with_gold_passage"] == 0  # none was named, and none is made up for the test split
    assert (
        json.loads((project / "metrics/retriever.json").read_text())["val_loss"] > 0
    )  # positives were found by answer
    assert (project / "data/unusable.jsonl").read_bytes() == b""


def test_nothing_changed_only_the_look_at_the_inputs_runs(project):
    assert ran(run(project, "dvc", "repro").stdout) == ["inputs"]
    (project / "own/passages.jsonl").touch()
    assert ran(run(project, "dvc", "repro").stdout) == ["inputs"]
    assert run(project, "git", "status", "--short").stdout == ""


def test_a_temporary_run_finds_files_that_git_does_not_track(project):
    done = run(project, "dvc", "exp", "run", "--temp", "-S", "lengths.context_tokens=100")
    assert ran(done.stdout) == ["inputs", "tokens", "train", "evaluate", "report"]
    assert ran(run(project, "dvc", "exp", "run", "--temp", "-S", "evaluate.num_beams=1").stdout) == [
        "inputs",
        "evaluate",
        "report",
    ]


def test_a_changed_file_reruns_what_reads_it_and_the_old_one_comes_from_the_cache(project):
    write_questions(project, 78)
    assert ran(run(project, "dvc", "repro", "prepare").stdout) == ["inputs", "prepare"]
    write_questions(project, 80)
    back = run(project, "dvc", "repro").stdout
    assert ran(back) == ["inputs"] and "Stage 'prepare' is cached" in back
    assert run(project, "git", "status", "--short").stdout == ""


def test_a_changed_model_folder_reruns_what_loads_it(project):
    config = project / "own/generator/tokenizer_config.json"
    before = config.read_text()
    config.write_text(before + "\n")
    status = json.loads(run(project, "dvc", "status", "--json").stdout)
    assert list(status) == ["inputs"]
    assert ran(run(project, "dvc", "repro", "tokens", "index").stdout) == ["inputs", "tokens"]
    config.write_text(before)
    run(project, "dvc", "repro")


def test_a_warm_up_without_any_positive_says_what_to_do(project):
    failed = run(project, "dvc", "exp", "run", "--temp", "-S", "data.positives.depth=0", check=False)
    assert "no question has a positive passage" in failed.stderr + failed.stdout
    assert "data.positives.depth" in failed.stderr + failed.stdout


def test_damage_is_one_line_and_ends_the_pipeline_there(project):
    sound = (project / "own/passages.jsonl").read_bytes()
    (project / "own/passages.jsonl").write_bytes(sound + b"{\n")
    try:
        failed = run(project, "dvc", "repro", check=False)
    finally:
        (project / "own/passages.jsonl").write_bytes(sound)
    assert failed.returncode != 0 and "error: own/passages.jsonl:81: not valid JSON" in failed.stderr + failed.stdout
    (project / "own/passages.jsonl").rename(project / "own/elsewhere.jsonl")
    failed = run(project, "dvc", "repro", check=False)
    (project / "own/elsewhere.jsonl").rename(project / "own/passages.jsonl")
    assert "error: data.files.passages: own/passages.jsonl not found" in failed.stderr + failed.stdout
    assert ran(run(project, "dvc", "repro").stdout) == ["inputs"]
