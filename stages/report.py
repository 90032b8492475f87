"""Stage 6: the report, a page about the last run: scores, curves, wrong answers by kind, calibration, verdicts.

    python -m stages.report                         # data/report/report.html, also in the training's MLflow run
    python -m stages.report new old                 # two experiments side by side: report-new-old.html
    python -m stages.report 4f1a2b3 --out page.html # one experiment, branch or commit

The page holds everything that it shows and no script; it opens without network. Experiments are read from DVC's cache,
the workspace stays as it is.
"""

import argparse
import json
from pathlib import Path

from stages.machine.entry import root_folder, run
from stages.machine.stage_params import settings_of, stage_params

REPORT, MODEL = Path("data/report/report.html"), Path("data/model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("experiment", nargs="*", help="none: the workspace; two: side by side")
    parser.add_argument("--out", type=Path, help="where the page of named experiments goes")
    arguments = parser.parse_args()
    if len(arguments.experiment) > 2:
        parser.error("one experiment or two")
    if not arguments.experiment and arguments.out:
        parser.error("--out: name an experiment; the workspace's page is data/report/report.html")
    params = stage_params("report")
    if arguments.experiment:
        report_on(arguments.experiment, arguments.out, params)
    else:
        report_stage(params)


def report_stage(params) -> None:
    from stages.reporting.experiment import of_workspace
    from stages.reporting.page import one_page
    from stages.storage import manifest
    from stages.tracking.runs import reopen_trained

    trained = json.loads((MODEL / "run.json").read_text(encoding="utf-8"))
    experiment = of_workspace(trained["name"], settings_of(params))
    manifest.write_whole(REPORT, one_page(experiment, verdicts(experiment, params.signs)))
    with reopen_trained(root_folder(), trained) as tracker:
        tracker.log_file(REPORT)
    print(f"report: {REPORT}")


def report_on(names: list[str], out: Path | None, params) -> None:
    """Pages of named experiments, judged by this workspace's thresholds."""
    from stages.reporting.experiment import of_revision
    from stages.reporting.page import one_page, two_page
    from stages.storage import manifest

    experiments = [of_revision(name) for name in names]
    judged = [verdicts(experiment, params.signs) for experiment in experiments]
    out = out or Path("report-" + "-".join(name.replace("/", "-") for name in names) + ".html")
    manifest.write_whole(
        out, two_page(*experiments, judged) if len(names) == 2 else one_page(experiments[0], judged[0])
    )
    print(f"report: {out}")


def verdicts(experiment, limits) -> list:
    from stages.verdicts.of_evaluation import evaluation_signs
    from stages.verdicts.of_training import training_signs

    history = experiment.history
    signs = evaluation_signs(experiment.scores, limits).signs
    if any("prior_entropy" in point for point in history):
        on_gpu = any("gpu_utilization" in point for point in history)
        signs = [*training_signs(history, experiment.training, limits, on_gpu).signs, *signs]
    return signs


if __name__ == "__main__":
    run(main)
