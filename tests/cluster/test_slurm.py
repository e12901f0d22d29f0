"""experiments/cluster/slurm.sh and a sweep's job script on a real SLURM: the bits of a run that nothing happened to."""

import json
import os
import re
import sys
from pathlib import Path

import killable
import pytest
import torch
import yaml
from quick_dar import QuickDar
from real_slurm import Slurm, reason_against
from tiny_models import fit_ar, write_tokens

from dar_lightning.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SCRIPT = Path(__file__).parents[2] / "experiments" / "cluster" / "slurm.sh"
STEPS = 12
FIXED = "--trainer.strategy=ddp_find_unused_parameters_true"  # whose buckets are the same from the first step on
OURS = "dar_lightning.training.callbacks"


def callbacks(folder: Path, *steps: int) -> list[dict]:
    saves, pause = {"every_n_train_steps": 2, "save_top_k": 0}, {"folder": str(folder), "steps": list(steps)}
    given = {f"{OURS}.LastStepCheckpoint": saves, f"{OURS}.EMA": {}, "pause.Pause": pause}
    return [{"class_path": name, "init_args": options} for name, options in given.items()]


def arguments(tokens, run: Path, pauses: Path, *steps: int, batch_size: int) -> list[str]:
    """Options of `dar fit`, but for the devices."""
    words = fit_ar(*tokens, run, max_steps=STEPS, val_check_interval=5, callbacks=json.dumps(callbacks(pauses, *steps)))
    words = [str(word) for word in words[1:] if not str(word).startswith("--trainer.devices")]
    return [*words, "--ckpt_path=last", f"--data.init_args.batch_size={batch_size}"]


def last(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt")


def state(run: Path) -> dict:
    """Weights, average and the optimizer's state of a finished run, by place in the checkpoint."""
    saved, found = last(run), {}
    assert saved["global_step"] == STEPS
    parts = [((name,), saved[name]) for name in ("state_dict", "current_model_state", "optimizer_states")]
    while parts:
        place, part = parts.pop()
        if isinstance(part, dict | list | tuple):
            pairs = part.items() if isinstance(part, dict) else enumerate(part)
            parts += [((*place, key), inner) for key, inner in pairs]
        else:
            found[place] = part
    return found


def same_bits(run: Path, reference: Path) -> bool:
    one, two = state(run), state(reference)
    assert one.keys() == two.keys()
    return all(
        torch.equal(value, two[place]) if torch.is_tensor(value) else value == two[place]
        for place, value in one.items()
    )


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A SLURM whose jobs find `dar`; skipped where there can be none."""
    if reason := reason_against():
        pytest.skip(reason)
    root = tmp_path_factory.mktemp("slurm")
    (programs := root / "bin").mkdir()
    quick, slurm = QuickDar(programs), Slurm(root, programs)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
        quick.close()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("tokens")
    return write_tokens(root / "train", 22), write_tokens(root / "val", 7)


def fit(slurm: Slurm, *options: str, words: list[str], **variables: str) -> str:
    """Submit the script; the job's number."""
    sizes = ("--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
    return slurm.submit(*sizes, *options, SCRIPT, *words, **variables)


@pytest.fixture(scope="module")
def too_short(slurm, tokens) -> str:
    """A job whose notice comes at once. SLURM looks twice a minute: meanwhile, the other tests run."""
    words = arguments(tokens, slurm.root / "short", slurm.root / "short_pauses", 3, batch_size=4)
    return fit(slurm, "--nodes=1", "--nodelist=node4", "--time=5", words=words)


@pytest.fixture(scope="module")
def four_tasks(slurm, tokens) -> str:
    """Two on each node, and a notice as that of the limit comes: to the script alone."""
    pauses = slurm.root / "four_pauses"
    words = [*arguments(tokens, slurm.root / "four", pauses, 5, batch_size=1), FIXED]
    job = fit(slurm, "--nodelist=node3,node4", "--ntasks-per-node=2", words=words, SOONEST="0")
    slurm.wait_for_pause(job, pauses, 0, tasks=4)
    slurm.ask("scancel", "--batch", "--signal=USR1", job)
    return job


def urgent(slurm: Slurm, node: str) -> str:
    """A job that needs a whole node, now."""
    words = ("--partition=urgent", f"--nodelist={node}", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    return slurm.submit(*words)


def went_on(slurm: Slurm, job: str) -> list[int]:
    """The steps after which a job's later starts went on."""
    return [int(step) for step in re.findall(r"goes on after step (\d+)", slurm.log(job))]


def test_two_tasks_whatever_happens(slurm, tokens, tmp_path, too_short, four_tasks):
    run, pauses = slurm.root / "two", slurm.root / "two_pauses"
    words = arguments(tokens, run, pauses, 3, 6, 8, 10, batch_size=2)
    job = fit(slurm, "--nodelist=node1,node2", words=words, SOONEST="0")
    slurm.wait_for_pause(job, pauses, 0, tasks=2)
    slurm.ask("scancel", "--batch", "--signal=USR1", job)  # as at the limit
    slurm.wait_for_pause(job, pauses, 1, tasks=2)
    other = urgent(slurm, "node1")
    slurm.wait_for_pause(job, pauses, 2, tasks=2)
    assert slurm.wait_for_end(other) == ("COMPLETED", "0:0", 0)
    slurm.cut_power(2)
    slurm.wait_for_pause(job, pauses, 3, tasks=2)
    slurm.ask("scancel", job)
    state, _, put_back = slurm.wait_for_end(job)
    assert (state, put_back) == ("CANCELLED", 3)
    assert went_on(slurm, job) == [4, 7, 8]
    assert list(run.rglob("hpc_ckpt_*")) == []

    job = fit(slurm, "--nodes=1", "--nodelist=node1", words=words)
    assert slurm.wait_for_end(job) == ("FAILED", "2:0", 0)
    assert "dar fit: cannot resume: " in slurm.log(job)
    assert "Traceback" not in slurm.log(job)

    path, modules = f"{Path(sys.executable).parent}:{os.environ['PATH']}", [Path(__file__).parent, *sys.path]
    job = fit(slurm, "--nodelist=node1,node2", words=words, PATH=path, PYTHONPATH=":".join(map(str, modules)))
    assert slurm.wait_for_end(job) == ("COMPLETED", "0:0", 0)  # the program itself, this time
    assert went_on(slurm, job) == [11]
    unbroken = arguments(tokens, tmp_path / "unbroken", tmp_path / "pauses", batch_size=2)
    assert killable.run(main, ["fit", *unbroken, "--trainer.devices=2"], world=2) == [0, 0]
    assert same_bits(run, tmp_path / "unbroken")


def test_four_tasks_on_two_nodes(slurm, tokens, tmp_path, four_tasks):
    assert slurm.wait_for_end(four_tasks) == ("COMPLETED", "0:0", 1)
    unbroken = [*arguments(tokens, tmp_path / "unbroken", tmp_path / "pauses", batch_size=1), FIXED]
    assert killable.run(main, ["fit", *unbroken, "--trainer.devices=4"], world=4) == [0] * 4
    assert same_bits(slurm.root / "four", tmp_path / "unbroken")


def test_a_limit_that_is_shorter_than_the_notice(slurm, too_short):
    """slurm.sh says so where the run has begun, `dar` where it has not."""
    assert slurm.wait_for_end(too_short) == ("FAILED", "2:0", 0)
    said = ("slurm.sh: not put back: the notice of the time limit came ", "dar fit: SIGUSR1 came before the first step")
    assert sum(line.startswith(said) for line in slurm.log(too_short).splitlines()) == 1


def test_tasks_of_srun_that_are_not_those_of_the_run(slurm, tokens):
    """srun with two tasks of one device, and two tasks without srun."""
    words = arguments(tokens, slurm.root / "wrong", slurm.root / "wrong_pauses", batch_size=2)
    script = slurm.root / "wrong.sh"
    script.write_text(
        "#!/bin/bash\n"
        'srun dar fit "$@" --trainer.devices=1\necho "status $?"\n'
        'srun --ntasks=1 dar fit "$@" --trainer.devices=2\necho "status $?"\n'
        'dar fit "$@" --trainer.devices=2\necho "status $?"\n'
    )
    job = slurm.submit("--ntasks=2", "--ntasks-per-node=2", "--nodes=1", "--output=slurm-%j.log", script, *words)
    assert slurm.wait_for_end(job) == ("COMPLETED", "0:0", 0)
    log = slurm.log(job)
    assert log.count("status 2\n") == 3, log
    assert "Traceback" not in log
    assert "dar fit: SLURM_NTASKS is 2, but srun has not started this process: write srun before dar" in log
    assert not (slurm.root / "wrong").exists()


def test_a_sweep_as_an_array(slurm, tokens, monkeypatch):
    """Three trainings that differ in nothing but what happens to them: preemption, the limit's notice, nothing."""
    root, cells = slurm.root / "sweep", {"preempted": [5], "limit": [7], "unbroken": []}
    grid = {name: {"callbacks": callbacks(slurm.root / name, *steps)} for name, steps in cells.items()}
    words = fit_ar(*tokens, Path(), max_steps=STEPS, val_check_interval=5)[1:]
    options = {name: yaml.safe_load(value) for name, value in (word[2:].split("=", 1) for word in words)}
    options |= {"ckpt_path": "last", "trainer.callbacks": "{callbacks}"}
    del options["trainer.default_root_dir"]
    plan = {"name": "array", "grid": {"case": grid}, "stages": {"train": {"verb": "fit", "options": options}}}
    (slurm.root / "sweep.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    monkeypatch.setattr("sys.executable", str(slurm.root / "bin" / "python"))
    main(["sweep", str(slurm.root / "sweep.yaml"), "--output", str(root), "--slurm"])
    script = ("--nodelist=node2", root / "sweep.sbatch")

    job = slurm.submit(*script)
    slurm.wait_for_pause(f"{job}_0", slurm.root / "preempted", 0)
    slurm.wait_for_pause(f"{job}_1", slurm.root / "limit", 0)
    slurm.ask("scancel", "--batch", "--signal=USR1", f"{job}_1")
    assert slurm.wait_for_end(f"{job}_1")[0] == "FAILED"
    assert slurm.wait_for_end(f"{job}_2") == ("COMPLETED", "0:0", 0)
    urgent(slurm, "node2")
    again = slurm.submit("--array=1", *script)
    assert slurm.wait_for_end(f"{job}_0") == ("COMPLETED", "0:0", 1), (root / f"slurm-{job}_0.log").read_text()
    assert (root / f"slurm-{job}_0.log").read_text().count("case=preempted seed 0\n") == 2
    assert slurm.wait_for_end(f"{again}_1") == ("COMPLETED", "0:0", 0)
    cases = [json.loads((root / "cells" / f"case={name}" / "seed0" / "cell.json").read_text()) for name in cells]
    assert [case["status"] for case in cases] == ["done"] * 3
    preempted, limit, unbroken = (root / case["stages"][0]["folder"] for case in cases)
    assert same_bits(preempted, unbroken)
    assert same_bits(limit, unbroken)
