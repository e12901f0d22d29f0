"""dar sweep: equal commands are one piece of work, finished work is left alone, a failure ends its cell only."""

import json
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from filelock import FileLock, Timeout
from PIL import Image
from small_sweep import ONE, cell, plan
from tiny_models import CLASSES, GROUPS, SIZE, fit_ar, make_tokenizer, write_images, write_tokens

from dar_lightning.cli import main
from dar_lightning.commands.sweep import sweep
from dar_lightning.errors import UserError
from dar_lightning.sweeps import run
from dar_lightning.sweeps.plan import Stage, Sweep
from dar_lightning.sweeps.results import read_sweep
from dar_lightning.sweeps.run import Runner

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of loaders and loggers


def test_equal_commands_are_done_once(runs, capsys):
    done = runs(plan())
    assert [words[0] for words in done] == ["extract", *["export"] * 8]
    assert len({word for words in done for word in words if word.startswith("--weights=")}) == 8
    state = cell("K=2,size=L", 1)
    assert (state["status"], state["values"], state["seed"]) == ("done", {"K": 2, "size": "L"}, 1)
    train, weights = state["stages"]
    assert weights["command"][:3] == ["dar", "export", f"--ckpt=out/{train['folder']}/x"]
    assert weights["command"][3:] == ["--weights=2-16-1", f"--output=out/{weights['folder']}"]
    assert {stage["folder"].split("/")[0] for stage in state["stages"]} == {"shared"}
    assert Path("out", train["folder"], "log.txt").read_text().splitlines()[1] == "fine"
    assert yaml.safe_load(Path("out", train["folder"], "config.yaml").read_text())["verb"] == "extract"
    assert capsys.readouterr().out.count("  done  ") == 8
    assert runs(plan()) == [], "nothing is left to do"


def test_the_summary_of_a_sweep(runs):
    runs(plan(x_axis="size", figures=["FID"], budget="ten steps", paper=[{"K": 1, "FID": 2.0}]))
    summary = json.loads(Path("out/sweep.json").read_text())
    cells = summary.pop("cells")
    assert summary == {
        "name": "study",
        "title": "study",
        "axes": {"K": [1, 2], "size": ["S", "L"]},
        "x_axis": "size",
        "figures": ["FID"],
        "budget": "ten steps",
    }
    assert cells[1] == {"name": "K=1,size=L", "values": {"K": 1, "size": "L"}, "seeds": [0, 1], "paper": {"FID": 2.0}}
    assert [one["paper"] for one in cells[2:]] == [{}, {}]
    assert yaml.safe_load(Path("out/sweep.yaml").read_text())["stages"] == {
        name: {"config": []} | stage for name, stage in plan()["stages"].items()
    }


def test_a_failure_ends_its_cell_alone(runs, capsys):
    runs.broken.append("1-16-0")
    with pytest.raises(SystemExit) as stop:
        runs(plan())
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "weights  failed with status 2: no such thing (out/shared/weights-" in out
    assert "K=1,size=L  0     failed  0.0  weights" in out
    assert cell("K=1,size=L")["status"] == "failed"
    assert [stage["status"] for stage in cell("K=1,size=L")["stages"]] == ["done", "failed"]
    assert cell("K=2,size=L", 1)["status"] == "done"
    runs.broken.clear()
    assert [words[2] for words in runs(plan())] == ["--weights=1-16-0"], "only that is tried again"


def test_a_failure_of_shared_work_is_not_repeated(runs, capsys):
    runs.broken.append("extract")
    with pytest.raises(SystemExit):
        runs(plan(), "--only", "[0, 3]")
    assert capsys.readouterr().out.count("failed before") == 1
    assert [stage["status"] for stage in cell("K=2,size=L")["stages"]] == ["failed", "pending"]
    assert cell("K=2,size=S")["status"] == "pending"


def test_a_change_makes_all_that_it_concerns_pending_at_once(runs, capsys):
    """Those cells, too, that are not reached, so that no report puts metrics of two configs together."""
    config, metrics = Path("layer.yaml"), Path("out/cells/K=2/seed0/metrics.json")
    config.write_text("a: 1\n")
    settings = plan(seeds=[0], grid={"K": [1, 2]})
    settings["stages"]["weights"] = {"verb": "export", "config": ["layer.yaml"], "options": {"ckpt": "{train}/{K}"}}
    runs(settings)
    config.write_text("# a comment\na:   1\n")
    assert runs(settings) == []
    capsys.readouterr()
    metrics.with_name("samples.png").touch()
    config.write_text("a: 2\n")
    assert [words[0] for words in runs(settings, "--only", "[0]")] == ["export"]
    assert "  weights has changed since it was done in shared/weights-" in capsys.readouterr().out
    assert [cell(f"K={k}")["status"] for k in (1, 2)] == ["done", "pending"]
    assert [path.name for path in metrics.parent.iterdir()] == ["cell.json"]
    settings["stages"]["train"]["options"]["shards"] = "other"
    assert [words[0] for words in runs(settings)] == ["extract", "export", "export"], "what follows is done again too"
    assert metrics.exists()
    out = capsys.readouterr().out
    assert out.count("train has changed") == 1
    assert "weights has changed" not in out


def test_a_sweep_that_begins_beside_another_waits_with_its_folder(tmp_path):
    study = Sweep(**plan() | {"stages": {"a": Stage("export")}})
    second = threading.Thread(target=Runner(study, tmp_path).prepare)
    with FileLock(tmp_path / ".sweep.lock"):
        second.start()
        second.join(0.2)
        assert not (tmp_path / "sweep.json").exists()
    second.join()
    assert len(list(tmp_path.glob("cells/*/*/cell.json"))) == 8


CHILD = """
import signal, sys, time
from pathlib import Path
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, lambda number, frame: (Path("saved").touch(), sys.exit(128 + number)))
Path("begun").touch()
for _ in range(600):
    if not Path("go").exists():
        time.sleep(0.1)
"""


def wait_for(path: str | Path) -> None:
    end = time.monotonic() + 120
    while not Path(path).exists():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_lets_the_command_save_before_the_sweep_ends(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "PROGRAM", [sys.executable, "-c", CHILD])

    def stop() -> None:
        wait_for("begun")
        os.kill(os.getpid(), number)

    before = signal.signal(number, lambda *_: pytest.fail("nobody passed the signal on"))
    killer = threading.Thread(target=stop)
    killer.start()
    try:
        with pytest.raises(SystemExit) as stopped:
            sweep("study", {"a": Stage("export")}, {"K": [1, 2]}, output="out")
    finally:
        killer.join()
        signal.signal(number, before)
    assert stopped.value.code == 128 + number
    assert Path("saved").exists()
    assert [cell(f"K={k}")["status"] for k in (1, 2)] == ["pending", "pending"], "stopped is not failed"


def test_a_command_whose_sweep_was_killed_keeps_the_lock(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lock, held = FileLock("stage.lock"), []
    lock.acquire()
    number = lock._context.lock_file_fd

    def kill() -> None:
        wait_for("begun")
        os.close(number)  # as the system does for a process that is killed
        try:
            FileLock("stage.lock").acquire(blocking=False).lock.release()
        except Timeout:
            held.append(True)
        Path("go").touch()

    killer = threading.Thread(target=kill)
    killer.start()
    with open("log.txt", "w") as log:
        run._call([sys.executable, "-c", CHILD], log, lock)
    killer.join()
    lock._context.lock_file_fd = None
    assert held == [True]


def test_dry_run_prints_every_command_once_and_writes_nothing(runs, capsys):
    assert runs(plan(), "--dry-run") == []
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("dar extract ") for line in lines) == 1
    assert sum(line.startswith("dar export ") for line in lines) == 8
    assert "# 7: K=2,size=L seed 1" in lines
    assert not Path("out").exists()


def test_slurm_writes_an_array_whose_tasks_are_the_cells(runs, capsys):
    out = Path.cwd() / "my runs"
    assert runs(plan(), "--slurm", "--output", out.name) == []
    script = Path(out, "sweep.sbatch").read_text()
    assert "#SBATCH --array=0-7\n" in script
    assert f"#SBATCH --chdir={Path.cwd()}\n" in script
    assert "#SBATCH --signal=B:USR1@300\n" in script
    (call,) = [line for line in script.splitlines() if line.startswith("exec ")]
    words = shlex.split(call.replace("$SLURM_ARRAY_TASK_ID", "5"))
    assert words[1:6] == [sys.executable, "-m", "dar_lightning", "sweep", str(out / "sweep.yaml")]
    main(words[4:])
    out.rename("out")
    assert cell("K=1,size=L", 1)["status"] == "done"
    assert cell("K=1,size=S", 1)["status"] == "pending"


def test_work_that_another_process_does_is_waited_for(runs, capsys, monkeypatch):
    runs(plan(**ONE))
    (folder,) = Path("out/shared").glob("train-*")
    done = json.loads((folder / "done.json").read_text())
    (folder / "done.json").unlink()
    other = FileLock(folder / ".sweep.lock")
    other.acquire()

    def finish(lock, blocking=True, original=FileLock.acquire):
        # The sweep begins to wait for this work: the other process comes to its end.
        if blocking and Path(lock.lock_file).parent == folder:
            (folder / "done.json").write_text(json.dumps(done | {"seconds": 5.0}))
            other.release()
        return original(lock, blocking=blocking)

    monkeypatch.setattr(FileLock, "acquire", finish)
    assert runs(plan(**ONE)) == []
    assert "train  waits for another process" in capsys.readouterr().out
    assert cell("K=1,size=S")["stages"][0]["seconds"] == 5.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"seeds": [0, 0]}, "seeds are"),
        ({"grid": {}}, "grid is empty"),
        ({"grid": {"K": []}}, "K is empty"),
        ({"grid": {"seed": [1, 2]}}, "seed is no axis"),
        ({"grid": {"K": {"a": {"x": 1}, "b": {"y": 1}}}}, "the values of K give different names"),
        ({"x_axis": "beta"}, "x_axis is 'beta': choose from K, size"),
        ({"grid": {"K": ["a b", "a/b"]}}, "two cells are called K=a_b"),
        ({"paper": [{"K": 3, "FID": 1.0}]}, "paper: K is 3, which the grid does not have"),
        (
            {"stages": {"a": Stage("export", [], {"ckpt": "{b}"}), "b": Stage("export")}},
            r"a has \{b\}, which is no axis",
        ),
        ({"stages": {"K": Stage("export")}}, "K is the name of an axis too"),
    ],
)
def test_mistakes_in_a_sweep_file(changes, words):
    settings = plan() | {"stages": {"a": Stage("export")}} | changes
    with pytest.raises(UserError, match=words):
        Sweep(**settings)


def test_mistakes_are_one_line(runs, capsys):
    for settings, options, words in (
        (plan(), ["--only", "[8]"], "only is [8]: this sweep has cells 0 to 7"),
        (plan(stages={"a": {"verb": "fly"}}), [], "verb is 'fly', choose from fit"),
        (plan(stages={"a": {"verb": "fit", "config": ["no.yaml"]}}), [], "config no.yaml cannot be read"),
    ):
        with pytest.raises(SystemExit) as stop:
            runs(settings, *options)
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
    assert not Path("out").exists()
    Path("out").mkdir()
    Path("out/mine.txt").touch()
    with pytest.raises(SystemExit):
        runs(plan())
    assert "out holds other files" in capsys.readouterr().err


def test_from_idea_to_report(tmp_path, monkeypatch, capsys):
    """A study of two orders by the real verbs, in this process; `dar report` reads what `dar sweep` writes."""

    def call(words, log, lock):
        try:
            main(words[3:])
        except SystemExit as stop:
            return stop.code, 0
        return 0, 0

    monkeypatch.setattr(run, "_call", call)
    monkeypatch.chdir(tmp_path)
    make_tokenizer().save_pretrained("tokenizer")
    write_images(Path("images"), 12), write_tokens(Path("tokens"), 8)
    words = fit_ar("tokens", "tokens", "", max_steps=1, val_check_interval=1)[1:]
    options = dict(word.removeprefix("--").replace("ARModule", "AblationModule").split("=", 1) for word in words)
    del options["trainer.default_root_dir"]
    options |= {"model.init_args.config.order_groups": GROUPS, "model.init_args.config.order": "{order}"}
    callbacks = {
        "LastStepCheckpoint": {"save_last": True, "save_top_k": 0, "every_n_train_steps": 1},
        "GenerationFID": {"tokenizer": "tokenizer", "reference": "images", "num_samples": 4, "features": "color_edges"},
    }
    layer = [{"class_path": name, "init_args": values} for name, values in callbacks.items()]
    Path("ar.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": layer}}))
    options["seed_everything"] = "{seed}"
    draw = {"tokenizer": "tokenizer", "ar": "{ar}/checkpoints/last.ckpt", "per_class": 2, "seed": "{seed}"}
    measure = {"samples": "{draw}/samples.npz", "reference": "images", "features": "color_edges"}
    table = {"title": "t", "task": "reconstruct", "rows": [{"solver": "euler"}], "pipeline": "tokenizer"}
    settings = {
        "name": "order",
        "figures": ["val/loss", "FD-color_edges"],
        "grid": {"order": ["reversed", "sideways", "random_per_sample"]},
        "stages": {
            "ar": {"verb": "fit", "config": ["ar.yaml"], "options": options},
            "draw": {"verb": "sample", "options": draw},
            "measure": {"verb": "evaluate", "options": measure},
            "rfd": {"verb": "table", "options": table | {"reference": "images", "features": "color_edges"}},
        },
    }
    Path("sweep.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "sweep.yaml"])
    assert stop.value.code == 1
    root = Path("runs/sweeps/order")
    states = {path.parts[-3]: json.loads(path.read_text())["status"] for path in root.glob("cells/*/*/cell.json")}
    assert states == {"order=reversed": "done", "order=sideways": "failed", "order=random_per_sample": "done"}
    for name in ("reversed", "random_per_sample"):
        folder = root / "cells" / f"order={name}" / "seed0"
        metrics = json.loads((folder / "metrics.json").read_text())
        assert {"val/loss", "groups/val_entropy_3", "written/val_loss_0", "FD-color_edges", "rFD-color_edges"} <= set(
            metrics["figures"]
        )
        assert metrics["protocol"]["measure"]["samples"]["n"] == 2 * len(CLASSES)
        measured_by = {"val/gFD-color_edges": "ar", "FD-color_edges": "measure", "rFD-color_edges": "rfd"}
        assert {figure: metrics["stages"][figure] for figure in measured_by} == measured_by
        assert metrics["protocol"]["ar, val/gFD-color_edges"]["samples"]["n"] == 4
        assert (folder / "samples.png").stat().st_size > 0
        work = json.loads((folder / "cell.json").read_text())["stages"][0]
        resolved = yaml.safe_load((root / work["folder"] / "config.yaml").read_text())
        assert resolved["model"]["init_args"]["config"]["order"] == name
        assert list((root / work["folder"] / "tensorboard").glob("events.out.*"))
    assert not (root / "cells/order=sideways/seed0/metrics.json").exists()

    capsys.readouterr()
    main(["report", str(root)])
    text, found = capsys.readouterr().out, read_sweep(root)
    for one in (found.cells[0], found.cells[2]):
        [stage], loss = one.stages("ar"), one.runs[0].metrics["val/loss"]
        assert loss == stage.scalars["val/loss"].values[-1], "the last validation's"
        assert f"| {one.values['order']} | 1 | {loss:.4g} |" in text
    assert found.cells[0].runs[0].metrics["val/loss"] != found.cells[2].runs[0].metrics["val/loss"]
    assert {"figures.png", "curves.png", "samples.jpg"} <= {path.name for path in (root / "report").iterdir()}

    rows = {"rows": [{"solver": "{solver}"}], "reference": "images", "features": "color_edges"}
    settings = {"name": "solvers", "grid": {"solver": ["euler"]}}
    settings["stages"] = {"rfd": {"verb": "table", "options": table | rows}}
    Path("solvers.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    main(["sweep", "solvers.yaml"])
    with Image.open("runs/sweeps/solvers/cells/solver=euler/seed0/samples.png") as picture:
        assert picture.width > 2 * SIZE, "a block of the reconstructions"
