"""The READMEs against the project: every command names what is there, every link leads somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from stages.params import load_params

TEXTS = ["README.md", "data/README.md", "metrics/README.md", "stages/README.md", "data/tiny/README.md"]
MAKE = set(re.findall(r"^([a-z-]+):", Path("Makefile").read_text(encoding="utf-8"), re.M))
STAGES = set(yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"])


def commands(text: str) -> list[list[str]]:
    """The words of each command in the file's blocks; a line that ends in a backslash goes on, `&&` ends one."""
    found = []
    for block in re.findall(r"^```\n(.*?)^```", Path(text).read_text(encoding="utf-8"), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.removeprefix("$ ")
            if re.match(
                r"(make|dvc|python3?|torchrun|accelerate|mlflow|git|cp|\$EDITOR|nohup|tensorboard|tail)\b", line
            ):
                for one in re.split(r"\s&&\s", line):
                    found.append(shlex.split(one, comments=True))
    return found


def anchors(file: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("text", TEXTS)
def test_links_lead_to_files_and_headings(text):
    for target in re.findall(r"\]\(([^)\s]+)\)", Path(text).read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = Path(text).parent / name if name else Path(text)
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("text", TEXTS)
def test_commands_name_what_is_there(text):
    for words in commands(text):
        if words[0] == "make":
            assert set(words[1:]) <= MAKE, words
        modules = [words[at + 1] for at, word in enumerate(words[:-1]) if word == "-m"]
        for module in modules:
            if module.startswith("stages."):
                path = Path(module.replace(".", "/"))
                assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), words
        if words[:2] == ["dvc", "repro"]:
            assert {word for word in words[2:] if word.isalpha()} <= STAGES, words


@pytest.mark.parametrize("text", TEXTS)
def test_settings_of_experiments_are_parameters(text, tmp_path):
    """Together, as the command sets them; a list of values by its first. Files and folders of a user's own are made up."""
    for words in commands(text):
        settings = [words[at + 1] for at, word in enumerate(words[:-1]) if word == "-S"]
        values = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
        for key, value in (setting.split("=", 1) for setting in settings):
            *above, last = key.split(".")
            section = values
            for part in above:
                section = section[part]
            assert last in section, f"{text}: {key}"
            single = value if value.startswith('"') else value.split(",")[0]
            section[last] = yaml.safe_load(single)
        if settings:
            (tmp_path / "params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
            if values["data"]["files"]["train"] and not values["data"]["files"]["passages"]:
                continue  # half of a command that goes on from a preset
            load_params(tmp_path / "params.yaml")


def test_the_readme_is_read_in_ten_minutes():
    assert len(Path("README.md").read_text(encoding="utf-8").split()) <= 1500
