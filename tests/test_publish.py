"""What is a folder and what a hub name, and what stops a publication. The whole of it: tests/test_pipeline.py."""

import pytest

from stages import publish


def test_a_hub_name_is_no_path_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert publish.is_hub_name("owner/name-1.0")
    for path in ("name", "./owner/name", "/owner/name", "models/name", "a/b/c", "../name", "owner/na me"):
        assert not publish.is_hub_name(path), path


def test_a_folder_that_is_there_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["publish", str(tmp_path)])
    with pytest.raises(ValueError, match="is not overwritten"):
        publish.main()


def test_without_a_model_there_is_nothing_to_publish(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no trained model"):
        publish.write(tmp_path / "out", "out", weights_only=False)
    assert not list(tmp_path.iterdir())


def test_a_hub_that_does_not_answer_is_one_line(tmp_path, monkeypatch):
    import huggingface_hub

    def away(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", away)
    with pytest.raises(ValueError, match=r"me/rag: not pushed to the hub \(no route to host\)"):
        publish.push(tmp_path, "me/rag", private=False)


def test_a_repository_gets_the_folder(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    calls = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda hub, *args, **more: calls.append((args, more)))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda hub, **more: calls.append(more["folder_path"]))
    publish.push(tmp_path, "me/rag", private=True)
    assert calls == [(("me/rag",), {"private": True, "exist_ok": True}), tmp_path]
    assert "me/rag" in capsys.readouterr().out
