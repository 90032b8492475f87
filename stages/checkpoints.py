"""Checkpoints that outlive a kill: written whole or not at all, checked when read, never another recipe's.

They live outside DVC's outputs, which DVC deletes before a stage runs, at `<root>/.checkpoints/<fingerprint>`.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from stages import manifest


def fingerprint(settings: dict, inputs: list[Path]) -> str:
    """Names what a training computes: its parameters, its input files and the code that is loaded.

    Files over 64 MiB count by size and by their first and last MiB, so that 60 GB of vectors cost nothing.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    # A copy: the tracking thread imports while this runs.
    loaded = sys.modules.copy()
    modules = {name: module for name, module in loaded.items() if name.startswith("stages.") or name == "__main__"}
    code = {Path(module.__file__) for module in modules.values() if getattr(module, "__file__", None)}
    for path in sorted(code, key=lambda file: file.name):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for path in inputs:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(f"{file.relative_to(path)} {file.stat().st_size}\0".encode())
                digest.update(_content(file))
    return digest.hexdigest()[:16]


def checkpoint_folder(name: str) -> Path:
    """Where checkpoints of this fingerprint lie: at the real root, in DVC's temporary runs too."""
    return Path(os.environ.get("DVC_ROOT") or ".").resolve() / ".checkpoints" / name


def _content(file: Path) -> bytes:
    if file.stat().st_size > manifest.WHOLE_FILE_LIMIT:
        return manifest.ends(file)
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


class Checkpoints:
    """The checkpoints of one training, the last `keep` of them and the best weights."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, weights: dict[str, torch.Tensor], state: dict) -> Path:
        """Writes a resumable checkpoint of this step and drops the oldest beyond `keep`; returns its folder."""
        target = self._write(f"step-{step:08d}", weights, state)
        for old in self._steps()[: -self.keep]:
            shutil.rmtree(old)
        return target

    def save_best(self, weights: dict[str, torch.Tensor]) -> Path:
        """Replaces the best weights."""
        return self._write("best", weights, {})

    def latest(self) -> tuple[dict[str, torch.Tensor], dict] | None:
        """Weights and state of the newest checkpoint that is whole; damaged ones are named and passed over."""
        for folder in reversed(self._steps()):
            problem = manifest.damage(folder, whole=True)
            if problem is None:
                state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
                return load_file(folder / "weights.safetensors"), state
            print(f"{folder}: {problem}; an earlier checkpoint is used where there is one", file=sys.stderr)
        return None

    def best(self) -> dict[str, torch.Tensor] | None:
        folder = self.folder / "best"
        if not folder.is_dir():
            return None
        problem = manifest.damage(folder, whole=True)
        if problem is not None:
            raise ValueError(f"{folder}: {problem}; delete {self.folder} to train again from the start")
        return load_file(folder / "weights.safetensors")

    def remove(self) -> None:
        """Deletes them all, once the finished model is in its place."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _steps(self) -> list[Path]:
        return sorted(folder for folder in self.folder.glob("step-*") if folder.suffix != ".unfinished")

    def _write(self, name: str, weights: dict[str, torch.Tensor], state: dict) -> Path:
        unfinished, target = self.folder / f"{name}.unfinished", self.folder / name
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        save_file(weights, unfinished / "weights.safetensors")
        torch.save(state, unfinished / "state.pt")
        manifest.record_folder(unfinished)
        replaced = self.folder / f"{name}.replaced.unfinished"
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():
            target.rename(replaced)
        unfinished.rename(target)
        manifest.sync_folder(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)
        return target


def own_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's parameters and buffers as contiguous CPU copies, tied ones once."""
    seen, weights = set(), {}
    for name, value in model.state_dict().items():
        if value.data_ptr() not in seen or value.numel() == 0:
            seen.add(value.data_ptr())
            weights[name] = value.detach().to("cpu", copy=True).contiguous()
    return weights


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copies weights saved by `own_weights` back; tied ones follow their twin."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, f"weights of another model: {unexpected[:3]}"
    present = {value.data_ptr() for name, value in model.state_dict().items() if name in weights}
    own = model.state_dict()
    assert all(own[name].data_ptr() in present for name in missing), f"weights without values: {missing[:3]}"


def random_state() -> dict:
    """States of torch's generators, to be restored with `set_random_state`."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
