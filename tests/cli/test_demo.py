"""`lorax-gen demo`."""


def test_the_demo_refuses_a_directory_that_holds_something_else(refused, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "exists and is not from a demo" in refused("demo", "--run-dir", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_steps_are_of_the_demo_that_trains(refused):
    assert "--steps is an option of `demo tasks`" in refused("demo", "--steps", 3)
