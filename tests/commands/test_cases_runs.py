"""Nothing lost: a run has its folder to itself, trains with what it announces, and says no to what would harm it."""

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from refusals import refusal, refused
from tiny_models import fit_ar, fit_tokenizer, options, write_images, write_tokens

from dar_lightning.cli import main
from dar_lightning.devices import check_srun, check_started_processes
from dar_lightning.files import check_keys, load_yaml, locked
from dar_lightning.training import module

SAVES = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true", "--ckpt_path=last"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> str:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "x", 8)


def command(tokens: str, folder: Path, *more: str, **trainer) -> list[str]:
    return [*(str(word) for word in fit_ar(tokens, tokens, folder, limit_val_batches=0, **trainer)), *more]


@pytest.fixture(scope="module")
def finished(tokens, tmp_path_factory) -> Path:
    """The folder of a run of one step."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    main(command(tokens, folder, *SAVES, max_steps=1))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def last(folder: Path) -> dict:
    return torch.load(max((folder / "checkpoints").glob("last*.ckpt"), key=lambda path: path.stat().st_mtime_ns))


def step(folder: Path) -> int:
    return last(folder)["global_step"]


# ---- a saved config with another folder


def of_an_earlier_version(config: dict, root: Path) -> None:
    """Those named the folders that they had chosen."""
    place = {"save_dir": str(root), "name": "", "version": "logs"}
    config["trainer"]["logger"] = {"class_path": "dar_lightning.training.loggers.TensorBoard", "init_args": place}
    config["trainer"]["callbacks"][0]["init_args"]["dirpath"] = str(root / "checkpoints")


@pytest.mark.parametrize("kind", ["today's", "an earlier version's", "with logger true", "from its checkpoint"])
def test_a_saved_config_with_another_folder_is_another_run(kind, finished, tmp_path):
    config = yaml.safe_load((finished / "logs" / "config.yaml").read_text())
    assert config["trainer"]["logger"] in (None, True)
    assert config["trainer"]["callbacks"][0]["init_args"]["dirpath"] is None
    file = finished / "checkpoints" / "last.ckpt"
    more = {"with logger true": ["--trainer.logger=true"]}.get(kind, [])
    more = [f"--ckpt_path={file}", "--trainer.max_steps=2"] if "checkpoint" in kind else more
    if "earlier" in kind:
        of_an_earlier_version(config, finished)
    (tmp_path / "saved.yaml").write_text(yaml.safe_dump(config))
    before, new = contents(finished), tmp_path / "b"
    main(["fit", f"--config={tmp_path / 'saved.yaml'}", f"--trainer.default_root_dir={new}", *more])
    assert contents(finished) == before
    assert step(new) == (2 if "checkpoint" in kind else 1)
    assert list((new / "logs").glob("events.*"))
    made = yaml.safe_load((new / "logs" / "config.yaml").read_text())["trainer"]
    assert made["default_root_dir"] == str(new)
    assert str(finished) not in yaml.safe_dump(made)
    main(["fit", f"--config={new / 'logs' / 'config.yaml'}", "--trainer.max_steps=3", "--ckpt_path=last"])
    assert (step(new), contents(finished)) == (3, before), "with its own folder, it goes on"


def test_a_layer_that_changes_the_folder_only(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = contents(finished)
    layers = [finished / "logs" / "config.yaml", "experiments/debug/overfit.yaml"]
    main(["fit", *(f"--config={layer}" for layer in layers), "--trainer.max_steps=1"])
    assert contents(finished) == before
    assert (tmp_path / "runs" / "debug" / "logs" / "config.yaml").is_file()


# ---- one run per folder


def hold(folder: Path, ready) -> None:
    with locked(folder, "output"):
        ready.set()
        time.sleep(300)


@pytest.mark.parametrize("place", ["root", "checkpoints elsewhere"])
def test_a_second_run_in_a_folder_is_refused_while_the_first_one_lives(place, tokens, tmp_path, capsys):
    processes, shared = multiprocessing.get_context("fork"), tmp_path / "shared"
    ready = processes.Event()
    other = processes.Process(target=hold, args=(shared, ready))
    other.start()
    try:
        assert ready.wait(60)
        own = tmp_path / "own"
        words = command(tokens, shared if place == "root" else own, *SAVES, max_steps=1)
        words += [] if place == "root" else [f"--trainer.callbacks.dirpath={shared}"]
        before = contents(shared)
        assert f"another process is writing to {shared}" in refusal(capsys, words)
        assert contents(shared) == before
        assert not (own / "logs").exists()
        main(command(tokens, tmp_path / "third", *SAVES, max_steps=1))
    finally:
        other.kill()  # without a chance to clean up
        other.join(60)
    main(words)
    assert list(shared.rglob("last.ckpt"))


def test_reading_a_run_needs_no_lock(finished, tokens, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "a")
    with locked(folder, "output"):
        main(["validate", *command(tokens, folder, *SAVES)[1:], "--trainer.limit_val_batches=1"])


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    class Lock:
        def __init__(self, path):
            pass

        def acquire(self, blocking):
            raise OSError(37, os.strerror(37))  # ENOLCK: NFS without its lock server

    monkeypatch.setattr("dar_lightning.files.FileLock", Lock)
    with locked(tmp_path, "output"):
        assert "has no locks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "world_size", "launcher"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2"}, 1, "srun"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, 2, "srun"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 1, "mpirun"),
        ({"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, 1, "torchrun"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, 2, None),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_NAME": "bash"}, 1, None),  # srun --pty
        ({"SLURM_NTASKS": "2"}, 1, None),  # see check_srun
        ({"SLURM_NTASKS": "1"}, 2, "SLURM"),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "interactive"}, 2, None),
        ({"SLURM_NTASKS": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, 2, None),
        ({"WORLD_SIZE": "2"}, 1, None),
    ],
)
def test_several_processes_that_would_each_be_a_run(variables, world_size, launcher, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if launcher is None:
        check_started_processes(world_size, "devices")
        return
    refused(
        f"^devices make {world_size} process.*{launcher} has started", check_started_processes, world_size, "devices"
    )


@pytest.mark.parametrize(
    ("variables", "wrong"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, True),  # a script of sbatch
        ({"SLURM_NTASKS": "1"}, True),  # a shell of salloc
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, False),
        ({"SLURM_NTASKS": "2", "TORCHELASTIC_RUN_ID": "x"}, False),
    ],
)
def test_tasks_of_slurm_that_srun_has_not_started(variables, wrong, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if wrong:
        refused("write srun before dar", check_srun)
    else:
        check_srun()


def test_processes_that_lightning_starts_within_slurm(tokens, tmp_path, monkeypatch):
    """Where the config says so, SLURM's numbers are not asked."""
    monkeypatch.setenv("SLURM_NTASKS", "2")
    words = command(tokens, tmp_path / "run", *SAVES, max_steps=1)
    main([*words, "--trainer.plugins=lightning.pytorch.plugins.environments.LightningEnvironment"])
    assert step(tmp_path / "run") == 1
    monkeypatch.setenv("SLURM_NTASKS", "1")
    check_started_processes(2, "devices", slurm=False)


class Notice(Callback):
    """The notice of SLURM's time limit, while a run is still being prepared."""

    def on_sanity_check_start(self, trainer, pl_module):
        os.kill(os.getpid(), signal.SIGUSR1)


def test_a_notice_before_the_first_step(tokens, tmp_path, monkeypatch, capsys):
    for name in ("SLURM_NTASKS=1", "SLURM_PROCID=0", "SLURM_LOCALID=0", "SLURM_NODEID=0", "SLURM_JOB_ID=1"):
        monkeypatch.setenv(*name.split("="))
    words = [str(word) for word in fit_ar(tokens, tokens, tmp_path / "run", num_sanity_val_steps=1)]
    with pytest.raises(SystemExit) as stop:
        main([*words, *SAVES, f"--trainer.callbacks+={__name__}.Notice"])
    assert stop.value.code == 2
    said = "dar fit: SIGUSR1 came before the first step, nothing is saved; SLURM's --time must be longer"
    assert sum(line.startswith(said) for line in capsys.readouterr().err.splitlines()) == 1
    assert list(tmp_path.rglob("*.ckpt")) == []
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_srun_with_two_tasks_and_one_device(tokens, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert "srun has started 2" in refusal(capsys, command(tokens, tmp_path / "run", *SAVES))
    assert not (tmp_path / "run").exists()


# ---- options that are announced


def test_a_resumed_run_trains_with_the_options_that_it_announces(tokens, tmp_path, monkeypatch):
    """As from a checkpoint that says the same; the plan's line and config.yaml are then true."""
    said = []
    monkeypatch.setattr(module, "rank_zero_info", said.append)
    old = {"lr": 0.01, "weight_decay": 0.1, "betas": "[0.9,0.95]", "warmup_steps": 5}
    new = {"lr": 0.04, "weight_decay": 0.3, "betas": "[0.8,0.9]", "warmup_steps": 5}

    def run(folder: Path, values: dict, steps: int) -> dict:
        words = options("model.init_args.optimizer", values)
        main(command(tokens, folder, *SAVES, *words, max_steps=steps))
        return last(folder)

    first = run(tmp_path / "a", old, 2)
    for name in "bc":
        shutil.copytree(tmp_path / "a", tmp_path / name)
    kept = run(tmp_path / "a", old, 4)
    assert said == []
    found = run(tmp_path / "b", new, 4)
    assert [line.split(" ")[0] for line in said] == ["optimizer.betas", "optimizer.weight_decay", "optimizer.lr"]
    assert said[-1] == "optimizer.lr was 0.01 in the checkpoint and is 0.04 from step 2 on"
    matrices, others = found["optimizer_states"][0]["param_groups"]
    assert (matrices["initial_lr"], tuple(matrices["betas"]), matrices["weight_decay"]) == (0.04, (0.8, 0.9), 0.3)
    assert (tuple(others["betas"]), others["weight_decay"]) == ((0.8, 0.9), 0.0)
    assert matrices["lr"] == pytest.approx(0.04 * 4 / 5)

    for group, decay in zip(first["optimizer_states"][0]["param_groups"], (0.3, 0.0), strict=True):
        group |= {"lr": 0.04 * (2 / 5), "initial_lr": 0.04, "betas": (0.8, 0.9), "weight_decay": decay}
    first["lr_schedulers"][0] |= {"base_lrs": [0.04, 0.04], "_last_lr": [0.04 * (2 / 5)] * 2}
    torch.save(first, tmp_path / "c" / "checkpoints" / "last.ckpt")
    expected = run(tmp_path / "c", new, 4)
    assert all(torch.equal(found["state_dict"][name], value) for name, value in expected["state_dict"].items())
    assert not all(torch.equal(found["state_dict"][name], value) for name, value in kept["state_dict"].items())


# ---- YAML


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("trainer:\n  max_steps: 1\nckpt_path: null\ntrainer:\n  devices: 1\n", "trainer", (1, 4)),
        ("trainer:\n  max_steps: 1\n  devices: 1\n  max_steps: 2\n", "max_steps", (2, 4)),
        ("trainer:\n  callbacks:\n  - {class_path: EMA, class_path: Other}\n", "class_path", (3, 3)),
    ],
)
def test_a_key_that_is_there_twice(text, key, lines, tokens, tmp_path, capsys):
    (tmp_path / "twice.yaml").write_text(text)
    words = command(tokens, tmp_path / "run", f"--config={tmp_path / 'twice.yaml'}")
    line = refusal(capsys, words)
    assert f"twice.yaml: '{key}' is there twice, in line {lines[0]} and in line {lines[1]}" in line
    assert not (tmp_path / "run").exists()


def test_other_places_of_yaml(tmp_path, capsys):
    twice = "samples: a\nreference: b\nsamples: c\n"
    (tmp_path / "twice.yaml").write_text(twice)
    assert "'samples' is there twice" in refusal(capsys, ["evaluate", f"--config={tmp_path / 'twice.yaml'}"])
    refused(r"^x.yaml: 'samples' is there twice", load_yaml, twice, "x.yaml")
    merged = "a: &a\n  x: 1\n  y: 2\nb:\n  <<: *a\n  x: 3\nc: *a\nd: [1, {x: 1}, {x: 2}]\n"
    assert load_yaml(merged, "x")["b"] == {"x": 3, "y": 2}, "a merge key may be overridden"
    check_keys("a: [", "what is no YAML is for whoever loads it")


# ---- URLs where something is written


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("shard", ["--input=x", "--output=s3://bucket/run"]),
        ("extract", ["--tokenizer=x", "--shards=x", "--output=gs://bucket/run"]),
        ("extract", ["--tokenizer=x", "--shards=http://127.0.0.1:9/x", "--output=o", "--cache_dir=s3://bucket/copies"]),
        ("quickstart", ["--output=s3://bucket/run"]),
        ("report", ["--sweep=x", "--output=s3://bucket/run"]),
        ("sample", ["--pipeline=x", "--output=s3://bucket/run"]),
        ("evaluate", ["--samples=x", "--reference=x", "--output=https://host/x.json"]),
        ("evaluate", ["--samples=x", "--reference=x", "--save_statistics=s3://bucket/x.npz"]),
        ("reconstruct", ["--tokenizer=x", "--shards=x", "--output=s3://bucket/run"]),
        ("export", ["--ckpt=x", "--output=s3://bucket/run"]),
        ("convert", ["--input=x", "--output=s3://bucket/run"]),
    ],
)
def test_a_url_to_write_to_is_one_line(verb, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "is a URL; give a folder" in refusal(capsys, [verb, *words])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ["http://127.0.0.1:9/x", "s3://bucket/x"])
def test_a_url_that_cannot_be_read_from_says_what_would_be_right(source, pipeline, tmp_path, monkeypatch, capsys):
    """Shards on a server are for `dar fit` and `dar extract`."""
    monkeypatch.chdir(tmp_path)
    words = [f"--tokenizer={pipeline}/tokenizer", f"--shards={source}", "--output=o", "--device=cpu"]
    assert f"shards: {source} is a URL" in refusal(capsys, ["reconstruct", *words])
    words = ["--samples=x", f"--reference={source}", "--features=color_edges", "--device=cpu"]
    assert f"--reference: {source} does not exist; give" in refusal(capsys, ["evaluate", *words])
    assert not list(tmp_path.iterdir())


def test_a_url_to_train_in_is_one_line(tokens, tmp_path, monkeypatch, capsys):
    """The root; checkpoints alone may go to a URL."""
    monkeypatch.chdir(tmp_path)
    line = refusal(capsys, command(tokens, "run", *SAVES, "--trainer.default_root_dir=s3://bucket/run"))
    assert "trainer.default_root_dir: s3://bucket/run is a URL" in line
    assert not list(tmp_path.iterdir())


# ---- sizes


@pytest.mark.parametrize("size", [16, 64])
def test_images_of_another_size_than_the_model(size, tmp_path, capsys):
    images = write_images(tmp_path / "images", 8)
    words = [*fit_tokenizer(images, images, tmp_path / "run"), f"--data.init_args.image_size={size}"]
    assert f"data.image_size is {size}, config.image_size 32" in refusal(capsys, words)
    assert not (tmp_path / "run").exists()
    assert "data.image_size" in refusal(capsys, ["validate", *words[1:]])
