"""What this code must never do: run what a file or a parameter says."""

import ast
from pathlib import Path

import pytest

FILES = sorted(Path("stages").rglob("*.py"))
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {
    "eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all",
}  # fmt: skip


def offences(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = names if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in modules if name.split(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        words = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
        given = {word.arg for word in node.keywords}
        if called in FORBIDDEN_CALLS:
            found.append(called)
        if called == "torch.load" and words.get("weights_only") is not True:
            found.append("torch.load without weights_only=True")
        if called.endswith("np.load") and words.get("allow_pickle") is not False:
            found.append("np.load without allow_pickle=False")
        found += [f"{name}=True" for name in ("shell", "trust_remote_code", "allow_pickle") if words.get(name) is True]
        computed = {"shell", "trust_remote_code", "weights_only", "allow_pickle"} & (given - words.keys())
        found += [f"{name}= of a computed value" for name in sorted(computed)]
        if called.endswith("Model.from_pretrained") and words.get("use_safetensors") is not True:
            found.append(f"{called} without use_safetensors=True")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_code_from_data(file):
    assert offences(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from joblib import load", "eval(text)", "exec(text)", "yaml.load(file)", "os.system('ls')",
        "torch.load(file)", "torch.load(file, weights_only=False)", "torch.load(file, weights_only=flag)",
        "np.load(file)", "np.load(file, allow_pickle=True)", "subprocess.run(command, shell=True)",
        "AutoTokenizer.from_pretrained(name, trust_remote_code=True)", "AutoModel.from_pretrained(name)",
    ],
)  # fmt: skip
def test_the_search_finds(line):
    assert offences(line)


def test_mlflow_ui_listens_on_loopback_alone():
    recipe = Path("Makefile").read_text(encoding="utf-8")
    assert "\tpython -m stages.tracking.ui\n" in recipe and "\tmlflow ui" not in recipe
    source = Path("stages/tracking/ui.py").read_text(encoding="utf-8")
    assert 'HOST, PORT = "127.0.0.1", 5000' in source and '"ui", "--host", HOST' in source
