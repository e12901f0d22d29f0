"""`dar compare`, figure by figure: what changes a number stands in the way, and nothing else."""

import copy
import re

import pytest

from dar_lightning.commands.compare import compare
from dar_lightning.errors import UserError
from dar_lightning.records.protocol import write_figures

NETWORK = {"name": "net", "sha256": "f" * 64, "resize": "none", "dim": 4}
PAIRS = {"images": "uint8", "data_range": 255, "psnr": "mean", "ssim": "mean"}
BASE = {
    "samples": {"npz": "a.npz", "n": 20, "sha256": "1" * 64, "seed": 0},
    "reference": {"shards": "val", "crop": "ADM centre crop to 16", "n": 30, "sha256": "2" * 64},
    "image_size": [16, 16],
    "features": NETWORK,
    "frechet": "float64",
    "provenance": {"code": {"commit": "a"}, "versions": {"torch": "2.0"}},
}
FULL = {"kernel_distance": "cubic", "precision_recall": "3 neighbours"}
FULL_FIGURES = {"FD-net": 1.0, "KD-net": 0.1, "precision-net": 0.5, "recall-net": 0.6}


@pytest.fixture
def written(tmp_path):
    """Writes figures under BASE with changes, named by their path in it; gives the file's name."""
    count = 0

    def write(metrics: dict, **changes) -> str:
        nonlocal count
        count += 1
        protocol = copy.deepcopy(BASE)
        for path, value in changes.items():
            *parents, last = path.split("__")
            inner = protocol
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[last] = value
        write_figures(tmp_path / f"{count}.json", metrics, protocol)
        return str(tmp_path / f"{count}.json")

    return write


def table(capsys, *files: str) -> tuple[list[str], list[list[str]], list[str]]:
    """Headings, values of each file, and the lines on what was left out."""
    compare(",".join(files))
    head, *lines = capsys.readouterr().out.splitlines()
    return head.split(), [line.split()[1:] for line in lines[: len(files)]], lines[len(files) :]


def refusal(*files: str) -> str:
    with pytest.raises(UserError) as caught:
        compare(",".join(files))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"samples__seed": 5, "samples__npz": "b.npz", "samples__sha256": "9" * 64, "samples__guidance": 3.0},
        {"provenance__code": {"commit": "b"}, "versions": {"torch": "1.9"}},  # as files had them before
        {"reference": {"folder": "elsewhere", "crop": "none", "n": 30, "sha256": "2" * 64}},
        {"reconstruction": PAIRS, "probe": {"classifier": "logistic"}, **FULL},
        {
            "reference": {
                "npz": "statistics.npz",
                "n": 30,
                "statistics": "mu and sigma as stored",
                "statistics_sha256": "3" * 64,
                "statistics_of": {"shards": "val", "crop": "none", "n": 30, "sha256": "2" * 64},
            }
        },
    ],
    ids=["samples", "provenance", "place and crop", "more figures", "stored statistics of the same images"],
)
def test_what_does_not_change_the_number_is_no_obstacle(written, capsys, changes):
    found = table(capsys, written({"FD-net": 1.0}), written({"FD-net": 2.0}, **changes))
    assert found == (["FD-net"], [["1.0000"], ["2.0000"]], [])


def test_provenance_is_no_obstacle_for_a_figure_of_ones_own(written, capsys):
    """Which depends on all of a protocol that says how it was measured."""
    change = {"provenance__code": {"commit": "b"}, "versions": {"torch": "1.9"}}
    found = table(capsys, written({"own": 1.0}), written({"own": 2.0}, **change))
    assert found == (["own"], [["1.0000"], ["2.0000"]], [])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"samples__n": 19}, "samples.n: 20, 19"),
        ({"image_size": [32, 32]}, "image_size: [16, 16], [32, 32]"),
        ({"features__sha256": "e" * 64}, f"features.sha256: {'f' * 12}, {'e' * 12}"),
        ({"features__resize": "area"}, "features.resize: none, area"),
        ({"frechet": "float32"}, "frechet: float64, float32"),
        (
            {"reference__sha256": "4" * 64, "reference__n": 31},
            f"reference.n: 30, 31; reference.sha256: {'2' * 12}, {'4' * 12}",
        ),
        (
            {"reference": {"npz": "VIRTUAL.npz", "n": None, "statistics": "", "statistics_sha256": "3" * 64}},
            "reference",
        ),
        ({"samples__n": 19, "frechet": "float32"}, "frechet: float64, float32; samples.n: 20, 19"),
    ],
)
def test_what_changes_the_number_is_named_all_of_it(written, changes, says):
    one, two = written({"FD-net": 1.0}), written({"FD-net": 2.0}, **changes)
    assert refusal(one, two).startswith(f"--files: no figure can be compared: {one} and {two} differ in {says}")


def test_a_figure_that_differs_does_not_take_the_others_along(written, capsys):
    one = written(FULL_FIGURES, **FULL)
    two = written({**FULL_FIGURES, "FD-net": 2.0}, **FULL | {"precision_recall": "5 neighbours"})
    plain = written({"FD-net": 3.0})
    heads, values, left = table(capsys, one, two)
    assert (heads, values) == (["FD-net", "KD-net"], [["1.0000", "0.1000"], ["2.0000", "0.1000"]])
    reason = f"{one} and {two} differ in precision_recall: 3 neighbours, 5 neighbours"
    assert left == [f"{name}-net is left out: {reason}" for name in ("precision", "recall")]
    heads, values, left = table(capsys, one, two, plain)
    assert (heads, values) == (["FD-net"], [["1.0000"], ["2.0000"], ["3.0000"]])
    assert left[0] == f"KD-net is left out: {plain} does not have KD"


def test_the_callbacks_names_are_the_same_figures(written, capsys):
    one = written({"FD-net": 1.0, "psnr": 20.0, "ssim": 0.5}, reconstruction=PAIRS)
    two = written({"rFD-net": 2.0, "rPSNR": None, "rSSIM": 0.25}, reconstruction=PAIRS)
    heads, values, left = table(capsys, two, one)
    assert (heads, left) == (["FD-net", "rPSNR", "rSSIM"], [])
    assert values == [["2.0000", "infinite", "0.2500"], ["1.0000", "20.0000", "0.5000"]]


def test_stored_statistics_serve_the_distance_and_images_the_rest(written, capsys):
    """As ADM's reference batch, which has statistics of all images and 10,000 of these."""
    adm = {"npz": "V.npz", "n": None, "statistics": "", "statistics_sha256": "3" * 64, "sha256": "2" * 64}
    with_statistics = written(FULL_FIGURES, reference=adm, **FULL)
    with_images = written(FULL_FIGURES, **FULL)
    heads, _, (left,) = table(capsys, with_statistics, with_images)
    assert heads == ["KD-net", "precision-net", "recall-net"]
    assert re.search(r"FD-net is left out: .* reference.statistics_sha256: 3{12}, None", left)


def test_inception_score_asks_for_no_reference(written, capsys):
    one = written({"IS": 3.0, "IS_std": 0.1}, IS="10 splits")
    two = written({"IS": 4.0, "IS_std": 0.2}, IS="10 splits", reference__sha256="4" * 64)
    assert table(capsys, one, two)[0] == ["IS", "IS_std"]


def test_images_that_nothing_identifies_are_not_taken_for_equal(written):
    files = [written({"FD-net": value}, reference={"shards": "val", "n": 30}) for value in (1.0, 2.0)]
    assert refusal(*files).endswith("differ in reference.sha256: written down in neither")


def test_an_unknown_figure_depends_on_everything(written, capsys):
    one, two = written({"new": 1.0}, method="x"), written({"new": 2.0}, method="y")
    assert "method: x, y" in refusal(one, two)
    assert table(capsys, one, written({"new": 2.0}, method="x"))[0] == ["new"]
