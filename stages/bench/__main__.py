"""Benchmarks that anyone can repeat: random weights of real shapes, nothing downloaded, one line of JSON at the end.

    python -m stages.bench train --against transformers            # seconds per optimizer step, memory, MFU
    python -m stages.bench train --recipe old                      # the same under the old recipe
    python -m stages.bench train --reading together --n-docs 20    # passages read together, the retriever by EMDR2
    python -m stages.bench index                                   # passages encoded per second
    python -m stages.bench search                                  # exact search
    python -m stages.bench decode --against transformers           # thorough decoding, questions per second
    python -m stages.bench decode --shapes smollm2                 # the same with a decoder-only generator
    python -m stages.bench decode --reading together               # one search a question over all of its passages
    python -m stages.bench scale --passages 10000 100000           # the real stages over synthetic passages
    python -m stages.bench scaling --plot scaling.svg              # 1, 2, 4 and 8 GPUs of this host

Each figure is a median over several runs after a warm-up; what it is compared with runs in the same process. Sizes are
those of the README's table (`--shapes large`); `--shapes tiny` runs in a minute on two CPU cores.
"""

import argparse
import json
import sys
from pathlib import Path

from stages.machine.devices import prepare_torch
from stages.machine.entry import run
from stages.settings.runs import Runtime


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m stages.bench", description="Benchmarks on random weights.")
    made.add_argument("mode", choices=("train", "index", "search", "decode", "scale", "scaling"))
    made.add_argument("--shapes", choices=("large", "smollm2", "tiny", "tiny-llama"), default="large")
    made.add_argument("--against", choices=("transformers",), help="measure transformers' own path beside it")
    made.add_argument("--passages", type=int, nargs="+", default=[200_000], help="passages; scale takes several")
    made.add_argument("--questions", type=int, default=256, help="questions to decode")
    made.add_argument("--n-docs", type=int, default=5)
    made.add_argument("--batch", default="32x1", help="questions a forward pass x passes a step; 2x16 is the README's")
    made.add_argument("--recipe", choices=("new", "old"), default="new")
    made.add_argument(
        "--reading", choices=("each", "together", "weighted", "parallel"), default="each",
        help="train, decode: together is FiD's; weighted: each read by its prior; parallel, decoder-only: none sees another",
    )  # fmt: skip
    made.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto")
    made.add_argument("--steps", type=int, default=10, help="optimizer steps a run")
    made.add_argument("--runs", type=int, default=5, help="timed runs after the warm-up")
    made.add_argument("--num-beams", type=int, default=4)
    made.add_argument("--answer-tokens", type=int, default=10, help="most tokens of a decoded answer")
    made.add_argument("--compiled", action="store_true", help="torch.compile the layers (a minute of warm-up)")
    made.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="CUDA graphs in training")
    made.add_argument(
        "--bf16-copy", action="store_true", help="as train.bf16_copy: a bf16 copy of the weights in place of autocast"
    )
    made.add_argument("--engine", choices=("exact", "faiss-gpu"), default="exact", help="search: ours, or FAISS's")
    made.add_argument("--profile", type=Path, help="train: write the costliest kernels of three steps here, as text")
    made.add_argument("--batch-tokens", type=int, default=131072, help="padded tokens encoded at once (index)")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--threads", type=int, default=0)
    made.add_argument("--processes", type=int, nargs="+", default=[], help="scaling: sizes; one a GPU, 1 2 4 8")
    made.add_argument("--batches", type=int, nargs=2, default=[32, 256], help="scaling: questions a step, twice")
    made.add_argument("--training-steps", type=int, default=200, help="scaling: steps of the first of --batches")
    made.add_argument("--search-passages", type=int, nargs="+", default=[200_000, 21_000_000], help="scaling")
    made.add_argument("--plot", type=Path, help="scaling: draw the speed-ups here, as SVG")
    made.add_argument("--measured", type=Path, help="scaling: draw what an earlier call wrote, measure nothing")
    made.add_argument("--out", type=Path, help="write the JSON here too")
    return made


def main() -> None:
    options = parser().parse_args()
    if options.mode == "scaling":
        from stages.bench.scaling_curve import check_can_draw, curve, draw, earlier
        from stages.machine.launching import launch

        if len(options.processes) != 1:
            if options.plot:
                check_can_draw()
            for results in [earlier(options.measured)] if options.measured else curve(options):
                write(results, options.out)  # what is measured stays if a larger size fails
            sys.stdout.write(json.dumps(results, indent=2) + "\n")
            if options.plot:
                draw(results, options.plot)
            return
        if launch(options.processes[0], options.device):
            return

    settings = Runtime(device=options.device, threads=options.threads, processes=1, cuda_graphs=options.graphs)
    device = prepare_torch(settings)
    from stages.bench import measuring, scaling, stage_costs
    from stages.bench.timing import machine
    from stages.compute import ranks

    where = {"scaling": scaling, "scale": stage_costs}.get(options.mode, measuring)
    with ranks.group(device):
        results = {"mode": options.mode, "shapes": options.shapes, **machine(device)}
        results |= getattr(where, f"bench_{options.mode}")(options, device)
        if ranks.is_main():
            write(results, options.out)
            sys.stdout.write(json.dumps(results, indent=2) + "\n")


def write(results: dict, file: Path | None) -> None:
    if file:
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
