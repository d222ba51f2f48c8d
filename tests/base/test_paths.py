"""A relative folder is the caller's, but for the project's own."""

from pathlib import Path

from healing_utils.base.paths import project_root, run_folder


def test_where_a_run_lies(tmp_path, monkeypatch):
    monkeypatch.delenv("HEALING_RUNS", raising=False)
    (tmp_path / "notebooks").mkdir()
    for here in (tmp_path, tmp_path / "notebooks"):
        monkeypatch.chdir(here)
        for own in ("data/runs/quick", "./data/results/quick", Path("data/runs")):
            assert run_folder(own) == project_root() / own
        for given in ("mine", "data", "data/other", "a b/#1", "runs/../x"):
            assert run_folder(given) == here / given
        assert run_folder(tmp_path / "x") == tmp_path / "x"
    monkeypatch.setenv("HEALING_RUNS", str(tmp_path))
    assert run_folder("data/runs/quick") == tmp_path / "quick"
    assert run_folder("data/results/quick") == project_root() / "data/results/quick"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_folder("~/x") == tmp_path / "x"
    assert run_folder("~nobody-here/x") == Path.cwd() / "~nobody-here/x"
