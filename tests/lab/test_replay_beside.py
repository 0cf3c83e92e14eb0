"""A replay on another kind of processor: both codes run here, and must agree bit for bit."""

import shutil
import subprocess

import pytest

from wellposed.lab import replay_beside as module
from wellposed.lab.replay_beside import ReplayError, _differences, replay_beside

ENTRY = {"fingerprint": "a" * 16, "replay": {"fingerprint": "b" * 16}}


@pytest.fixture
def project(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "code.py").write_text("VALUE = 1\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "then"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "src" / "code.py").write_text("VALUE = 2\n")
    return tmp_path


def test_equal_metrics_leave_nothing_and_others_are_named():
    then = {"ce 0": ["finished", {"loss": 0.5, "error": 1.0}], "elr 0": ["diverged", {}], "sam 0": None}
    assert _differences(then, dict(then)) == []
    now = {**then, "ce 0": ["finished", {"loss": 0.5, "error": 1.0 + 1e-15}], "elr 0": ["finished", {"loss": 1.0}]}
    assert _differences(then, now) == ["ce 0: error is 1.000000000000001, was 1.0", "elr 0: finished, was diverged"]
    assert _differences(then, {k: then[k] for k in ("ce 0", "elr 0")}) == ["sam 0 ran then and not now"]
    assert _differences({}, {"ce 1": None}) == ["ce 1 runs now and did not then"]


def fake(monkeypatch, fingerprint):
    """Trials whose one metric is the tree's own number."""
    seen = []

    def metrics(slug, entry, place, tree, accepted):
        seen.append(accepted)
        (place / "fingerprint").write_text(fingerprint)
        return {"ce 0": ["finished", {"value": float((tree / "src" / "code.py").read_text().split("=")[1])}]}

    monkeypatch.setattr(module, "_metrics", metrics)
    return seen


@pytest.mark.parametrize("mark", ["a", "b"])
def test_the_revisions_own_files_run_beside_the_present_ones(monkeypatch, project, mark):
    seen = fake(monkeypatch, mark * 16)
    assert replay_beside("elr", ENTRY, "HEAD", project) == ["ce 0: value is 2.0, was 1.0"]
    assert seen == [["a" * 16, "b" * 16], []]
    (project / "src" / "code.py").write_text("VALUE = 1\n")
    assert replay_beside("elr", ENTRY, "HEAD", project) == []


def test_a_revision_with_other_code_than_the_entrys_proves_nothing(monkeypatch, project):
    fake(monkeypatch, "c" * 16)
    with pytest.raises(ReplayError, match="elr: 'HEAD' does not hold the code that the entry belongs to"):
        replay_beside("elr", ENTRY, "HEAD", project)


def test_an_unknown_revision_is_named(project):
    with pytest.raises(ReplayError, match="git knows no revision 'nowhere'"):
        replay_beside("elr", ENTRY, "nowhere", project)


def test_a_run_that_fails_says_why(project):
    # The trees here hold no package: another one, installed elsewhere, must not stand in for it.
    with pytest.raises(ReplayError, match="elr: the trials could not run: the package was not found in"):
        replay_beside("elr", ENTRY, "HEAD", project)
