"""A checkpoint cannot attack: no code of its own runs, and the user reads one line."""

import argparse
import contextlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dar_lightning.ar.config import ARConfig
from dar_lightning.ar.model import ARModel
from dar_lightning.cli import main
from dar_lightning.commands.convert import convert
from dar_lightning.commands.export import export
from dar_lightning.errors import UserError
from dar_lightning.formats.checkpoint import PickledConfig, read_checkpoint
from dar_lightning.formats.pretrained import WEIGHTS_NAME


class Reduced:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Stateful(Reduced):
    """Pickles as an innocent object whose state is a call."""

    def __reduce__(self):
        return (OrderedDict, (), {"attribute": Reduced(*self.call[:1], *self.call[1])})


def as_official_config(content) -> object:
    """An instance of the official code's own class, holding anything."""
    module = types.ModuleType("config_util")
    module.Config = type("Config", (), {"__module__": "config_util"})
    sys.modules["config_util"] = module
    config = module.Config()
    config._data = content
    return config


def with_storage_type(path: Path, call: Reduced) -> None:
    """A zip checkpoint whose call hides where a tensor's storage type belongs."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", call, "0", "cpu", 1) if obj == "storage here" else None

    torch.save({"x": torch.zeros(1)}, path)
    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump({"model": "storage here"})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, stream.getvalue() if name.endswith("data.pkl") else content)


def attacks(marker: Path) -> dict:
    """Name -> function that writes a malicious file; any of them, obeyed, creates `marker`."""
    shell, code = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    system = Reduced(os.system, shell)
    return {
        "os_system": lambda p: torch.save(system, p),
        "builtins_eval": lambda p: torch.save({"model": Reduced(eval, f"__import__('os').system({shell!r})")}, p),
        "builtins_exec_deep_in_the_optimizer": lambda p: torch.save(
            {"model": {"x": torch.zeros(1)}, "optimizer": {"state": [{0: {"m": Reduced(exec, code)}}]}}, p
        ),
        "subprocess": lambda p: torch.save({"ema": Reduced(subprocess.call, ["touch", str(marker)])}, p),
        "getattr_chain": lambda p: torch.save({"x": Reduced(getattr, Reduced(__import__, "os"), "system")}, p),
        "state_of_an_ordered_dict": lambda p: torch.save({"model": Stateful(os.system, shell)}, p),
        "attribute_of_the_admitted_namespace": lambda p: torch.save({"args": argparse.Namespace(lr=system)}, p),
        "inside_the_admitted_config": lambda p: torch.save({"config": as_official_config({"model": system})}, p),
        "storage_type": lambda p: with_storage_type(p, system),
        "plain_pickle": lambda p: p.write_bytes(pickle.dumps(system)),
        "protocol_0_pickle": lambda p: p.write_bytes(b"cposix\nsystem\n(S'" + shell.encode() + b"'\ntR."),
        "torch_before_1_6": lambda p: torch.save({"x": system}, p, _use_new_zipfile_serialization=False),
        "another_namespace": lambda p: torch.save({"args": types.SimpleNamespace(lr=1)}, p),
        "whole_module": lambda p: torch.save(torch.nn.Linear(2, 2), p),
    }


@pytest.fixture(autouse=True)
def _official_class_is_not_importable():
    yield
    sys.modules.pop("config_util", None)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "code_ran"


@pytest.mark.parametrize("name", list(attacks(Path("unused"))))
def test_malicious_pickles_run_nothing(name, tmp_path, marker, monkeypatch):
    # Nor does the environment open a way around.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.delitem(sys.modules, "config_util", raising=False)
    file = tmp_path / "attack.pt"
    attacks(marker)[name](file)
    for read in (read_checkpoint, lambda f: convert(f, tmp_path / "out"), lambda f: export(f, tmp_path / "out")):
        with pytest.raises(UserError) as refusal:
            read(file)
        message = str(refusal.value)
        assert str(file) in message
        assert "\n" not in message
        assert "weights_only" not in message, "no advice to run the file's code after all"
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["os_system", "builtins_eval", "builtins_exec_deep_in_the_optimizer", "storage_type"])
def test_the_attacks_are_real(name, tmp_path, marker):
    attacks(marker)[name](tmp_path / "attack.pt")
    with contextlib.suppress(Exception):
        torch.load(tmp_path / "attack.pt", weights_only=False)
    assert marker.exists()


def test_the_refusal_names_what_the_file_wanted(tmp_path, marker):
    attacks(marker)["builtins_eval"](tmp_path / "attack.pt")
    with pytest.raises(UserError, match=r"names (builtins\.)?eval"):
        read_checkpoint(tmp_path / "attack.pt")


def test_admitted_names_are_stand_ins_and_admitted_for_one_load_only(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "config_util", raising=False)
    torch.save({"args": argparse.Namespace(lr=1.0), "config": as_official_config({"a": 1})}, tmp_path / "x.pt")
    before = set(torch.serialization.get_safe_globals())
    read = read_checkpoint(tmp_path / "x.pt")
    assert set(torch.serialization.get_safe_globals()) == before
    assert not isinstance(read["args"], argparse.Namespace)
    assert read["args"].lr == 1.0
    assert read["config"]._data == {"a": 1}
    assert isinstance(read["config"], PickledConfig)
    assert vars(PickledConfig).keys() <= {"__module__", "__dict__", "__weakref__", "__doc__"}, "it does nothing"


def test_a_pickle_called_safetensors(tmp_path, marker):
    (tmp_path / "x.safetensors").write_bytes(pickle.dumps(Reduced(os.system, f"touch {marker}")))
    with pytest.raises(UserError, match=r"x\.safetensors"):
        read_checkpoint(tmp_path / "x.safetensors")
    assert not marker.exists()


# ---- broken files


def header(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


def entry(shape, offsets, dtype="F32") -> bytes:
    return json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


BROKEN_SAFETENSORS = {
    "empty": b"",
    "oversized_header": header(b"{}", 2**62),
    "header_of_200_MB_claimed": header(b"{}" + b" " * 100, 200_000_000),
    "header_longer_than_the_file": header(b"{}", 50),
    "header_not_json": header(b"not json"),
    "offsets_beyond_the_end": header(entry([1000], [0, 4000])) + b"\0" * 8,
    "shape_of_another_size": header(entry([10**9, 10**9], [0, 8])) + b"\0" * 8,
    "negative_shape": header(entry([-1], [0, 8])) + b"\0" * 8,
    "unknown_dtype": header(entry([2], [0, 8], "X99")) + b"\0" * 8,
}


@pytest.fixture
def folder(tmp_path):
    ARModel(ARConfig.preset("tiny")).save_pretrained(tmp_path / "ar")
    return tmp_path / "ar"


@pytest.mark.parametrize("name", BROKEN_SAFETENSORS)
def test_broken_safetensors(name, folder, tmp_path):
    (folder / WEIGHTS_NAME).write_bytes(BROKEN_SAFETENSORS[name])
    for read in (ARModel.from_pretrained, lambda f: convert(f / WEIGHTS_NAME, tmp_path / "out")):
        with pytest.raises(UserError, match=WEIGHTS_NAME) as refusal:
            read(folder)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files(keep, folder, tmp_path):
    torch.save({"model": {"x": torch.zeros(1000)}}, tmp_path / "x.pt")
    for path, read in (
        (tmp_path / "x.pt", read_checkpoint),
        (folder / WEIGHTS_NAME, lambda p: ARModel.from_pretrained(p.parent)),
    ):
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content))])
        with pytest.raises(UserError, match=path.name) as refusal:
            read(path)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers(value, folder):
    tensors = load_file(folder / WEIGHTS_NAME)
    tensors["norm.weight"][7] = value
    save_file(tensors, folder / WEIGHTS_NAME)
    with pytest.raises(UserError, match=r"norm\.weight holds NaN or infinity"):
        ARModel.from_pretrained(folder)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), "text", None])
def test_files_without_a_dictionary(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="need a dictionary"):
        read_checkpoint(tmp_path / "x.pt")


def test_tensors_that_claim_more_than_the_file_holds(tmp_path):
    """A view of stride 0 claims a petabyte; nothing may touch its values before its shape is refused."""
    state = {"cls_embedding.embedding_table.weight": torch.zeros(1, 1).expand(10**7, 10**8)}
    torch.save(state | {"tok_embeddings.weight": torch.zeros(64, 768)}, tmp_path / "x.pt")
    with pytest.raises(UserError):
        convert(tmp_path / "x.pt", tmp_path / "out")


# ---- through the command line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("attack", "system"),
        (BROKEN_SAFETENSORS["oversized_header"], "header"),
        (BROKEN_SAFETENSORS["offsets_beyond_the_end"], "x.safetensors"),
        ("nan", "tok_embeddings.weight holds NaN"),
    ],
    ids=["attack", "oversized_header", "truncated", "nan"],
)
def test_one_line_and_status_2(content, said, tmp_path, marker, official_state, official_config, capsys):
    file = tmp_path / ("attack.pt" if content == "attack" else "x.safetensors")
    (tmp_path / "official.yaml").write_text(json.dumps(official_config("ar_a")["model"]))
    if content == "attack":
        attacks(marker)["os_system"](file)
    elif content == "nan":
        state = official_state("ar_a")
        state["tok_embeddings.weight"][3, 3] = torch.nan
        save_file(state, file)
    else:
        file.write_bytes(content)
    options = ["--input", str(file), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main(["convert", *options, "--part", "ar", "--official_config", str(tmp_path / "official.yaml")])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert said in printed
    assert not marker.exists()
    assert not (tmp_path / "out").exists()
