"""TensorBoard's folders: one a training, whatever it is called, and nothing of another one's lost."""

from stages.training.boards import take_board


def test_a_training_keeps_its_folder_under_a_new_name(tmp_path):
    first = take_board(tmp_path, "first", "aaaaaaaa1")
    (first / "events").write_text("a")
    again = take_board(tmp_path, "second", "aaaaaaaa1")
    assert again == tmp_path / "second" and (again / "events").read_text() == "a" and not first.exists()
    assert take_board(tmp_path, "second", "aaaaaaaa1") == again


def test_what_another_training_left_under_the_name_is_kept(tmp_path):
    for fingerprint in ("aaaaaaaa1", "bbbbbbbb2", "aaaaaaaa3"):
        (take_board(tmp_path, "new", fingerprint) / "events").write_text(fingerprint)
    found = {folder.name: (folder / "events").read_text() for folder in tmp_path.iterdir()}
    assert found == {"new": "aaaaaaaa3", "new-aaaaaa": "aaaaaaaa1", "new-bbbbbb": "bbbbbbbb2"}


def test_a_folder_of_before_is_kept_too(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "events").write_text("old")
    take_board(tmp_path, "new", "aaaaaaaa1")
    assert (tmp_path / "new-earlie" / "events").read_text() == "old"
