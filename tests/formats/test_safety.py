"""A checkpoint cannot attack: no code of its own runs, and the user reads one line."""

import argparse
import contextlib
import io
import json
import os
import pickle
import struct
import subprocess
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from official import save_pt
from refusals import refusal, refused
from safetensors.torch import save_file
from tiny_models import make_ar

from dar_lightning.ar.model import ARModel
from dar_lightning.commands.convert import convert
from dar_lightning.commands.export import export
from dar_lightning.errors import UserError
from dar_lightning.formats.checkpoint import PickledConfig, read_checkpoint


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
        "inside_the_admitted_config": lambda p: save_pt(p, {"model": system}),
        "storage_type": lambda p: with_storage_type(p, system),
        "plain_pickle": lambda p: p.write_bytes(pickle.dumps(system)),
        "protocol_0_pickle": lambda p: p.write_bytes(b"cposix\nsystem\n(S'" + shell.encode() + b"'\ntR."),
        "torch_before_1_6": lambda p: torch.save({"x": system}, p, _use_new_zipfile_serialization=False),
        "another_namespace": lambda p: torch.save({"args": types.SimpleNamespace(lr=1)}, p),
        "whole_module": lambda p: torch.save(torch.nn.Linear(2, 2), p),
    }


@pytest.mark.parametrize("name", list(attacks(Path("unused"))))
def test_malicious_pickles_run_nothing(name, tmp_path, monkeypatch):
    # Nor does the environment open a way around.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    file, marker = tmp_path / "attack.pt", tmp_path / "code_ran"
    attacks(marker)[name](file)
    for read in (read_checkpoint, lambda f: convert(f, tmp_path / "out"), lambda f: export(f, output=tmp_path / "out")):
        with pytest.raises(UserError) as refusal:
            read(file)
        message = str(refusal.value)
        assert str(file) in message
        assert "\n" not in message
        assert "weights_only" not in message, "no advice to run the file's code after all"
        assert name != "builtins_eval" or "eval" in message, "what the file wanted"
    assert not marker.exists()
    assert not (tmp_path / "out").exists()
    if name in ("os_system", "builtins_eval", "builtins_exec_deep_in_the_optimizer", "storage_type"):
        with contextlib.suppress(Exception):
            torch.load(file, weights_only=False)
        assert marker.exists(), "the attack is real"


def test_admitted_names_are_stand_ins_and_admitted_for_one_load_only(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    read = read_checkpoint(save_pt(tmp_path / "x.pt", {"a": 1}))
    assert set(torch.serialization.get_safe_globals()) == before
    assert not isinstance(read["args"], argparse.Namespace)
    assert read["args"].lr == 2e-4
    assert read["config"]._data == {"a": 1}
    assert isinstance(read["config"], PickledConfig)
    assert vars(PickledConfig).keys() <= {"__module__", "__dict__", "__weakref__", "__doc__"}, "it does nothing"


def header(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


def entry(shape, offsets, dtype="F32") -> bytes:
    return json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        header(b"{}", 2**62),
        header(b"{}", 50),
        header(b"not json"),
        header(entry([1000], [0, 4000])) + b"\0" * 8,
        header(entry([10**9, 10**9], [0, 8])) + b"\0" * 8,
        header(entry([-1], [0, 8])) + b"\0" * 8,
        header(entry([2], [0, 8], "X99")) + b"\0" * 8,
        pickle.dumps(Reduced(os.system, "true")),
    ],
)
def test_broken_safetensors(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    refused(r"^.*x\.safetensors.*$", read_checkpoint, tmp_path / "x.safetensors")


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.999])
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_truncated_files(keep, name, tmp_path):
    path = tmp_path / name
    (torch.save if name == "x.pt" else save_file)({"x": torch.zeros(1000)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    refused(f"^.*{name}.*$", read_checkpoint, path)


def test_contents_that_are_no_weights(tmp_path):
    """No numbers; no dictionary; a view of stride 0 that claims a petabyte, which nothing may touch."""
    ar = make_ar()
    for value in (torch.nan, -torch.inf):
        ar.norm.weight.data[7] = value
        ar.save_pretrained(tmp_path)
        refused(r"norm\.weight holds NaN or infinity", ARModel.from_pretrained, tmp_path)
    for content in ([1, 2], torch.zeros(3), None):
        torch.save(content, tmp_path / "x.pt")
        refused("need a dictionary", read_checkpoint, tmp_path / "x.pt")
    state = {"cls_embedding.embedding_table.weight": torch.zeros(1, 1).expand(10**7, 10**8)}
    torch.save(state | {"tok_embeddings.weight": torch.zeros(64, 768)}, tmp_path / "x.pt")
    refused("no released size", convert, tmp_path / "x.pt", tmp_path / "out")


def test_through_the_command_line(tmp_path, capsys):
    attacks(tmp_path / "code_ran")["os_system"](tmp_path / "attack.pt")
    assert "system" in refusal(capsys, ["convert", "--input", tmp_path / "attack.pt", "--output", tmp_path / "out"])
    assert not (tmp_path / "code_ran").exists()
