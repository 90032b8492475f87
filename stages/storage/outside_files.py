"""Files that params.yaml names and that no stage makes: where they are, and what they hold as size and hash.

Relative paths count from the folder of params.yaml. `dvc exp run --temp` and `--queue` run in a copy of the last commit,
where files that git does not track are missing: there the path counts from $DVC_ROOT, the repository that the user sees.
"""

from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

from stages.machine.entry import root_folder
from stages.storage.hashes import sha256_of


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


def find_file(name: str, key: str) -> Path:
    """The file that the parameter `key` names. Raises ValueError where there is none."""
    path = find(name)
    if path.is_dir():
        raise ValueError(f"{key}: {name} is a folder; name a file in it")
    _check(path, name, key)
    return path


def describe(name: str, key: str) -> dict:
    """What is behind a path: {path: {bytes, sha256}} for a file, the same for every file of a folder.

    Raises ValueError where nothing is there or where it cannot be read.
    """
    path = find(name)
    _check(path, name, key)
    files = [path]
    if path.is_dir():
        inside = (file for file in path.rglob("*") if file.is_file())
        files = sorted(file for file in inside if not any(part[0] == "." for part in file.relative_to(path).parts))
    try:
        return {str(Path(name) / file.relative_to(path)): _fingerprint(file) for file in files}
    except OSError as error:
        raise ValueError(f"{key}: {error.filename} cannot be read: {error.strerror}") from None


def describe_model(name: str, key: str) -> dict:
    """As `describe` for a model's folder; {name: "hub"} for what can only be a hub name.

    A hub name has at most one slash and may name a revision. Raises ValueError for a path that leads nowhere.
    """
    if find(name).exists() or name.startswith((".", "/", "~", "data/")) or split_revision(name)[0].count("/") > 1:
        return describe(name, key)
    return {name: "hub"}


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
