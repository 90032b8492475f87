"""Checkpoints that outlive a kill: written whole or not at all, checked when read, never another recipe's.

They live outside DVC's outputs, which DVC deletes before a stage runs, at `<root>/.checkpoints/<fingerprint>`. Beside
them lies description.json, from which stages/storage/leftovers.py tells in what two fingerprints differ. A finished training
leaves its kept weights there until the next stage has begun: DVC has then taken the model, whatever was killed before.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from stages.compute import ranks
from stages.machine.entry import root_folder
from stages.storage import manifest
from stages.storage.hashes import sha256_of
from stages.storage.leftovers import FOLDER

DESCRIPTION, BEST = "description.json", "best.json"
# What changes no result, so that a mended message costs no training; dvc.yaml depends on none of it (tests/test_dag.py).
WATCHERS = ("machine", "settings", "tracking", "verdicts", "params.py")
CODE = Path(__file__).resolve().parents[1]


def describe(settings: dict, inputs: list[Path]) -> dict[str, dict]:
    """What a training computes: its parameters, its input files and the code that is loaded, each by a digest of all of it."""
    # A copy: the tracking thread imports while this runs.
    loaded = sys.modules.copy()
    files = {Path(module.__file__).resolve() for module in loaded.values() if getattr(module, "__file__", None)}
    code = {file.relative_to(CODE): file for file in files if CODE in file.parents}
    return {
        "settings": settings,
        "inputs": {path.as_posix(): digest(path) for path in inputs},
        "code": {
            name.as_posix(): hashlib.sha256(code[name].read_bytes()).hexdigest()[:16]
            for name in sorted(code)
            if name.parts[0] not in WATCHERS
        },
    }


def fingerprint(description: dict) -> str:
    """The name of what `describe` found."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def digest(path: Path) -> str:
    """Names and contents of a file or of a folder's files, in 16 characters."""
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            found.update(f"{file.relative_to(path)} {file.stat().st_size}\0".encode())
            found.update(sha256_of(file).encode())
    return found.hexdigest()[:16]


def checkpoint_folder(name: str) -> Path:
    """Where checkpoints of this fingerprint lie: at the real root, in DVC's temporary runs too."""
    return root_folder() / FOLDER / name


class Checkpoints:
    """The checkpoints of one training: the last `keep` of them, and the best weights that these and it refer to."""

    def __init__(self, folder: Path, keep: int, description: dict | None = None):
        self.folder, self.keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)
        if description is not None:
            manifest.write_json(folder / DESCRIPTION, description)

    def save(self, step: int, weights: dict[str, torch.Tensor], state: dict, best: int | None = None) -> Path:
        """Writes a resumable checkpoint of this step and drops the oldest beyond `keep`; returns its folder.

        `best` is the step whose weights were saved by `save_best` and belong to this checkpoint.
        """
        target = self._write(f"step-{step:08d}", weights, state, best)
        for old in self._steps()[: -self.keep]:
            shutil.rmtree(old)
        self._drop_bests(best)
        return target

    def save_best(self, step: int, weights: dict[str, torch.Tensor]) -> Path:
        """Writes the best weights so far; those that a checkpoint refers to stay, for who goes on from there."""
        target = self._write(f"best-{step:08d}", weights, {})
        self._drop_bests(step)
        return target

    def latest(self) -> tuple[dict[str, torch.Tensor], dict] | None:
        """Weights and state of the newest checkpoint that is whole; damaged ones are named and passed over."""
        for folder in reversed(self._steps()):
            problem = _damage(folder)
            best = _best_of(folder)
            if problem is None and best is not None and (missing := _damage(self._best(best))):
                problem = f"the best weights that belong to it, {self._best(best).name}: {missing}"
            if problem is None:
                return _read(folder)
            print(f"{folder}: {problem}; an earlier checkpoint is used where there is one", file=sys.stderr)
        return None

    def best(self, step: int) -> dict[str, torch.Tensor]:
        """The best weights, of this step; ValueError where they are damaged."""
        folder = self._best(step)
        problem = _damage(folder)
        if problem is not None:
            raise ValueError(f"{folder}: {problem}; delete {self.folder} to train again from the start")
        return load_file(folder / "weights.safetensors")

    def finish(self, weights: dict[str, torch.Tensor], state: dict) -> None:
        """Keeps the weights of a finished training in place of all its checkpoints."""
        self._write("finished", weights, state)
        for folder in [*self._steps(), *self._bests()]:
            shutil.rmtree(folder)

    def finished(self) -> tuple[dict[str, torch.Tensor], dict] | None:
        """What `finish` kept, where it is whole."""
        folder = self.folder / "finished"
        return _read(folder) if self.is_finished() else None

    def is_finished(self) -> bool:
        return _damage(self.folder / "finished") is None

    def _best(self, step: int) -> Path:
        return self.folder / f"best-{step:08d}"

    def _steps(self) -> list[Path]:
        return sorted(folder for folder in self.folder.glob("step-*") if folder.suffix != ".unfinished")

    def _bests(self) -> list[Path]:
        return [folder for folder in self.folder.glob("best-*") if folder.suffix != ".unfinished"]

    def _drop_bests(self, wanted: int | None) -> None:
        kept = {self._best(step) for step in (wanted, *map(_best_of, self._steps())) if step is not None}
        for folder in self._bests():
            if folder not in kept:
                shutil.rmtree(folder)

    def _write(self, name: str, weights: dict[str, torch.Tensor], state: dict, best: int | None = None) -> Path:
        unfinished, target = self.folder / f"{name}.unfinished", self.folder / name
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        save_file(weights, unfinished / "weights.safetensors")
        torch.save(state, unfinished / "state.pt")
        if best is not None:
            manifest.write_json(unfinished / BEST, {"step": best})
        manifest.record_folder(unfinished)
        if target.exists():  # a resumed training comes by this step again; no checkpoint refers to the old one
            replaced = self.folder / f"{name}.replaced.unfinished"
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
            shutil.rmtree(replaced)
        unfinished.rename(target)
        manifest.sync_folder(self.folder)
        return target


def _read(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    # Mapped: of a sharded optimizer's moments a rank needs its part alone.
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True, mmap=True)
    return load_file(folder / "weights.safetensors"), state


def _best_of(folder: Path) -> int | None:
    try:
        return json.loads((folder / BEST).read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, LookupError, TypeError):
        return None  # none, or damaged, which the manifest tells


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    return manifest.damage(folder, whole=True) if folder.is_dir() else "missing"


def own_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's parameters and buffers themselves, tied ones once.

    Without the frozen ones: a base under adapters is read from where it came from.
    """
    seen, tensors = set(), {}
    for name, value in _own_state(model).items():
        if _place(value) not in seen or value.numel() == 0:
            seen.add(_place(value))
            tensors[name] = value.detach()
    return tensors


def _own_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's state_dict without frozen parameters and what quantized ones add to it."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    learned = {name for name, value in model.named_parameters(remove_duplicate=False) if value.requires_grad}
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if name in learned or name in buffers}


def _place(value: torch.Tensor) -> int:
    """The same for tied tensors alone; a rank's part of a tensor may be empty, and then lies nowhere."""
    return id(value) if isinstance(value, DTensor) else value.data_ptr()


def own_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The same as contiguous CPU copies."""
    return snapshot(own_tensors(model))


def snapshot(state, into=None):
    """A copy of a training's state in the host's memory, which the steps to come do not change.

    `into` is an earlier copy that is no longer needed: memory that has been used before is several times as fast. With
    sharded tensors every rank must call it; rank 0 gets them whole, the others nothing.
    """
    if isinstance(state, DTensor):
        state = whole(state)
    if isinstance(state, torch.Tensor):
        if isinstance(into, torch.Tensor) and (into.shape, into.dtype) == (state.shape, state.dtype):
            return into.copy_(state.detach())
        return state.detach().to("cpu", copy=True).contiguous()
    if isinstance(state, dict):
        old = into if isinstance(into, dict) else {}
        return {name: snapshot(value, old.get(name)) for name, value in state.items()}
    if isinstance(state, list | tuple):
        old = into if isinstance(into, list | tuple) and len(into) == len(state) else [None] * len(state)
        return type(state)(map(snapshot, state, old))
    return state


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copies weights saved by `own_weights` back; tied ones follow their twin, frozen ones may be missing."""
    own = model.state_dict(keep_vars=True)
    unexpected = weights.keys() - own.keys()
    assert not unexpected, f"weights of another model: {sorted(unexpected)[:3]}"
    present = {_place(own[name]) for name in weights}
    missing = [name for name, value in _own_state(model).items() if _place(value) not in present]
    assert not missing, f"weights without values: {missing[:3]}"
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(part_of(value, own[name]))


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of the whole `value`, a copy dealt out as `like` is; `value` itself where `like` is whole."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    with torch.no_grad():
        return torch.empty_like(like, dtype=value.dtype).copy_(
            distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
        )


def whole(value: Tensor) -> Tensor | None:
    """The whole of a tensor of which every rank has a part, for rank 0; None for the others, which must call it too."""
    found = value.detach().full_tensor()
    if ranks.is_main():
        return found
    if found.is_cuda:  # stay in step with rank 0, which copies each of them: NCCL waits for a minute only
        torch.cuda.synchronize(found.device)
    return None


def random_state() -> dict:
    """States of torch's generators, of the present GPU's alone, to be restored with `set_random_state`."""
    return {"cpu": torch.get_rng_state(), "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []}


def set_random_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])


def restore_threads(threads: int, keep_present: bool) -> None:
    """As many CPU threads as the checkpoint's process had, where the machine has the cores: the sums' order is theirs."""
    present = torch.get_num_threads()
    if threads == present:
        return
    if keep_present or threads > (os.cpu_count() or 1):
        print(f"{present} threads, {threads} before the interruption: the last bits of the weights may differ")
        return
    torch.set_num_threads(threads)
    print(f"{threads} threads, as before the interruption, so that the same weights come out")
