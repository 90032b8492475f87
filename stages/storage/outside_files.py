"""Files that params.yaml names and that no stage makes: where they are, and what they hold as size and hash.

Relative paths count from the folder of params.yaml. `dvc exp run --temp` and `--queue` run in a copy of the last commit,
where files that git does not track are missing: there the path counts from $DVC_ROOT, the repository that the user sees.
"""

import glob
import re
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from stages.machine.entry import root_folder
from stages.storage.hashes import sha256_of

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# Beside the data in a folder: what `datasets` and repositories keep about it.
DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


class OutsideFile(NamedTuple):
    """A file by the name that parameters, messages and data/inputs have for it, and where it is."""

    name: str
    path: Path


def find(name: str) -> Path:
    """The path that a parameter names; one that exists nowhere (a hub name, for example) comes back as it is."""
    path = Path(name).expanduser()
    there = root_folder() / path
    return there if not path.exists() and there.exists() else path


def split_revision(name: str) -> tuple[str, dict[str, str]]:
    """`name@revision` of the hub as its name and what `from_pretrained` takes beside it; a path stays whole."""
    hub_name, at, revision = name.partition("@")
    return (hub_name, {"revision": revision}) if at and not Path(name).exists() else (name, {})


def hint(name: str) -> str:
    """What to add where a model does not load: how its name was taken, and what it may have been meant for."""
    if find(name).exists():
        return ""
    return f"; there is no folder {name} here, so the hub was asked for it{_nearest(name)}"


def find_files(names: list[str], key: str, kinds: tuple[str, ...]) -> list[OutsideFile]:
    """The files behind a path, a glob, a folder or a list of them, in natural order (part-2 before part-10).

    Of a folder those whose names end in one of `kinds`, all of one kind, unhidden; a folder of Dataset.save_to_disk in its
    own order. Raises ValueError where there is none.
    """
    found: list[OutsideFile] = []
    for name in names:
        for file in _matching(name, key):
            found += _inside(file, key, kinds) if file.path.is_dir() else [file]
    twice = next((file.name for file in found if sum(other.path == file.path for other in found) > 1), None)
    if twice:
        raise ValueError(f"{key}: {twice} is named twice")
    for file in found:
        refuse_pointer(file.path, key, file.name)
    return found


def refuse_pointer(path: Path, key: str, name: str) -> None:
    """Raises ValueError for the few lines that Git LFS leaves in place of a file that was not fetched."""
    if path.stat().st_size < 1024:
        with open(path, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError(
                    f"{key}: {name} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
                )


def refuse_outputs(names: str | list[str], key: str, outputs: list[str]) -> None:
    """Raises ValueError for a path that is one of the pipeline's own outputs, lies in one or holds one.

    DVC deletes an output before it makes it anew, and what depends on it would run again each time.
    """
    for name in [names] if isinstance(names, str) else names:
        path = find(name).resolve()
        for base in dict.fromkeys((Path().resolve(), root_folder())):
            for output in outputs:
                if path.is_relative_to(base / output) or (path.is_dir() and (base / output).is_relative_to(path)):
                    beside = "my-model" if key.startswith("models.") else "my-copy"
                    more = f" && cp -rL data/retriever/context_encoder {beside}/" if output == "data/model" else ""
                    raise ValueError(
                        f"{key}: {name} is an output of the pipeline itself ({output}), which is deleted before it is made "
                        f"anew; copy it and name the copy: cp -rL {name} {beside}{more}"
                    )


def describe(names: str | list[str], key: str) -> dict:
    """What is behind a path, a glob or a list of them: {path: {bytes, sha256}}, of a folder for every file in it.

    Raises ValueError where nothing is there or where it cannot be read.
    """
    found: list[OutsideFile] = []
    for name in [names] if isinstance(names, str) else names:
        for file in _matching(name, key):
            found += _unhidden(file) if file.path.is_dir() else [file]
    try:
        for file in found:
            refuse_pointer(file.path, key, file.name)
        return {file.name: _fingerprint(file.path) for file in found}
    except OSError as error:
        raise ValueError(f"{key}: {error.filename} cannot be read: {error.strerror}") from None


def describe_model(name: str, key: str) -> dict:
    """As `describe` for a model's folder; {name: "hub"} for what can only be a hub name.

    A hub name has at most one slash and may name a revision. Raises ValueError for a path that leads nowhere.
    """
    if find(name).exists() or name.startswith((".", "/", "~", "data/")) or split_revision(name)[0].count("/") > 1:
        return describe(name, key)
    return {name: "hub"}


def _matching(name: str, key: str) -> list[OutsideFile]:
    """What a path or, where nothing is called so, a glob leads to: files and folders."""
    if find(name).exists() or not glob.has_magic(name):
        _check(find(name), name, key)
        return [OutsideFile(name, find(name))]
    pattern = str(Path(name).expanduser())
    for root in (Path(), root_folder()):
        if found := sorted(glob.glob(pattern, root_dir=root, recursive=True), key=_natural):
            for file in found:
                _check(root / file, file, key)
            return [OutsideFile(file, root / file) for file in found]
    raise ValueError(f"{key}: no file matches {name}; relative paths count from the folder of params.yaml")


def _inside(folder: OutsideFile, key: str, kinds: tuple[str, ...]) -> list[OutsideFile]:
    if (folder.path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(inner.name for inner in folder.path.iterdir() if inner.is_dir()))
        raise ValueError(f"{key}: {folder.name} holds several splits ({splits}); name one, e.g. {folder.name}/train")
    found = [
        file
        for file in _unhidden(folder)
        if file.path.name.lower().endswith(kinds) and file.path.name not in DESCRIPTIONS
        and not (file.path.name.startswith(("cache-", "tmp")) and file.path.suffix == ".arrow")
    ]  # fmt: skip
    if not found:
        raise ValueError(f"{key}: {folder.name} is a folder without any of {', '.join(kinds)}")
    ends = {next(kind for kind in kinds if file.path.name.lower().endswith(kind)) for file in found}
    if len(ends) > 1:
        raise ValueError(
            f"{key}: {folder.name} is a folder of several kinds of files ({', '.join(sorted(ends))}); name those that are "
            f"meant, e.g. {folder.name}/*{min(ends)}"
        )
    return found


def _unhidden(folder: OutsideFile) -> list[OutsideFile]:
    """Every file of a folder and those below it, without what begins with a dot."""
    inside = (file.relative_to(folder.path) for file in folder.path.rglob("*") if file.is_file())
    shown = (file for file in inside if not any(part[0] == "." for part in file.parts))
    return [
        OutsideFile(str(Path(folder.name) / file), folder.path / file)
        for file in sorted(shown, key=lambda file: _natural(str(file)))
    ]


def _natural(name: str) -> list:
    return [int(part) if part.isdecimal() and part.isascii() else part for part in re.split(r"([0-9]+)", name)]


def _check(path: Path, name: str, key: str) -> None:
    if not path.exists():
        raise ValueError(
            f"{key}: {name} not found; relative paths count from the folder of params.yaml{_nearest(name)}"
        )
    if not path.is_dir() and not path.is_file():  # a pipe would be waited on for ever
        raise ValueError(f"{key}: {name} is neither a file nor a folder")


def _fingerprint(file: Path) -> dict:
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def _nearest(name: str) -> str:
    """ "; did you mean ...?" where the first part of a path that does not exist resembles something that does."""
    for base in dict.fromkeys((Path(), root_folder())):
        path = base / Path(name).expanduser()
        missing = [path, *path.parents]
        missing = [part for part in missing if not part.exists()]
        if not missing or not missing[-1].parent.is_dir():
            continue
        first = missing[-1]
        with suppress(OSError):
            found = get_close_matches(first.name, [one.name for one in first.parent.iterdir()], n=1, cutoff=0.75)
            if found:
                meant = first.parent / found[0] / path.relative_to(first)
                if meant.exists():
                    return f"; did you mean {meant.relative_to(base) if meant.is_relative_to(base) else meant}?"
    return ""
