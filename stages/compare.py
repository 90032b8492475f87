"""Old recipe against new, and each of the old recipe's bugs put back alone (not a stage: it starts DVC experiments).

    python -m stages.compare recipes                # experiments `old`, `old-same-questions`, `new`; metrics/compare.json
    python -m stages.compare ablation --seeds 3     # one experiment a bug and seed, queued; metrics/ablation.json
    python -m stages.compare ablation --seeds 1 --steps 2 --questions 10    # to see that it works

Experiments run in DVC's temporary copies of the last commit, so the workspace stays as it is: commit first.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

from stages.machine.entry import run
from stages.params import load_params

COMPARISON, ABLATION = Path("metrics/compare.json"), Path("metrics/ablation.json")
PREPARED = Path("data/prepared")
NO_EM = "an ablation tells what each bug costs in EM; let questions have answers, or compare what is found by `dvc metrics diff`"
SHOWN = (
    "em", "f1", "recall_at_1", "recall_at_5", "answer_recall_at_5", "dense_recall_at_1", "dense_recall_at_5",
    "bm25_recall_at_1", "bm25_recall_at_5", "oracle_em", "val_loss_per_sequence", "val_loss_per_token",
    "seconds_per_step", "questions_per_second", "questions_seen", "steps",
)  # fmt: skip
SWITCHES = (
    "marginalization", "accumulation", "batching", "precision", "checkpoints", "tensorboard", "retriever_gradient",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["recipes", "ablation"])
    parser.add_argument("--steps", type=int, help="optimizer steps of the new recipe, 32 questions each")
    parser.add_argument("--questions", type=int, default=None, help="questions to evaluate")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="experiments at once")
    arguments = parser.parse_args()
    params = load_params()
    if arguments.what == "recipes":
        compare(arguments.steps or params.train.max_steps, arguments.questions)
    else:
        steps = arguments.steps or max(6, params.train.max_steps // 10)
        ablate(steps, arguments.questions, arguments.seeds, arguments.jobs)


def compare(steps: int, questions: int | None) -> None:
    """Each recipe at its own settings in the original proportion, and the old one at the new one's number of questions.

    The original: 15,000 steps of 2 x 16 questions against 3,000 batches of 8, each of which makes two updates of 4.
    """
    old_batches = max(1, steps // 5)
    runs = {
        "new": [
            "train.recipe=new",
            "train.batch_size=2",
            "train.gradient_accumulation_steps=16",
            f"train.max_steps={steps}",
        ],
        "old": old_settings(2 * old_batches),
        "old-same-questions": old_settings(steps * 32 // 4),
    }
    for name, settings in runs.items():
        forget(name)
        dvc("exp", "run", "--temp", "-n", name, *changes([*settings, *scored(questions)]))
    table = {name: metrics_of(name) for name in runs}
    write(COMPARISON, {name.replace("-", "_"): values for name, values in table.items()})
    print_table(table, SHOWN)
    print("\nside by side: python -m stages.report new old; curves over each other: dvc plots diff old new")


def old_settings(updates: int) -> list[str]:
    warmup = f"train.warmup_steps={min(load_params().train.warmup_steps, updates - 1)}"
    return [
        "train.recipe=old", "train.batch_size=8", "train.gradient_accumulation_steps=4", f"train.max_steps={updates}", warmup,
        "train.positives_weight=0",  # nothing of its retriever trains
    ]  # fmt: skip


def ablate(steps: int, questions: int | None, seeds: int, jobs: int) -> None:
    """Every switch of the old recipe alone in the new one, `new` and `old` whole, all at the same number of questions."""
    params = load_params()
    new, old = params.recipes["new"], params.recipes["old"]
    if new.reading != "each":
        raise ValueError(
            f"recipes.new.reading: {new.reading} has no marginal to put the old mistake in; use each for the ablation"
        )
    check_answers(params.evaluate.split)
    variants: dict[str, list[str]] = {"new": []}
    for switch in SWITCHES:
        variants[switch] = [f"recipes.new.{switch}={value_of(getattr(old, switch))}"]
        assert getattr(new, switch) != getattr(old, switch), f"recipes.new.{switch} is already the old one"
    variants["old"] = ["train.recipe=old"]
    base = [
        "train.positives_weight=0",
        "train.batch_size=8",
        "train.gradient_accumulation_steps=4",
        "evaluate.decoding=fast",
        "evaluate.num_beams=1",
        # Workers that start together would each take all cores, which are free just then.
        f"runtime.threads={max(1, (os.cpu_count() or jobs) // jobs)}",
    ]
    names = {}
    for variant, settings in variants.items():
        within = variant in ("accumulation", "old")
        taken = steps * 8 if within else steps
        warmup, often = min(params.train.warmup_steps, taken // 4), max(1, taken // 2)
        for seed in range(1, seeds + 1):
            name = names[variant, seed] = f"ablate-{variant.replace('_', '-')}-{seed}"
            budget = [
                f"train.seed={seed}", f"train.max_steps={taken}", f"train.warmup_steps={warmup}",
                f"train.eval_steps={often}", f"train.save_steps={taken}", f"train.logging_steps={often}",
            ]  # fmt: skip
            forget(name)
            changed = changes([*settings, *base, *budget, *scored(questions)])
            dvc("exp", "run", "--queue", "-n", name, *changed, quiet=True)
    print(f"{len(names)} experiments queued, {jobs} at once; dvc queue status tells how far they are")
    dvc("queue", "start", "-j", str(jobs), quiet=True)
    wait_for_queue()
    results = {variant: [metrics_of(names[variant, seed]) for seed in range(1, seeds + 1)] for variant in variants}
    table = summarise(results)
    write(ABLATION, table)
    draw(results, ABLATION.with_suffix(".svg"))
    print_table(table, tuple(table["new"]))
    print()
    for variant in SWITCHES:
        print(verdict(variant, table[variant]))


def check_answers(evaluated: str) -> None:
    """Raises ValueError, before hours of experiments, where data/prepared is there and its questions have no answers."""
    from stages.corpus.arrow import row_reader

    for split in ("train", evaluated):
        file = PREPARED / f"{split}.arrow"
        if file.is_file() and not row_reader(file)(0)["answers"]:  # all have some or none has
            raise ValueError(
                f"{file}: the {split} questions have no answers, and {NO_EM}; if params.yaml names other data by now, run "
                "`dvc repro prepare` first"
            )


def summarise(results: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Means and sample deviations over the seeds of each variant, and what it costs against `new`.

    Costs are paired by seed, which fixes the order of the questions: `em_cost` is the mean of new's EM less the
    variant's, `em_cost_spread` the deviation of these differences; the same for the validation loss, the other way round.
    What a run did not measure (recall without gold passages, a loss that was not finite) is absent. Raises ValueError
    where it is EM.
    """
    if not all("em" in row for rows in results.values() for row in rows):
        raise ValueError(f"metrics/eval.json: no em, the questions have no answers, and {NO_EM}")

    def spread(values: list[float]) -> float:
        return statistics.stdev(values) if len(values) > 1 else 0.0

    table = {}
    for variant, rows in results.items():
        ems, losses = [row["em"] for row in rows], [row.get("val_loss_per_sequence", math.nan) for row in rows]
        em_costs = [best["em"] - em for best, em in zip(results["new"], ems, strict=True)]
        loss_costs = [
            loss - best.get("val_loss_per_sequence", math.nan)
            for best, loss in zip(results["new"], losses, strict=True)
        ]
        means = {
            "em": statistics.mean(ems),
            "em_spread": spread(ems),
            "em_cost": statistics.mean(em_costs),
            "em_cost_spread": spread(em_costs),
            "f1": statistics.mean(row["f1"] for row in rows),
            **mean_where_known("recall_at_5", rows),
            **mean_where_known("answer_recall_at_5", rows),
            "val_loss": statistics.mean(losses),
            "val_loss_cost": statistics.mean(loss_costs),
            "val_loss_cost_spread": spread(loss_costs),
            "questions_per_second": statistics.mean(row["questions_per_second"] for row in rows),
            "questions_seen": rows[0]["questions_seen"],
            "steps": rows[0]["steps"],
            "seeds": len(rows),
        }
        table[variant] = {name: value for name, value in means.items() if not math.isnan(value)}
    return table


def mean_where_known(name: str, rows: list[dict[str, float]]) -> dict[str, float]:
    """{name: mean}, or nothing where a run lacks it, as recall where no question names a gold passage."""
    return {name: statistics.mean(row[name] for row in rows)} if all(name in row for row in rows) else {}


def verdict(variant: str, row: dict[str, float]) -> str:
    """One line: what a switch costs in EM, or that nothing was measurable: less than twice the standard error over the seeds."""
    noise = 2 * row["em_cost_spread"] / row["seeds"] ** 0.5
    found = f"{row['em_cost']:+.1f} EM (twice the standard error over {row['seeds']} seeds: {noise:.1f})"
    if abs(row["em_cost"]) <= noise or row["seeds"] < 2:
        return f"{variant}: no measurable cost here, {found}"
    return f"{variant}: {'costs' if row['em_cost'] > 0 else 'gains'} {found}"


def draw(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """EM of every variant and seed as dots, their mean as a bar."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.4 * len(results) + 1), layout="constrained")
    axes = figure.subplots()
    names = list(results)[::-1]
    means = [statistics.mean(row["em"] for row in results[name]) for name in names]
    axes.barh(names, means, color="#c9d4e3")
    for place, name in enumerate(names):
        ems = [row["em"] for row in results[name]]
        axes.plot(ems, [place] * len(ems), "o", color="#1f3a5f", markersize=4)
    axes.set_xlabel("EM on the sample's test questions: mean (bar) and every seed (dots)")
    figure.savefig(path)


def value_of(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def scored(questions: int | None) -> list[str]:
    return [f"evaluate.num_samples={questions}"] if questions else []


def changes(settings: list[str]) -> list[str]:
    return [part for setting in settings for part in ("-S", setting)]


def dvc(*arguments: str, quiet: bool = False) -> None:
    """Runs a dvc command; raises ValueError with its own words where it fails."""
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(
        command, stdout=subprocess.PIPE if quiet else None, stderr=subprocess.STDOUT if quiet else None, text=True
    )
    if done.returncode:
        said = (done.stdout or "see above").strip().splitlines()[-1]
        raise ValueError(f"dvc {' '.join(arguments[:4])} failed: {said}")


def forget(name: str) -> None:
    """Removes an earlier experiment of this name; `dvc exp run --force` would also run every unchanged stage again."""
    subprocess.run(
        [sys.executable, "-m", "dvc", "exp", "remove", name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def wait_for_queue() -> None:
    import time

    from tqdm import tqdm

    def states() -> list[str]:
        listed = subprocess.run(
            [sys.executable, "-m", "dvc", "queue", "status"], stdout=subprocess.PIPE, text=True, check=True
        )
        rows = [line.split() for line in listed.stdout.splitlines() if "ablate-" in line]
        return [next((word for word in row if word in ("Queued", "Running", "Success", "Failed")), "?") for row in rows]

    total = len(states())
    with tqdm(total=total, desc="ablation", unit=" experiments") as bar:
        while True:
            found = states()
            bar.n = total - sum(state in ("Queued", "Running") for state in found)
            bar.refresh()
            if bar.n >= total:
                break
            time.sleep(5)
    if "Failed" in found:
        raise ValueError(f"{found.count('Failed')} experiments failed; dvc queue logs NAME tells why")


def metrics_of(revision: str) -> dict[str, float]:
    """The numbers of metrics/train.json and metrics/eval.json of an experiment, evaluation's under its own names."""
    from dvc.api import metrics_show

    trained = metrics_show("metrics/train.json", rev=revision)
    evaluated = metrics_show("metrics/eval.json", rev=revision)
    return {**evaluated, **trained, "answered_per_second": evaluated["questions_per_second"]}


def write(path: Path, table: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def print_table(table: dict[str, dict[str, float]], names: tuple[str, ...]) -> None:
    columns = list(table)
    print(f"{'':28}" + "".join(f"{column:>22}" for column in columns))
    for name in names:
        if not any(name in table[column] for column in columns):
            continue  # not measured: BM25's line where retrieval is dense alone
        print(f"{name:28}" + "".join(f"{table[column].get(name, float('nan')):22.3f}" for column in columns))


if __name__ == "__main__":
    run(main)
