"""dar sweep: equal commands are one piece of work, finished work is left alone, a failure ends its cell only."""

import json
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from filelock import FileLock, Timeout
from PIL import Image
from refusals import refused
from small_sweep import ONE, cell, plan
from tiny_models import CLASSES, GROUPS, fit_ar, make_tokenizer, write_images, write_tokens

from dar_lightning.cli import main
from dar_lightning.commands.sweep import sweep
from dar_lightning.sweeps import run
from dar_lightning.sweeps.plan import Stage, Sweep, Work
from dar_lightning.sweeps.results import read_sweep


def test_equal_commands_are_done_once(runs, capsys):
    settings = plan(x_axis="size", figures=["FID"], budget="ten steps", paper=[{"K": 1, "FID": 2.0}])
    done = runs(settings)
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
    assert runs(settings) == [], "nothing is left to do"

    summary = json.loads(Path("out/sweep.json").read_text())
    cells, axes = summary.pop("cells"), {"K": [1, 2], "size": ["S", "L"]}
    told = {"name": "study", "title": "study", "axes": axes, "x_axis": "size", "figures": ["FID"]}
    assert summary == told | {"budget": "ten steps"}
    assert cells[1] == {"name": "K=1,size=L", "values": {"K": 1, "size": "L"}, "seeds": [0, 1], "paper": {"FID": 2.0}}
    assert [one["paper"] for one in cells[2:]] == [{}, {}]
    stages = {name: {"config": []} | stage for name, stage in settings["stages"].items()}
    assert yaml.safe_load(Path("out/sweep.yaml").read_text())["stages"] == stages


def test_a_failure_ends_its_cell_alone(runs, capsys):
    runs.broken.append("1-16-0")
    with pytest.raises(SystemExit, match="1"):
        runs(plan())
    out = capsys.readouterr().out
    assert "weights  failed with status 2: no such thing (out/shared/weights-" in out
    assert "K=1,size=L  0     failed  0.0  weights" in out
    assert cell("K=1,size=L")["status"] == "failed"
    assert [stage["status"] for stage in cell("K=1,size=L")["stages"]] == ["done", "failed"]
    assert cell("K=2,size=L", 1)["status"] == "done"
    runs.broken[:] = ["extract"]
    assert [words[2] for words in runs(plan())] == ["--weights=1-16-0"], "only that is tried again"
    with pytest.raises(SystemExit, match="1"):
        runs(plan(), "--output", "other", "--only", "[0, 3]")
    assert capsys.readouterr().out.count("failed before") == 1, "shared work fails once"
    Path("out").rename("before"), Path("other").rename("out")
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
    second = threading.Thread(target=run.Runner(study, tmp_path).prepare)
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
for _ in range(6000):
    if not Path("go").exists():
        time.sleep(0.01)
"""


def when_begun(action) -> threading.Thread:
    """Act as soon as CHILD runs."""

    def wait() -> None:
        while not Path("begun").exists():
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_lets_the_command_save_before_the_sweep_ends(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "PROGRAM", [sys.executable, "-c", CHILD])
    before = signal.signal(number, lambda *_: pytest.fail("nobody passed the signal on"))
    killer = when_begun(lambda: os.kill(os.getpid(), number))
    try:
        with pytest.raises(SystemExit, match=str(128 + number)):
            sweep("study", {"a": Stage("export")}, {"K": [1, 2]}, output="out")
    finally:
        killer.join()
        signal.signal(number, before)
    assert Path("saved").exists()
    assert [cell(f"K={k}")["status"] for k in (1, 2)] == ["pending", "pending"], "stopped is not failed"


def test_a_command_whose_sweep_was_killed_keeps_the_lock(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lock, held = FileLock("stage.lock"), []
    lock.acquire()
    number = lock._context.lock_file_fd  # of this thread

    def kill() -> None:
        os.close(number)  # as the system does for a process that is killed
        try:
            FileLock("stage.lock").acquire(blocking=False).lock.release()
        except Timeout:
            held.append(True)
        Path("go").touch()

    killer = when_begun(kill)
    with open("log.txt", "w") as log:
        run._call([sys.executable, "-c", CHILD], log, lock)
    killer.join()
    lock._context.lock_file_fd = None
    assert held == [True]


def test_slurm_writes_an_array_whose_tasks_are_the_cells(runs):
    out = Path.cwd() / "my runs"
    assert runs(plan(), "--slurm", "--output", out.name) == []
    script = Path(out, "sweep.sbatch").read_text()
    for option in ("array=0-7", f"chdir={Path.cwd()}", "signal=B:USR1@300"):
        assert f"#SBATCH --{option}\n" in script
    (call,) = [line for line in script.splitlines() if line.startswith("exec ")]
    words = shlex.split(call.replace("$SLURM_ARRAY_TASK_ID", "5"))
    assert words[1:6] == [sys.executable, "-m", "dar_lightning", "sweep", str(out / "sweep.yaml")]
    main(words[4:])
    out.rename("out")
    assert [cell(f"K=1,size={size}", 1)["status"] for size in ("L", "S")] == ["done", "pending"]


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
        ({"stages": {"a": Stage("export", [], {"x": "{b}"}), "b": Stage("export")}}, r"a has \{b\}, which is no axis"),
        ({"stages": {"K": Stage("export")}}, "K is the name of an axis too"),
    ],
)
def test_mistakes_in_a_sweep_file(changes, words):
    settings = plan() | {"stages": {"a": Stage("export")}} | changes
    refused(words, Sweep, **settings)


def test_mistakes_are_one_line(runs, capsys):
    for settings, options, words in (
        (plan(), ["--only", "[8]"], "only is [8]: this sweep has cells 0 to 7"),
        (plan(stages={"a": {"verb": "fly"}}), [], "verb is 'fly', choose from fit"),
        (plan(stages={"a": {"verb": "fit", "config": ["no.yaml"]}}), [], "config no.yaml cannot be read"),
        (plan(), ["--output", "other"], "other holds other files"),
    ):
        Path("other").mkdir(exist_ok=True)
        Path("other/mine.txt").touch()
        with pytest.raises(SystemExit, match="2"):
            runs(settings, *options)
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
    assert not Path("out").exists()


def test_of_a_table_the_first_row_is_the_cells_and_its_images_are_the_picture(tmp_path):
    """Where no stage makes one; rFD and gFD may both be of one cell."""
    works = [Work(task, "table", (f"--task={task}",), {}, "0") for task in ("generate", "reconstruct")]
    for number, work in enumerate(works):
        row = {"metrics": {"FD-x": {"mean": number}, "psnr": {"mean": 9}}, "seeds": [3], "protocol": {"n": number}}
        place = tmp_path / work.folder
        (place / "row0/seed3").mkdir(parents=True)
        (place / "table.json").write_text(json.dumps({"rows": [row, {}]}))
        np.savez(place / "row0/seed3/samples.npz", arr_0=np.zeros((9, 8, 8, 3), np.uint8))
    run._collect(works, tmp_path, tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["figures"] == {"gFD-x": 0, "psnr": 9, "rFD-x": 1}
    assert metrics["stages"] == {"gFD-x": "generate", "psnr": "reconstruct", "rFD-x": "reconstruct"}
    assert metrics["protocol"] == {"generate": {"n": 0}, "reconstruct": {"n": 1}}
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.width > 2 * 8, "a block of them"


def test_from_idea_to_report(tmp_path, monkeypatch, capsys):
    """A study of two orders, of which one is none, by the real verbs, in this process; `dar report` reads it."""

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
    real = {"reference": "images", "features": "color_edges"}
    callbacks = {
        "LastStepCheckpoint": {"save_last": True, "save_top_k": 0, "every_n_train_steps": 1},
        "GenerationFID": {"tokenizer": "tokenizer", "num_samples": 4} | real,
    }
    layer = [{"class_path": name, "init_args": values} for name, values in callbacks.items()]
    Path("ar.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": layer}}))
    options["seed_everything"] = "{seed}"
    draw = {"tokenizer": "tokenizer", "ar": "{ar}/checkpoints/last.ckpt", "per_class": 2, "seed": "{seed}"}
    table = {"title": "t", "task": "reconstruct", "rows": [{"solver": "euler"}], "pipeline": "tokenizer"}
    settings = {
        "name": "order",
        "figures": ["val/loss", "FD-color_edges"],
        "grid": {"order": ["random_per_sample", "sideways"]},
        "stages": {
            "ar": {"verb": "fit", "config": ["ar.yaml"], "options": options},
            "draw": {"verb": "sample", "options": draw},
            "measure": {"verb": "evaluate", "options": {"samples": "{draw}/samples.npz"} | real},
            "rfd": {"verb": "table", "options": table | real},
        },
    }
    Path("sweep.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    with pytest.raises(SystemExit, match="1"):
        main(["sweep", "sweep.yaml"])
    root = Path("runs/sweeps/order")
    states = {path.parts[-3]: json.loads(path.read_text())["status"] for path in root.glob("cells/*/*/cell.json")}
    assert states == {"order=sideways": "failed", "order=random_per_sample": "done"}
    assert not (root / "cells/order=sideways/seed0/metrics.json").exists()
    folder = root / "cells/order=random_per_sample/seed0"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"groups/val_entropy_3", "written/val_loss_0"} <= set(metrics["figures"])
    measured_by = {"val/gFD-color_edges": "ar", "FD-color_edges": "measure", "rFD-color_edges": "rfd"}
    assert metrics["stages"].items() >= measured_by.items()
    assert metrics["protocol"]["measure"]["samples"]["n"] == 2 * len(CLASSES)
    assert metrics["protocol"]["ar, val/gFD-color_edges"]["samples"]["n"] == 4
    assert (folder / "samples.png").stat().st_size > 0
    work = root / json.loads((folder / "cell.json").read_text())["stages"][0]["folder"]
    resolved = yaml.safe_load((work / "config.yaml").read_text())
    assert resolved["model"]["init_args"]["config"]["order"] == "random_per_sample"
    assert list((work / "tensorboard").glob("events.out.*"))

    capsys.readouterr()
    main(["report", str(root)])
    one = read_sweep(root).cells[0]
    [stage], loss = one.stages("ar"), one.runs[0].metrics["val/loss"]
    assert loss == stage.scalars["val/loss"].values[-1], "the last validation's"
    assert f"| random_per_sample | 1 | {loss:.4g} |" in capsys.readouterr().out
    assert {"figures.png", "samples.jpg"} <= {path.name for path in (root / "report").iterdir()}
