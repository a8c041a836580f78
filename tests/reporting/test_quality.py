"""The metrics of a set and the sheets to look at, on a dataset small enough to learn in seconds."""

import pytest
import torch
from PIL import Image

from ddkit.data.images import normalize
from ddkit.data.prepare import prepare
from ddkit.data.store import dataset_spec, load_dataset
from ddkit.errors import MissingDataError, UsageError
from ddkit.metrics.features import FeatureSettings
from ddkit.reporting.quality import measure_sets, quality_of, sets_at
from ddkit.sets.contact_sheet import contact_sheet, neighbor_sheet, side_by_side
from ddkit.sets.distilled import save_set

QUICK = FeatureSettings(images=80, epochs=2)


@pytest.fixture
def spots(tmp_path):
    """A prepared dataset of noise in two colors: 40 training images of each."""
    random = torch.Generator().manual_seed(0)
    for split, count in (("train", 40), ("test", 1)):
        for name, color in (("blue", (30, 60, 200)), ("red", (200, 60, 30))):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(-50, 50, (16, 16, 3), generator=random)
                pixels = (torch.tensor(color) + noise).clamp(0, 255).to(torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{i:02}.png")
    prepare("spots", tmp_path / "pictures")
    return "spots"


def save(path, dataset, images, **facts):
    spec = dataset_spec(dataset)
    save_set(path, normalize(images, spec), spec, facts)
    return path


@pytest.mark.slow
def test_copies_of_real_images_are_counted(spots, tmp_path):
    real = load_dataset(spots, "train")
    copies = save(tmp_path / "copies" / "spots.pt", spots, real.images[[0, 1, 2, 3, 40, 41, 42, 43]])
    noise = torch.randint(0, 255, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    made = save(tmp_path / "noise" / "spots.pt", spots, noise)
    measured = {path: quality_of(path, spots, QUICK) for path in (copies, made)}
    lines = {path: {metric: ours for metric, ours, *_ in one.rows} for path, one in measured.items()}
    assert lines[copies]["copies"] >= 0.5 and lines[made]["copies"] == 0
    assert lines[copies]["Frechet distance"] < lines[made]["Frechet distance"]
    one = measured[copies]
    assert one.name == "copies-spots" and one.images == 8
    assert one.sheets and all(picture.size[0] > 16 for _, _, picture in one.sheets)
    assert one.as_data()["lines"][0]["metric"] == "Frechet distance"


@pytest.mark.slow
def test_quality_of_a_set_finds_the_dataset_in_the_json_next_to_it(spots, tmp_path):
    path = save(tmp_path / "mine.pt", spots, load_dataset(spots, "train").images[[0, 1, 40, 41]])
    assert quality_of(path, settings=QUICK).title == f"spots: {path}"


def test_sets_of_a_folder(tmp_path):
    for name in ("b.pt", "a.pt", "c.png"):
        (tmp_path / name).touch()
    assert [path.name for path in sets_at(tmp_path)] == ["a.pt", "b.pt"]
    with pytest.raises(MissingDataError, match="no distilled set at"):
        sets_at(tmp_path / "missing")


@pytest.mark.slow
def test_files_of_no_known_dataset_are_named_and_left_out_of_a_folder(spots, tmp_path):
    folder = tmp_path / "mixed"
    save(folder / "spots.pt", spots, load_dataset(spots, "train").images[::10])
    torch.save(torch.zeros(8, 3, 16, 16), folder / "zzz.pt")
    said = []
    assert [one.title for one in measure_sets(folder, on_event=said.append)] == [f"spots: {folder / 'spots.pt'}"]
    assert said[0] == f"ignored: {folder / 'zzz.pt'} is not named after a known dataset."
    with pytest.raises(UsageError, match="Rename it to NAME.pt"):
        measure_sets(folder / "zzz.pt")


def plain(*levels: int, side: int = 8) -> torch.Tensor:
    """One plain picture for each gray level."""
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, side, side).contiguous()


def colors_of(sheet: Image.Image) -> set:
    return {color for _, color in sheet.getcolors(maxcolors=100_000)}


def test_a_contact_sheet_has_a_row_a_class_with_its_name():
    one = contact_sheet(plain(10, 20), torch.tensor([0, 1]), ["a", "b"])
    two = contact_sheet(plain(10, 20), torch.tensor([0, 1]), ["a name that is longer", "b"])
    assert two.width > one.width and two.height == one.height
    assert {(10, 10, 10), (20, 20, 20)} <= colors_of(one)


def test_side_by_side_shows_real_images_of_the_same_classes_only():
    sheet = side_by_side(
        (plain(10), torch.tensor([1])), (plain(100, 110, 120), torch.tensor([0, 1, 2])), ["a", "b", "c"]
    )  # fmt: skip
    assert {(10, 10, 10), (110, 110, 110)} <= colors_of(sheet)
    assert not {(100, 100, 100), (120, 120, 120)} & colors_of(sheet)


def test_neighbors_stand_in_the_order_of_their_distance():
    sheet = neighbor_sheet(plain(10, 20, 30), plain(110, 120, 130), torch.tensor([0.9, 0.1, 0.5]), ["a", "b", "c"], most=2)
    seen = colors_of(sheet)
    assert {(20, 20, 20), (120, 120, 120), (30, 30, 30), (130, 130, 130)} <= seen and (10, 10, 10) not in seen
    first = sheet.crop((0, 0, sheet.width // 2, sheet.height))
    assert (20, 20, 20) in colors_of(first) and (30, 30, 30) not in colors_of(first)
