"""A small real pipeline in a repository of its own: run, run again, change a thing, ask, look into MLflow."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.in_process import run_stage

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow
ASKING = ("stages.ask", "stages.publish", "stages.recall")
SMALL = {
    "data": {"sample": {"passages": 120, "train_questions": 200, "validation_questions": 12, "test_questions": 12}},
    "retriever": {"steps": 2, "batch_size": 8, "n_docs": 2, "hybrid_depth": 0, "hybrid_weight": 0.3},
    "train": {"max_steps": 4, "batch_size": 2, "warmup_steps": 1, "logging_steps": 2, "eval_steps": 2, "save_steps": 2},
    "evaluate": {"num_beams": 2, "batch_size": 4},
    "tracking": {"system_metrics_seconds": 0.5},
    "runtime": {"threads": 1},
}


def merged(base: dict, changes: dict) -> dict:
    return base | {
        key: merged(base[key], value) if isinstance(value, dict) else value for key, value in changes.items()
    }


def run(folder: Path, *command: str, check: bool = True, text: str = "") -> subprocess.CompletedProcess:
    """A command in the folder; what asks a trained model and changes nothing there needs no process of its own."""
    if command[:2] == ("python", "-m") and command[2] in ASKING:
        done = run_stage(folder, command[2].removeprefix("stages."), *command[3:], text=text)
        assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DVC", "MLFLOW"))}
    environment |= {
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@example.org",
        "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@example.org",
    }  # fmt: skip
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, input=text, timeout=500)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def first_run(folder: Path) -> Path:
    """Makes a repository of the folder, runs the pipeline, commits what it wrote."""
    run(folder, "git", "init", "-q")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "before the first run")
    run(folder, "dvc", "repro")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "first run")
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A fresh repository with small parameters after its first `dvc repro`."""
    folder = tmp_path_factory.mktemp("project")
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, tracked):
        if not name.startswith(("tests/", "metrics/")) and name != "dvc.lock" and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    (folder / "params.yaml").write_text(yaml.safe_dump(merged(params, SMALL)), encoding="utf-8")
    return first_run(folder)


def curve(folder: Path, metric: str) -> list[tuple[int, float]]:
    with (folder / f"data/curves/{metric}.tsv").open() as file:
        return [(int(row["step"]), float(row["value"])) for row in csv.DictReader(file, delimiter="\t")]


def ran(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def test_the_metrics_have_the_promised_keys_and_only_numbers(project):
    evaluation = json.loads((project / "metrics/eval.json").read_text())
    training = json.loads((project / "metrics/train.json").read_text())
    assert {
        "em", "f1", "recall_at_5", "answer_recall_at_5", "oracle_em", "closed_book_em", "questions", "questions_per_second",
    } <= evaluation.keys()  # fmt: skip
    assert {
        "val_loss_per_sequence", "val_loss_per_token", "steps", "questions_seen", "seconds_per_step", "questions_per_second",
    } <= training.keys()  # fmt: skip
    assert all(isinstance(value, int | float) for value in [*evaluation.values(), *training.values()])
    assert evaluation["questions"] == 12 and training["steps"] == 4 and training["questions_seen"] == 16
    assert [step for step, _ in curve(project, "val_loss_per_sequence")] == [0, 2, 4]
    assert [step for step, _ in curve(project, "train_loss_per_sequence")] == [2, 4]


def test_predictions_show_where_each_answer_came_from(project):
    rows = [json.loads(line) for line in (project / "data/predictions/predictions.jsonl").open()]
    assert len(rows) == 12
    for row in rows:
        assert row.keys() >= {
            "question",
            "answers",
            "prediction",
            "em",
            "f1",
            "passages",
            "gold_rank",
            "without_passage",
        }
        assert row["kind"] in ("right", "near", "read wrong", "ranked wrong", "not found")
        assert [place for place, one in enumerate(row["passages"], 1) if one["gold"]][:1] == [
            rank for rank in [row["gold_rank"]] if rank and rank <= 2
        ]
        assert len(row["passages"]) == 2
        for belief in ("prior", "posterior"):
            assert sum(passage[belief] for passage in row["passages"]) == pytest.approx(1, abs=1e-3)
    scores = json.loads((project / "metrics/eval.json").read_text())
    assert scores["em"] == pytest.approx(100 * sum(row["em"] for row in rows) / 12)


def test_nothing_changed_nothing_runs_and_the_tree_is_clean(project):
    again = run(project, "dvc", "repro")
    assert ran(again.stdout) == ["inputs"]
    assert run(project, "git", "status", "--short").stdout == ""


def test_a_changed_parameter_runs_only_what_depends_on_it(project):
    def stages_run_with(setting: str) -> list[str]:
        first, *others = ran(run(project, "dvc", "exp", "run", "-S", setting).stdout)
        assert first == "inputs"
        return others

    assert stages_run_with("evaluate.decoding=fast") == ["evaluate", "report"]
    assert stages_run_with("train.learning_rate=1e-5") == ["train", "evaluate", "report"]
    assert stages_run_with("index.factory=HNSW8") == ["index", "reranker", "train", "evaluate", "report"]
    run(project, "git", "checkout", "-q", ".")
    run(project, "dvc", "checkout")
    # Trained before: DVC's run cache has it.
    assert stages_run_with("train.learning_rate=1e-5") == ["evaluate", "report"]
    assert [step for step, _ in curve(project, "val_loss_per_sequence")] == [0, 2, 4]
    run(project, "git", "checkout", "-q", ".")
    run(project, "dvc", "checkout")


def mlflow_of(folder: Path):
    """A client, and the pipeline's runs: trainings by id, without the evaluations below them."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("rag-recipes").experiment_id])
    return client, {one.info.run_id: one for one in found if "mlflow.parentRunId" not in one.data.tags}


def test_mlflow_has_one_run_with_everything(project):
    client, trainings = mlflow_of(project)
    first = min(trainings.values(), key=lambda one: one.info.start_time)
    experiment = client.get_experiment(first.info.experiment_id)
    assert first.info.status == "FINISHED" and experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert {
        "train.learning_rate", "recipe.marginalization", "retriever.n_docs", "train.seed", "seed", "data.sample.passages",
        "models.question_encoder", "retriever.steps", "index.factory",
    } <= first.data.params.keys()  # fmt: skip
    wanted = {
        "loss/train", "loss/validation", "loss/validation_per_token", "optimizer/learning_rate", "optimizer/gradient_norm",
        "speed/questions_per_second", "speed/seconds_per_step", "speed/host_wait", "retrieval/prior_entropy",
        "retrieval/distinct_passages", "retrieval/warmup_loss", "model/validation_loss", "test/em", "test/f1",
        "test/recall_at_5",
    }  # fmt: skip
    assert wanted <= first.data.metrics.keys(), wanted - first.data.metrics.keys()
    assert not [
        name for name in first.data.metrics if name.endswith(("n_docs", "/passages", "micro_batch", "/questions"))
    ]
    assert [point.step for point in client.get_metric_history(first.info.run_id, "loss/validation")] == [0, 2, 4]
    note = first.data.tags["mlflow.note.content"]
    assert note.startswith("EM ") and "Validation loss " in note and "good" in note
    assert first.data.tags["recipe"] == "new"
    sources = {one.dataset.name: one.dataset for one in first.inputs.dataset_inputs}
    assert {"passages", "train", "validation"} <= sources.keys()
    assert all(one.digest in one.source for one in sources.values())
    artifacts = {file.path for file in client.list_artifacts(first.info.run_id)}
    assert {"report.html", "predictions.json", "signs-train.txt", "signs-evaluate.txt"} <= artifacts
    children = client.search_runs([experiment.experiment_id], f"tags.mlflow.parentRunId = '{first.info.run_id}'")
    assert children and all(one.data.params["evaluate.num_beams"] for one in children)
    assert (project / "tensorboard" / first.info.run_name).is_dir()
    assert not list((project / ".tracking").glob("*.files"))


LOAD = """
import json, sys
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
rows = model.predict(["In which country is Warsaw Modlin Airport?", "Where is it?"])
import stages
print(json.dumps({"rows": rows.to_dict("records"), "code": stages.__file__, "example": model.input_example}))
"""


def test_the_registered_model_answers_as_the_checkout_does_from_any_folder_without_it(project, tmp_path):
    run(project, "dvc", "repro")
    asked = run(project, "python", "-m", "stages.ask", "In which country is Warsaw Modlin Airport?").stdout
    client, _ = mlflow_of(project)
    run_id = json.loads((project / "data/model/run.json").read_text())["run_id"]
    # The alias is of what was trained last, which may be another test's experiment.
    (version,) = [one for one in client.search_model_versions("name = 'rag-recipes'") if one.run_id == run_id]
    assert client.get_model_version_by_alias("rag-recipes", "new").version >= version.version
    for name in ("data", "stages"):
        (project / name).rename(tmp_path / name)
    (tmp_path / "empty").mkdir()
    try:
        uri = f"sqlite:///{project}/mlflow.db"
        done = run(tmp_path / "empty", sys.executable, "-c", LOAD, uri, f"models:/rag-recipes/{version.version}")
    finally:
        for name in ("data", "stages"):
            (tmp_path / name).rename(project / name)
    found = json.loads(done.stdout.splitlines()[-1])
    assert asked.startswith(found["rows"][0]["answer"]) and len(found["rows"]) == 2
    assert f"probability {found['rows'][0]['probability']:.2f}" in asked
    passages = found["rows"][0]["passages"]
    assert len(passages) == 2 and all(one["title"] in asked for one in passages)
    assert sum(one["prior"] for one in passages) == pytest.approx(1) == sum(one["posterior"] for one in passages)
    assert "mlartifacts" in found["code"] and found["example"]
    (model,) = [
        one for one in client.search_logged_models([client.get_run(version.run_id).info.experiment_id])
        if one.source_run_id == version.run_id
    ]  # fmt: skip
    assert {"model/validation_loss", "test/em", "test/f1"} <= {one.key for one in model.metrics}


def test_above_the_limit_only_the_weights_go_to_mlflow_and_a_line_says_so(project):
    file = project / "params.yaml"
    before = file.read_text(encoding="utf-8")
    file.write_text(before.replace("model_gigabytes: 20", "model_gigabytes: 0.04"), encoding="utf-8")
    try:
        told = run(project, "dvc", "exp", "run", "-S", "train.seed=21").stdout
    finally:
        run(project, "git", "checkout", "-q", ".")
        run(project, "dvc", "checkout")
    assert "MLflow gets the weights alone" in told and "tracking.model_gigabytes (0.04)" in told
    client, _ = mlflow_of(project)
    version = client.get_model_version_by_alias("rag-recipes", "new")
    parts = Path(version.source.removeprefix("file://")) / "data/parts"
    assert sorted(one.name for one in parts.iterdir()) == ["model", "params.yaml"]


def test_published_into_a_folder_it_answers_from_there(project, tmp_path):
    run(project, "dvc", "repro")
    run(project, "python", "-m", "stages.publish", str(tmp_path / "mine"))
    card = (tmp_path / "mine/README.md").read_text(encoding="utf-8")
    trained = json.loads((project / "data/model/run.json").read_text())
    scores = json.loads((project / "metrics/eval.json").read_text())
    assert trained["fingerprint"] in card and f"| EM | {scores['em']:.1f} |" in card
    assert trained["data"][0]["digest"] in card and "| marginalization | sequence |" in card
    code = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from transformers import RagSequenceForGeneration
from stages.evaluation.pyfunc import AnsweringModel
folder = Path(sys.argv[2])
RagSequenceForGeneration.from_pretrained(folder)
print(AnsweringModel(folder / "retrieval", model=folder).predict(["Where is it?"]).answer[0])
"""
    assert run(tmp_path, sys.executable, "-c", code, str(project), str(tmp_path / "mine")).stdout.strip()
    again = run(project, "python", "-m", "stages.publish", str(tmp_path / "mine"), check=False)
    assert again.returncode == 1 and "is not overwritten" in again.stderr
    params = project / "params.yaml"
    params.write_text(params.read_text(encoding="utf-8").replace("max_steps: 4", "max_steps: 5"), encoding="utf-8")
    refused = run(project, "python", "-m", "stages.publish", str(tmp_path / "other"), check=False)
    assert refused.returncode == 1 and "--weights-only" in refused.stderr and not (tmp_path / "other").exists()
    run(project, "python", "-m", "stages.publish", "--weights-only", str(tmp_path / "other"))
    other = (tmp_path / "other/README.md").read_text(encoding="utf-8")
    # The weights are as they were evaluated; what they were trained with is no longer what params.yaml says.
    assert "| EM |" in other and "Validation loss" in card and "Validation loss" not in other
    run(project, "git", "checkout", "-q", ".")


def test_passages_read_together_are_read_together_wherever_the_model_is_asked(project, tmp_path):
    changes = ("recipes.new.reading=together", "recipes.new.retriever_gradient=emdr2", "retriever.n_docs=3")
    settings = [part for change in changes for part in ("-S", change)]
    assert ran(run(project, "dvc", "exp", "run", *settings).stdout) == ["inputs", "train", "evaluate", "report"]
    assert curve(project, "retriever_loss") and json.loads((project / "metrics/eval.json").read_text())["n_docs"] == 3
    rows = [json.loads(line) for line in (project / "data/predictions/predictions.jsonl").read_text().splitlines()]
    assert all(abs(sum(one["posterior"] for one in row["passages"]) - 1) < 1e-3 for row in rows)
    questions = [row["question"] for row in rows[:3]]
    given = run(project, "python", "-m", "stages.ask", "--json", text="\n".join(questions)).stdout.splitlines()
    asked = [json.loads(line) for line in given]
    assert [one["answer"] for one in asked] == [row["prediction"] for row in rows[:3]]
    assert [one["log_prob"] for one in asked] == pytest.approx([row["log_prob"] for row in rows[:3]], abs=1e-3)

    client, _ = mlflow_of(project)
    version = client.get_model_version_by_alias("rag-recipes", "new")
    parts = Path(version.source.removeprefix("file://")) / "data/parts"
    code = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from stages.evaluation.pyfunc import AnsweringModel
print(json.dumps(AnsweringModel(Path(sys.argv[2])).predict(sys.argv[3:]).to_dict("records")))
"""
    loaded = run(tmp_path, sys.executable, "-c", code, str(project), str(parts), *questions).stdout.splitlines()[-1]
    for one, row in zip(json.loads(loaded), rows, strict=False):
        assert one["answer"] == row["prediction"]
        assert one["probability"] == pytest.approx(min(1.0, np.exp(row["log_prob"])), rel=1e-2)
        posteriors = [passage["posterior"] for passage in row["passages"]]
        assert [passage["posterior"] for passage in one["passages"]] == pytest.approx(posteriors, abs=1e-3)
    run(project, "git", "checkout", "-q", ".")
    run(project, "dvc", "checkout")


def test_two_ranks_make_one_run(project):
    """`runtime` is no part of the recipe: what two ranks made is found again by one."""
    client, before = mlflow_of(project)
    seed = ("-S", "train.seed=14", "-S", "index.batch_tokens=4096")
    output = run(project, "dvc", "exp", "run", "-S", "runtime.processes=2", *seed).stdout
    assert {"encode", "index", "train"} <= set(ran(output)) and output.count("nats a question at step") == 1
    assert json.loads((project / "metrics/train.json").read_text())["questions_seen"] == 16
    [new] = mlflow_of(project)[1].keys() - before.keys()
    assert client.get_run(new).info.status == "FINISHED"
    again = run(project, "dvc", "exp", "run", "-S", "runtime.processes=1", *seed)
    assert ran(again.stdout) == ["inputs"]
    run(project, "git", "checkout", "-q", ".")
    run(project, "dvc", "checkout")


def test_a_refreshed_index_lies_beside_the_model_and_is_what_is_asked(project):
    changes = ("train.index_refresh_steps=1", "train.context_encoder_learning_rate=1e-2", "retriever.hybrid_depth=4")
    settings = [part for change in changes for part in ("-S", change)]
    assert ran(run(project, "dvc", "exp", "run", *settings).stdout) == [
        "inputs", "lexical", "reranker", "train", "evaluate", "report",
    ]  # fmt: skip
    before, after = (np.load(project / folder / "vectors.npy") for folder in ("data/vectors", "data/model/index"))
    assert before.shape == after.shape and np.abs(before - after).max() > 1e-3
    assert [step for step, _ in curve(project, "refresh_wait")] == [2, 3, 4]
    scores = json.loads((project / "metrics/eval.json").read_text())
    shutil.rmtree(project / "data/index")
    shutil.rmtree(project / "data/vectors")
    run(project, "python", "-m", "stages.evaluate")
    again = json.loads((project / "metrics/eval.json").read_text())
    timed = "questions_per_second"
    assert {**again, timed: 0} == {**scores, timed: 0}
    assert "prior  posterior" in run(project, "python", "-m", "stages.ask", "Where is Warsaw Modlin Airport?").stdout
    refused = run(
        project, "dvc", "exp", "run", *settings, "-S", "runtime.processes=2", "-S", "train.seed=9", check=False
    )
    assert refused.returncode and "train.index_refresh_steps: 1, but 2 processes" in refused.stderr + refused.stdout
    run(project, "git", "checkout", "-q", ".")
    run(project, "dvc", "checkout")


def test_ask_answers_with_passages_and_reads_standard_input(project):
    one = run(project, "python", "-m", "stages.ask", "In which country is Warsaw Modlin Airport?")
    assert "prior  posterior  passage" in one.stdout and "probability" in one.stdout
    two = run(project, "python", "-m", "stages.ask", text="Where is it?\n\nAnd why?\n")
    assert two.stdout.count("prior  posterior  passage") == 2


def test_ask_for_programs_and_for_a_pager_that_closes(project):
    lines = run(project, "python", "-m", "stages.ask", "--json", text="Where is it?\nAnd why?\n").stdout.splitlines()
    given = [json.loads(line) for line in lines]
    assert [one["question"] for one in given] == ["Where is it?", "And why?"]
    assert all(one["passages"][0]["text"] and 0 <= one["probability"] <= 1 for one in given)
    piped = "for number in $(seq 20); do echo 'Where is it?'; done | python -m stages.ask | head -1"
    cut = run(project, "bash", "-o", "pipefail", "-c", piped)
    assert len(cut.stdout.splitlines()) == 1 and "Error" not in cut.stderr and "Loading weights" not in cut.stderr


def test_outputs_that_a_killed_experiment_took_away_are_brought_back_by_a_named_command(project):
    (project / "data/model").rename(project / "data/away")
    asked = run(project, "python", "-m", "stages.ask", "Where?", check=False)
    (project / "data/away").rename(project / "data/model")
    assert asked.returncode == 1 and "data/model: not there; `dvc checkout` brings back" in asked.stderr
    assert len(asked.stderr.splitlines()) == 1


def plots_of(page: Path) -> list[dict]:
    """The plots of DVC's page: {"title", "axes", "curves": {(revision, file): [(step, value), ...]}}."""
    made = []
    for text in re.findall(r"var spec = (\{.*?\});\s*\n", page.read_text(encoding="utf-8"), re.DOTALL):
        spec = json.loads(text)
        curves: dict[tuple, list] = {}
        for row in spec["data"]["values"]:
            curves.setdefault((row["rev"], row["filename"]), []).append((float(row["step"]), float(row["value"])))
        made.append({"title": spec["title"]["text"], "text": text, "curves": curves})
    return made


def test_dvcs_page_draws_each_curve_once_as_it_was_logged(project):
    run(project, "dvc", "plots", "show")
    plots = plots_of(project / "dvc_plots/index.html")
    assert len({plot["title"] for plot in plots}) == len(plots) == 3
    assert all('"optimizer step"' in plot["text"] for plot in plots)
    drawn = [(name, points) for plot in plots for name, points in plot["curves"].items()]
    assert len(drawn) == len({name for name, _ in drawn}) == 6
    for (revision, file), points in drawn:
        assert revision == "workspace" and points == curve(project, file.removesuffix(".tsv"))
    losses = next(plot["curves"] for plot in plots if "Loss" in plot["title"])
    assert all(value > 1 for points in losses.values() for _, value in points)  # an empty cell would be drawn as 0


def test_a_wrong_parameter_is_one_line(project):
    params = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(params.replace("n_docs: 2", "n_dogs: 2"))
    try:
        failed = run(project, "python", "-m", "stages.train", check=False)
    finally:
        (project / "params.yaml").write_text(params)
    assert failed.returncode == 1 and "retriever.n_docs" in failed.stderr and len(failed.stderr.splitlines()) == 1


def test_a_temporary_experiment_leaves_its_run_and_can_be_applied(project):
    _, before = mlflow_of(project)
    run(project, "dvc", "exp", "run", "--temp", "-n", "warm", "-S", "train.max_steps=6")
    client, after = mlflow_of(project)
    [new] = after.keys() - before.keys()
    assert after[new].info.status == "FINISHED" and "test/em" in after[new].data.metrics
    assert after[new].info.run_name == "warm" and (project / "tensorboard/warm").is_dir()
    version = client.get_model_version_by_alias("rag-recipes", "new")
    weights = Path(version.source.removeprefix("file://")) / "data/parts/model/model.safetensors"
    assert version.run_id == new and weights.is_file(), "its own model, at the root"
    run(project, "dvc", "exp", "apply", "warm")
    assert json.loads((project / "data/model/run.json").read_text())["run_id"] == new
    assert json.loads((project / "metrics/train.json").read_text())["steps"] == 6
    assert weights.read_bytes() == (project / "data/model/model.safetensors").read_bytes()
    run(project, "dvc", "exp", "branch", "warm", "kept")
    assert "kept" in run(project, "git", "branch").stdout

    run(project, "dvc", "plots", "diff", "HEAD", "warm")
    losses = next(plot for plot in plots_of(project / "dvc_plots/index.html") if "Loss" in plot["title"])["curves"]
    assert {revision for revision, _ in losses} == {"HEAD", "warm"}
    assert losses["warm", "val_loss_per_sequence.tsv"] == curve(project, "val_loss_per_sequence")
    assert [step for step, _ in losses["HEAD", "val_loss_per_sequence.tsv"]] == [0, 2, 4]

    assert run(project, "python", "-m", "stages.report", "HEAD", "warm").stdout == "report: report-HEAD-warm.html\n"
    page = (project / "report-HEAD-warm.html").read_text(encoding="utf-8")
    assert "train.max_steps</td><td>4</td><td>6</td>" in page and page.count("<svg") > 20
    table = run(project, "python", "-m", "stages.runs").stdout
    assert "train.max_steps=6" in next(line for line in table.splitlines() if line.startswith("warm"))
    assert max(map(len, table.splitlines())) <= 100
    unknown = run(project, "python", "-m", "stages.report", "HEAD", "worm", check=False)
    assert (
        unknown.returncode == 1
        and unknown.stderr.startswith("error: there is no experiment")
        and "worm" in unknown.stderr
    )


def test_hybrid_retrieval_reruns_what_it_changes_and_answers_new_questions(project):
    file = project / "params.yaml"
    before = file.read_text(encoding="utf-8")
    file.write_text(before.replace("hybrid_depth: 0", "hybrid_depth: 25"), encoding="utf-8")
    done = run(project, "dvc", "repro")
    assert {"lexical", "reranker", "train", "evaluate"} <= set(ran(done.stdout)) and not {
        "prepare",
        "encode",
        "index",
    } & set(ran(done.stdout))
    metrics = json.loads((project / "metrics/lexical.json").read_text())
    assert metrics["depth"] == 25 and metrics["recall_at_20"] > 20  # airports are asked for by their names
    asked = run(project, "python", "-m", "stages.ask", "Which country is Warsaw Modlin Airport in?")
    assert "posterior" in asked.stdout
    run(project, "python", "-m", "stages.recall", "--split", "test", "--weights", "0", "1", "--out", "recall.json")
    recall = json.loads((project / "recall.json").read_text())
    assert recall["hybrid_0"] == recall["dense"] and recall["bm25"]["recall_at_20"] == metrics["recall_at_20"]
    assert (
        recall["hybrid_1"]["recall_at_20"] >= recall["hybrid_1"]["recall_at_5"] >= recall["hybrid_1"]["recall_at_1"] > 0
    )
    (project / "data/lexical/test_rows.npy").write_bytes(b"")
    broken = run(project, "python", "-m", "stages.evaluate", check=False)
    assert broken.returncode == 1 and "data/lexical: damaged (test_rows.npy" in broken.stderr
    file.write_text(before, encoding="utf-8")


def test_a_reranker_trains_is_asked_and_measured_and_fsdp_refuses_it(project):
    changes = {
        "models.reranker": "data/tiny/encoder", "retriever.hybrid_depth": 25, "retriever.rerank_depth": 6,
        "retriever.learn_weights": "true", "retriever.reranker.steps": 3, "retriever.reranker.batch_size": 4,
        "train.answers": "drawn",
    }  # fmt: skip
    settings = [part for name, value in changes.items() for part in ("-S", f"{name}={value}")]
    assert ran(run(project, "dvc", "exp", "run", *settings).stdout)[-4:] == [
        "reranker", "train", "evaluate", "report",
    ]  # fmt: skip
    warm = json.loads((project / "metrics/reranker.json").read_text())
    assert warm["steps"] == 3 and warm["candidates"] == 6 and warm["hard_negatives_mined"] > 1
    assert all(isinstance(value, int | float) for value in warm.values())
    # Joint training starts from what was fitted to the validation questions, a step or two of a hundredth each before.
    fitted = json.loads((project / "data/reranker/reranker.json").read_text())["weights"]
    assert curve(project, "temperature")[0][1] == pytest.approx(fitted["temperature"], rel=0.05)
    assert curve(project, "hybrid_weight")[0][1] == pytest.approx(fitted["hybrid_weight"], rel=0.05)
    assert curve(project, "cross_encoder_gradient_norm")[-1][1] > 0
    assert {"bm25_recall_at_5", "dense_recall_at_5", "fitted_recall_at_1"} <= warm.keys()
    assert (project / "data/model/prior.json").is_file() and (
        project / "data/model/reranker/model.safetensors"
    ).is_file()
    assert "prior  posterior" in run(project, "python", "-m", "stages.ask", "Where is Warsaw Modlin Airport?").stdout
    scores = json.loads((project / "metrics/eval.json").read_text())
    run(project, "python", "-m", "stages.recall", "--split", "test", "--trained", "--out", "recall.json")
    recall = json.loads((project / "recall.json").read_text())
    assert {"dense", "bm25", "reranker", "reranked"} <= recall.keys()
    assert recall["reranked"]["recall_at_1"] == pytest.approx(scores["recall_at_1"])
    for name in ("dense", "bm25"):
        assert scores[f"{name}_recall_at_5"] == pytest.approx(recall[name]["recall_at_5"])
    sharded = ("accelerate", "launch", "--use_fsdp", "--fsdp_version=2", "--num_processes=2", "--num_machines=1")
    refused = run(project, *sharded, "--mixed_precision=no", "-m", "stages.train", check=False)
    assert refused.returncode and "models.reranker: data/tiny/encoder does not train with FSDP" in refused.stderr
    run(project, "git", "checkout", "-q", ".")
    run(project, "dvc", "checkout")


def test_passages_are_read_together(project, tmp_path):
    from transformers import BartForConditionalGeneration, DPRQuestionEncoder

    changes = {
        "recipes.new.reading": "together", "recipes.new.retriever_gradient": "emdr2", "retriever.n_docs": 3,
        "train.max_steps": 12, "train.eval_steps": 6, "train.batch_size": 8, "train.learning_rate": "3e-4",
    }  # fmt: skip
    settings = [part for name, value in changes.items() for part in ("-S", f"{name}={value}")]
    assert ran(run(project, "dvc", "exp", "run", *settings).stdout)[-3:] == ["train", "evaluate", "report"]
    validation = [loss for _, loss in curve(project, "val_loss_per_sequence")]
    assert len(validation) == 3 and validation[-1] < validation[0]
    assert len(curve(project, "retriever_loss")) == 6
    assert curve(project, "question_encoder_gradient_norm")[-1][1] > 0
    trained = json.loads((project / "data/model/run.json").read_text())
    client, _ = mlflow_of(project)
    assert len(client.get_metric_history(trained["run_id"], "loss/retriever")) == 6
    for part, kind in (("generator", BartForConditionalGeneration), ("question_encoder", DPRQuestionEncoder)):
        _, told = kind.from_pretrained(project / "data/model" / part, output_loading_info=True)
        assert not told["missing_keys"] and not told["unexpected_keys"]
    assert "probability" in run(project, "python", "-m", "stages.ask", "Where is Warsaw Modlin Airport?").stdout
    run(project, "python", "-m", "stages.publish", str(tmp_path / "mine"))
    card = (tmp_path / "mine/README.md").read_text(encoding="utf-8")
    assert (
        "reads all retrieved passages" in card and "| reading | together |" in card and 'subfolder="generator"' in card
    )
    run(project, "git", "checkout", "-q", ".")
    run(project, "dvc", "checkout")


def test_sharded_by_accelerate_it_trains_and_leaves_the_same_files(project, tmp_path):
    """One process finds in the checkpoints what the two that held a half each have left there."""
    run(project, "dvc", "repro")  # whatever another test has left
    folder = tmp_path / "sharded"
    shutil.copytree(project, folder)
    for made in (folder / "data/model", folder / "metrics", folder / ".checkpoints"):
        shutil.rmtree(made, ignore_errors=True)
    run(folder, "accelerate", "launch", "--use_fsdp", "--fsdp_version=2", "--num_processes=2", "--num_machines=1",
        "--mixed_precision=no", "-m", "stages.train")  # fmt: skip
    names = [sorted(path.name for path in (where / "data/model").rglob("*")) for where in (project, folder)]
    assert names[0] == names[1]
    expected, found = ([value for _, value in curve(where, "val_loss_per_sequence")] for where in (project, folder))
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found == pytest.approx(expected, rel=0.05)  # each rank draws its own dropout
    steps = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))["train"]["max_steps"]
    assert f"trained already, {steps} steps" in run(folder, sys.executable, "-m", "stages.train").stdout
    assert "EM" in run(folder, sys.executable, "-m", "stages.evaluate").stdout.upper()
