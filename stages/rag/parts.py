"""What answering needs beside a trained model: the files to take along, and where they lie."""

from pathlib import Path

from stages.params import Params

PREPARED, TOKENS, LEXICAL = Path("data/prepared"), Path("data/tokens"), Path("data/lexical")
VECTORS, INDEX, RERANKER = Path("data/vectors"), Path("data/index"), Path("data/reranker")


def parts(model: Path, params: Params) -> dict[str, Path]:
    """Folders and files by their places in a folder from which stages/evaluation/pyfunc.py answers.

    The model's own parts are not among them; where its context encoder was trained, its index is one of these.
    """
    found = {f"tokens/{name}": TOKENS / name for name in ("tokens.npy", "offsets.npy", "manifest.json")}
    found |= {f"prepared/{name}": PREPARED / name for name in ("passages.arrow", "manifest.json")}
    if not (model / "index").is_dir():
        found |= {"vectors": VECTORS, "index": INDEX}
    if params.retriever.hybrid_depth:
        found["lexical"] = LEXICAL
    if params.models.reranker:
        found["reranker"] = RERANKER
    return found


def size_of(paths: list[Path]) -> int:
    """Bytes of files and folders."""
    files = (file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]))
    return sum(file.stat().st_size for file in files if file.is_file())
