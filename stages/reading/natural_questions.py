"""Natural Questions (open) and DPR's Wikipedia passages by hub name, streamed through `datasets`.

Only plain Parquet files are asked for. `facebook/wiki_dpr` keeps its passages as such beside a loading script, which
datasets >= 4 refuses to run: naming the files goes around it. At the commits that params.yaml pins, the hub lists
nq_open/{train,validation}-00000-of-00001.parquet (question, answer) and data/psgs_w100/no_embeddings/ (id, text, title).
"""

from functools import partial

from stages.reading.files import Table
from stages.reading.json_rows import Rows
from stages.settings.data import Nq
from stages.storage.outside_files import find


def open_tables(nq: Nq) -> dict[str, list[Table]]:
    """The name and the rows of training questions, test questions and passages.

    By convention NQ-open's validation split is what everyone reports on: here it is the test split. Raises ValueError, in
    one line that says what to fetch, where the hub cannot be reached.
    """
    wanted = {
        "train": ("questions", nq.train_files),
        "test": ("questions", nq.test_files),
        "passages": ("passages", nq.passage_files),
    }
    tables = {}
    for split, (what, files) in wanted.items():
        name, revision = getattr(nq, what), getattr(nq, f"{what}_revision")
        folder = find(name)
        base = str(folder) if folder.is_dir() else f"hf://datasets/{name}@{revision}"
        tables[split] = [Table(f"{base}/{files}", partial(_stream, f"{base}/{files}", f"data.nq.{what}", nq))]
    return tables


def _stream(files: str, key: str, nq: Nq) -> Rows:
    from datasets import load_dataset

    count = 0
    try:
        for row in load_dataset("parquet", data_files=files, split="train", streaming=True):
            count += 1
            yield count, row
    # The hub's client raises its own errors, those of two HTTP libraries and of fsspec; all mean: not to be had.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        if not files.startswith("hf://"):
            raise ValueError(
                f"{key}: {files} cannot be read ({reason}); the folder must have the hub's layout"
            ) from None
        raise ValueError(
            f"{key}: {files} cannot be read ({reason}). Without the hub: elsewhere fetch {nq.train_files} and "
            f"{nq.test_files} of datasets/{nq.questions} and psgs_w100.tsv.gz (dl.fbaipublicfiles.com/dpr/wikipedia_split), "
            "put them beside params.yaml, set data.source: files and name them as data.files.train, test and passages"
        ) from None
    if not count:
        raise ValueError(f"{key}: {files} holds no rows")
