"""Makes the small base models of data/tiny from any questions and passages (not part of the pipeline).

    python -m stages.pretraining arrays --passages passages.jsonl.gz --train train.jsonl.gz \
        --validation validation.jsonl.gz --work work
    python -m stages.pretraining encoder --work work --output data/tiny --seconds 280
    python -m stages.pretraining generator --work work --output data/tiny --seconds 560

`arrays` wants a CPU and minutes, the two others one GPU each. A run to see that it works, on a CPU:

    python -m stages.pretraining generator --work work --output scratch --seconds 20 --batch-size 8

Questions need `question`, `answers` and `positive_ids`, passages `id`, `title` and `text`. Weights are stored in half
precision with their measured scores in `models.json` beside them.
"""

import argparse
import json
import time
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["arrays", "encoder", "generator"])
    parser.add_argument("--work", type=Path, required=True, help="folder of the tokenizers and token arrays")
    parser.add_argument("--passages", type=Path)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--validation", type=Path)
    parser.add_argument("--output", type=Path, default=Path("data/tiny"))
    parser.add_argument("--generator-vocab", type=int, default=8192)
    parser.add_argument("--encoder-vocab", type=int, default=7168)
    parser.add_argument("--seconds", type=float, default=300, help="training time, without compilation and evaluation")
    parser.add_argument("--batch-size", type=int, default=None)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--qa-share", type=float, default=0.4, help="questions among the generator's examples, the rest cloze"
    )
    parser.add_argument("--layers", type=int, default=2, help="of the encoder")
    parser.add_argument("--projection", type=int, default=256, help="dimension of the encoder's vectors")
    parser.add_argument("--evaluate-steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=13)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    import torch
    from transformers import AutoTokenizer

    from stages.evaluation import scoring
    from stages.pretraining import batches, corpus, models

    if arguments.part == "arrays":
        corpus.build_arrays(
            arguments.passages, arguments.train, arguments.validation, arguments.work,
            arguments.generator_vocab, arguments.encoder_vocab,
        )  # fmt: skip
        return

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    torch.set_flush_denormal(device.type == "cpu")  # as machine/devices.py says
    started = time.time()
    folder = arguments.work / arguments.part
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    arrays = batches.Arrays(folder / "arrays.npz", device)
    if arguments.part == "encoder":
        model = models.new_encoder(len(tokenizer), arguments.layers, arguments.projection).to(device)
        batch_size = arguments.batch_size or 4096
        steps = models.train_encoder(
            model, arrays, seconds=arguments.seconds, batch_size=batch_size, learning_rate=arguments.learning_rate
        )
        model.eval()
        scores = models.gold_recall(model, arrays, "validation", (1, 5, 20, 100))
    else:
        model = models.new_generator(len(tokenizer)).to(device)
        answers = json.loads((arguments.work / "validation_answers.json").read_text(encoding="utf-8"))
        batch_size = arguments.batch_size or 512

        def oracle_scores(count: int) -> dict[str, float]:
            count = min(count, len(answers))
            written = models.answer_greedily(model.eval(), arrays, "validation", count)
            model.train()
            texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in written]
            pairs = list(zip(texts, answers[:count], strict=True))
            return {
                "oracle_em": round(100 * sum(scoring.exact_match(*pair) for pair in pairs) / count, 2),
                "oracle_f1": round(100 * sum(scoring.f1(*pair) for pair in pairs) / count, 2),
            }

        prefix = torch.tensor(tokenizer("//", add_special_tokens=False).input_ids, device=device)
        steps = models.train_generator(
            model, arrays, prefix, seconds=arguments.seconds, batch_size=batch_size,
            learning_rate=arguments.learning_rate, qa_share=arguments.qa_share,
            evaluate=oracle_scores, evaluate_steps=arguments.evaluate_steps,
        )  # fmt: skip
        scores = oracle_scores(2000)

    target = arguments.output / arguments.part
    model.half().save_pretrained(target)
    tokenizer.save_pretrained(target)
    facts = {
        "validation": scores,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": arguments.learning_rate,
        "qa_share": arguments.qa_share if arguments.part == "generator" else None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "training_seconds": arguments.seconds,
        "seconds_in_all": round(time.time() - started),
        "torch": torch.__version__,
        "seed": arguments.seed,
    }
    (target / "pretraining.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
