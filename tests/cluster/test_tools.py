"""`make ci-tools` installs SLURM where any program is missing that its tests need."""

import shutil
import subprocess
from pathlib import Path

import pytest
from real_slurm import NEEDED

TOOLS = Path(__file__).parents[2] / ".ci" / "tools"


@pytest.mark.parametrize("missing", NEEDED)
def test_ci_tools_installs_what_the_tests_on_slurm_need(missing, tmp_path):
    have = {*NEEDED, "apt-get", "chromium"} - {missing}
    programs = dict.fromkeys(have, f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\n')
    programs["sudo"] = '#!/bin/sh\nshift\nexec "$@"\n'
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    for name in ("sh", "env", "mktemp", "rm", "id", "timeout", "grep", "tail"):
        (tmp_path / name).symlink_to(shutil.which(name))
    subprocess.run([shutil.which("bash"), TOOLS], env={"PATH": str(tmp_path)}, check=True)
    asked = (tmp_path / "asked").read_text()
    assert "slurmctld" in asked
    assert "chromium" not in asked
