"""Mends what a killed DVC leaves half written: .dvc/tmp/rwlock and dvc.lock (not a stage).

    python -m stages.chaos.unlock                         # harmless where nothing is wrong

DVC 3.67 rewrites both in place. Killed in the middle, it says "Unable to read RWLock-file" or "'./dvc.lock' validation
failed" at every later command. Without dvc.lock it takes finished stages from its run cache and runs none of them again.
"""

import json
import subprocess
import time
from pathlib import Path

from stages.machine.entry import run

RWLOCK, LOCK, ASIDE = Path(".dvc/tmp/rwlock"), Path("dvc.lock"), Path(".dvc/tmp/dvc.lock.broken")


def main() -> None:
    if not Path(".dvc").is_dir():
        raise ValueError(".dvc: not found; run from the folder that holds dvc.yaml")
    broken = [path for path, whole in ((RWLOCK, readable_rwlock), (LOCK, readable_lock)) if not whole(path)]
    if broken:
        time.sleep(1.0)  # unless a running DVC is just writing it
    if RWLOCK in broken and not readable_rwlock(RWLOCK):
        RWLOCK.unlink()
        print(f"{RWLOCK} was half written: removed")
    else:
        release_the_dead()
    if LOCK in broken and not readable_lock(LOCK):
        LOCK.replace(ASIDE)
        committed = subprocess.run(["git", "show", f"HEAD:./{LOCK}"], capture_output=True, text=True)
        if committed.returncode == 0:
            LOCK.write_text(committed.stdout, encoding="utf-8")
        came = "the committed one is back" if committed.returncode == 0 else "DVC writes a new one"
        print(f"{LOCK} was half written: moved to {ASIDE}, {came}; finished stages come from the run cache")


def readable_rwlock(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except FileNotFoundError:
        return True
    except ValueError:
        return False


def readable_lock(path: Path) -> bool:
    """Whether DVC would read it: YAML with a `schema` and whole entries of stages."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        return "schema" in found and all("cmd" in stage for stage in (found.get("stages") or {}).values())
    except FileNotFoundError:
        return True
    except (ValueError, TypeError, AttributeError, yaml.YAMLError):
        return False


def release_the_dead() -> None:
    """Takes out entries whose number belongs to another program by now: DVC itself only looks whether it is in use."""
    import psutil

    def is_dvc(info: dict) -> bool:
        try:
            return any("dvc" in part for part in psutil.Process(info["pid"]).cmdline())
        except psutil.Error:
            return False

    if not RWLOCK.exists():
        return
    held = json.loads(RWLOCK.read_text(encoding="utf-8"))
    left = {
        "write": {path: info for path, info in held.get("write", {}).items() if is_dvc(info)},
        "read": {
            path: alive
            for path, infos in held.get("read", {}).items()
            if (alive := [one for one in infos if is_dvc(one)])
        },
    }
    if left != {"write": held.get("write", {}), "read": held.get("read", {})}:
        unfinished = RWLOCK.with_name("rwlock.unfinished")
        unfinished.write_text(json.dumps(left), encoding="utf-8")
        unfinished.replace(RWLOCK)
        print(f"{RWLOCK}: entries of processes that are gone are taken out")


if __name__ == "__main__":
    run(main)
