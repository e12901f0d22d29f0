"""Protocols: which differences stand in a metric's way, and what `dar compare` prints."""

import copy
import json

import pytest

from dar_lightning.commands.compare import compare
from dar_lightning.errors import UserError
from dar_lightning.records.protocol import Protocol, read_metrics

NETWORK = {"name": "net", "sha256": "f" * 64, "resize": "none", "dim": 4}
PAIRS = {"images": "uint8", "data_range": 255, "psnr": "mean", "ssim": "mean"}
BASE = {
    "samples": {"npz": "a.npz", "n": 20, "sha256": "1" * 64, "seed": 0},
    "reference": {"shards": "val", "crop": "ADM centre crop to 16", "n": 30, "sha256": "2" * 64},
    "image_size": [16, 16],
    "features": NETWORK,
    "frechet": "float64",
    "kernel_distance": "cubic",
    "precision_recall": "3 neighbours",
    "IS": "10 splits",
    "reconstruction": PAIRS,
    "probe": {"train": {"npz": "t", "n": 9, "sha256": "5" * 64}, "classifier": "logistic"},
    "clip": {"model": "c", "sha256": "7" * 64},
    "clip_captions_sha256": {"samples": "8" * 64, "reference": "a" * 64},
    "token_influence": {"images": {"n": 7, "sha256": "6" * 64}, "psnr": "of 8 bits"},
    "provenance": {"code": {"commit": "a"}, "versions": {"torch": "2.0"}},
}
STORED = {"npz": "s.npz", "n": 30, "statistics": "as stored", "statistics_sha256": "3" * 64}
TOKENS = ("psnr_own_tokens", "psnr_exchanged_from_group_2")
DISTANCES, PAIRED = ("FD", "KD", "precision", "recall"), ("psnr", "ssim", "lpips")
CLIP, REAL = ("clip_score_samples", "clip_score_reference"), ("probe_accuracy_reference", "clip_score_reference")
METRICS = (*DISTANCES, *PAIRED, *TOKENS, "IS", "IS_std", "probe_accuracy_samples", REAL[0], *CLIP, "own")


def changed(**changes) -> dict:
    """BASE with some fields changed, named by their path in it."""
    protocol = copy.deepcopy(BASE)
    for path, value in changes.items():
        *parents, last = path.split("__")
        inner = protocol
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return protocol


CASES = [  # what changes, the metrics that it stands in the way of, and how it is named
    ({"samples__seed": 5, "samples__npz": "b.npz", "samples__sha256": "9" * 64, "samples__guidance": 3.0}, (), None),
    ({"provenance__code": {"commit": "b"}, "provenance__versions": {}}, (), None),
    ({"reference": {"folder": "x", "crop": "none", "n": 30, "sha256": "2" * 64}}, (), None),
    ({"samples__n": 19}, {*METRICS} - {*REAL}, {"samples.n": "20, 19"}),
    ({"image_size": [32, 32]}, METRICS, {"image_size": "[16, 16], [32, 32]"}),
    (
        {"features__sha256": "e" * 64},
        {*METRICS} - {*PAIRED, *TOKENS, *CLIP},
        {"features.sha256": f"{'f' * 12}, {'e' * 12}"},
    ),
    ({"frechet": "float32"}, ("FD", "own"), {"frechet": "float64, float32"}),
    ({"kernel_distance": "x"}, ("KD", "own"), {"kernel_distance": "cubic, x"}),
    ({"precision_recall": "x"}, ("precision", "recall", "own"), {"precision_recall": "3 neighbours, x"}),
    ({"IS": "x"}, ("IS", "IS_std", "own"), {"IS": "10 splits, x"}),
    ({"reconstruction__psnr": "x"}, ("psnr", "own"), {"reconstruction.psnr": "mean, x"}),
    ({"reconstruction__ssim": "x"}, ("ssim", "own"), {"reconstruction.ssim": "mean, x"}),
    ({"reconstruction__lpips": "x"}, ("lpips", "own"), {"reconstruction.lpips": "None, x"}),
    ({"reconstruction__data_range": 1}, ("psnr", "ssim", "own"), {"reconstruction.data_range": "255, 1"}),
    (
        {"probe__train__sha256": "0" * 64, "probe__train__npz": "elsewhere"},
        ("probe_accuracy_samples", "probe_accuracy_reference", "own"),
        {"probe.train.sha256": f"{'5' * 12}, {'0' * 12}"},
    ),
    ({"clip__model": "d", "clip__sha256": "0" * 64}, (*CLIP, "own"), {"clip.sha256": f"{'7' * 12}, {'0' * 12}"}),
    *(
        ({f"clip_captions_sha256__{name}": None}, (f"clip_score_{name}", "own"), {f"clip_captions_sha256.{name}": says})
        for name, says in (("samples", f"{'8' * 12}, None"), ("reference", f"{'a' * 12}, None"))
    ),
    ({"token_influence__images__n": 3}, (*TOKENS, "own"), {"token_influence.images.n": "7, 3"}),
    (
        {"reference__sha256": "4" * 64, "reference__n": 31},
        (*DISTANCES, *PAIRED, *REAL, "own"),
        {"reference.n": "30, 31", "reference.sha256": f"{'2' * 12}, {'4' * 12}"},
    ),
    # Stored statistics of the same images serve a Frechet distance; those that do not say of what serve none.
    ({"reference": STORED | {"statistics_of": BASE["reference"]}}, {*METRICS} - {"FD", *TOKENS, "IS", "IS_std"}, ...),
    ({"reference": STORED | {"sha256": "2" * 64}}, ("FD", "own"), {"reference.statistics_sha256": f"None, {'3' * 12}"}),
]


@pytest.mark.parametrize(("changes", "concerned", "says"), CASES, ids=[", ".join(case[0]) for case in CASES])
def test_a_difference_concerns_the_metrics_that_depend_on_it(changes, concerned, says):
    one, other = Protocol.from_json(BASE), Protocol.from_json(changed(**changes))
    found = {metric: one.differences(other, metric) for metric in METRICS}
    if says is ...:
        assert {metric for metric, fields in found.items() if fields} <= {*concerned}
        assert not found["FD"]
        assert found["KD"]
        return
    assert {metric for metric, fields in found.items() if fields} == {*concerned}
    for metric in concerned:
        assert says.items() <= found[metric].items()
    assert bool(one.differences(other)) == bool(concerned), "of the whole measurement"


def test_images_that_nothing_identifies_are_equal_within_a_study_alone():
    protocols = [Protocol.from_json(changed(reference={"shards": shards, "n": 30})) for shards in ("a", "a", "b")]
    assert protocols[0].differences(protocols[1], "FD") == {"reference.sha256": "written down in neither"}
    assert protocols[0].differences(protocols[1]) == {}
    assert protocols[0].differences(protocols[2]) == {"reference.shards": "a, b"}


def test_what_is_read_is_what_was_written():
    assert Protocol.from_json(BASE).to_json() == BASE


@pytest.fixture
def written(tmp_path):
    """Writes metrics under BASE with changes; gives the file's name."""

    def write(metrics: dict, **changes) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps({"metrics": metrics, "protocol": changed(**changes)}))
        return str(path)

    return write


def table(capsys, *files: str) -> tuple[list[str], list[list[str]], list[str]]:
    """Headings, values of each file, and the lines on what was left out."""
    compare(", ".join(files))
    head, *lines = capsys.readouterr().out.splitlines()
    return head.split(), [line.split()[1:] for line in lines[: len(files)]], lines[len(files) :]


def test_a_metric_that_differs_does_not_take_the_others_along(written, capsys):
    one = written({"FD-net": 1.0, "KD-net": 0.1, "recall-net": 0.6})
    two = written({"FD-net": 2.0, "KD-net": 0.1, "recall-net": 0.6}, precision_recall="5 neighbours")
    plain = written({"FD-net": 3.0})
    heads, values, left = table(capsys, one, two)
    assert (heads, values) == (["FD-net", "KD-net"], [["1.0000", "0.1000"], ["2.0000", "0.1000"]])
    assert left == [
        f"recall-net is left out: {one} and {two} differ in precision_recall: 3 neighbours, 5 neighbours",
    ]
    heads, values, left = table(capsys, one, two, plain)
    assert (heads, values) == (["FD-net"], [["1.0000"], ["2.0000"], ["3.0000"]])
    assert left[0] == f"KD-net is left out: {plain} does not have KD"


def test_the_callbacks_names_are_the_same_metrics(written, capsys):
    one, two = written({"FD-net": 1.0, "psnr": 20.0, "ssim": 0.5}), written({"rFD-net": 2.0, "rPSNR": None, "rSSIM": 1})
    heads, values, left = table(capsys, two, one)
    assert (heads, left) == (["FD-net", "rPSNR", "rSSIM"], [])
    assert values == [["2.0000", "infinite", "1.0000"], ["1.0000", "20.0000", "0.5000"]]
    protocol, names = read_metrics(one)[1], {"FID": "FD", "gFID": "FD", "KID_std": "KD_std", "rLPIPS": "lpips"}
    assert {name: protocol.common_name(name) for name in names} == names


def test_mistakes_are_one_line(written, tmp_path):
    one, two = written({"FD-net": 1.0}), written({"FD-net": 2.0}, samples__n=19, frechet="float32")
    (tmp_path / "list.json").write_text("[1]")
    for files, says in (
        ((one, two), f"can be compared: {one} and {two} differ in frechet: float64, float32; samples.n: 20, 19"),
        ((one,), "give two or more"),
        ((one, str(tmp_path / "none.json")), "none.json has no metrics and protocol (FileNotFoundError"),
        ((one, str(tmp_path / "list.json")), "list.json has no metrics and protocol (TypeError"),
    ):
        with pytest.raises(UserError) as caught:
            compare(",".join(files))
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)
