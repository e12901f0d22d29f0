"""What goes with a release agrees: versions, notices, issue templates."""

from pathlib import Path

import yaml

import dar_lightning

ROOT = Path(__file__).parents[1]


def test_versions_agree():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == dar_lightning.__version__


def test_issue_templates_are_forms():
    templates = [path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"]
    forms = [yaml.safe_load(path.read_text()) for path in templates]
    assert len(forms) == 3
    assert all({"name", "description", "body"} <= form.keys() for form in forms)


def test_every_data_set_in_the_wheel_is_in_the_notice():
    notice = (ROOT / "NOTICE").read_text()
    assert [path.name for path in (ROOT / "data").iterdir() if path.is_dir() and path.name not in notice] == []
