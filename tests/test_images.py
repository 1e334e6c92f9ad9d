import hashlib
import re
import shlex
import shutil

import numpy as np
import pytest
import tiny
import torch

import modelsim as ms
import modelsim.images
from modelsim.images import check_images, check_labels

# Of the files as Zalando published them, and the time in their gzip headers.
PUBLISHED = {
    "t10k-images-idx3-ubyte": ("bef4ecab320f06d8554ea6380940ec79", 1504176627),
    "t10k-labels-idx1-ubyte": ("bb300cfdad3c16e7a12a480ee83cd310", 1504176627),
    "train-images-idx3-ubyte": ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", 1504176606),
    "train-labels-idx1-ubyte": ("25c81989df183df01b3e8a0aad5dffbe", 1504176606),
}
ONE = torch.full((3, 1, 8, 8), 0.5)


def changed(position, value):
    images = ONE.clone()
    images[position] = value
    return images


@pytest.fixture(scope="module")
def test_images():
    return ms.fashion_mnist("test")


@pytest.fixture
def copied_data(tmp_path, monkeypatch):
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    (tmp_path / "fashion69").mkdir()
    for path in (ms.data_directory() / "fashion-mnist").glob("t10k-*.gz"):
        shutil.copy(path, folder)
    monkeypatch.setenv("MODELSIM_DATA", str(tmp_path))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_embedded_file_is_the_published_one_without_name_and_time_in_its_header(name):
    digest, time = PUBLISHED[name]
    content = (ms.data_directory() / "fashion-mnist" / f"{name}.gz").read_bytes()
    header = b"\x1f\x8b\x08\x08" + time.to_bytes(4, "little") + b"\x00\x03" + name.encode() + b"\x00"
    assert hashlib.md5(header + content[10:]).hexdigest() == digest


def test_readme_states_the_sha256_of_every_embedded_file():
    readme = ms.data_directory() / "fashion-mnist" / "README.md"
    if not readme.exists():
        pytest.skip("data/fashion-mnist/README.md is not written yet")
    lines = readme.read_text().splitlines()
    for path in readme.parent.glob("*.gz"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert any(path.name in line and digest in line for line in lines), path.name


@pytest.mark.parametrize(("split", "n"), [("test", 10_000), ("train", 60_000)])
def test_fashion_mnist_has_every_class_equally_often(split, n):
    images = ms.fashion_mnist(split)
    assert images.images.shape == (n, 1, 28, 28)
    assert torch.bincount(images.labels).tolist() == [n // 10] * 10
    assert len(images) == len(set(images.ids)) == n


def test_first_test_image_is_an_ankle_boot_of_whole_255ths(test_images):
    assert test_images.classes[test_images.labels[0]] == "Ankle boot"
    pixels = test_images.images[:100] * 255
    assert torch.equal(pixels.round() / 255, test_images.images[:100])
    assert pixels.max() == 255


def test_subset_has_100_of_each_class_and_its_ids_find_the_same_images_in_the_whole(test_images):
    subset = ms.fashion_mnist("test", n=1000, seed=3)
    assert torch.bincount(subset.labels).tolist() == [100] * 10
    places = [test_images.ids.index(name) for name in subset.ids]
    assert places == sorted(places)
    assert torch.equal(test_images.images[places], subset.images)
    assert torch.equal(test_images.labels[places], subset.labels)


def test_draw_depends_on_the_seed_only(test_images):
    again = [test_images.balanced(50, seed=seed).ids for seed in (0, 0, 1)]
    assert again[0] == again[1] != again[2]


def test_positions_choose_images_in_their_order(images):
    chosen = images[[4, 1]]
    assert chosen.ids == (images.ids[4], images.ids[1])
    assert torch.equal(chosen.images, torch.stack([images.images[4], images.images[1]]))


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (slice(5), [0, 1, 2, 3, 4]),
        (slice(None, None, -4), [11, 7, 3]),
        (7, [7]),
        (-1, [11]),
        (np.int64(2), [2]),
        (torch.tensor(2), [2]),
        (torch.tensor([3, -2]), [3, 10]),
        (range(2), [0, 1]),
        (tiny.image_set().labels == 2, [2, 5, 8, 11]),
        (tiny.image_set().labels.numpy() == 2, [2, 5, 8, 11]),
        ((tiny.image_set().labels == 2).tolist(), [2, 5, 8, 11]),
    ],
)
def test_images_are_chosen_as_elements_of_an_array_are(images, positions, expected):
    chosen = images[positions]
    assert chosen.ids == tuple(images.ids[place] for place in expected)
    assert torch.equal(chosen.images, images.images[expected])
    assert torch.equal(chosen.labels, images.labels[expected])


@pytest.mark.parametrize(
    ("positions", "error", "message"),
    [
        (12, IndexError, "index 12 is out of bounds .* size 12"),
        ([0, -13], IndexError, "index -13 is out of bounds .* size 12"),
        (torch.ones(5, dtype=torch.bool), IndexError, "size of axis is 12 but .* boolean axis is 5"),
        (torch.ones(12, 1, dtype=torch.bool), IndexError, "too many indices"),
        (1.0, IndexError, "only integers"),
        ([0.0, 1.0], IndexError, "only integers"),
        (torch.tensor([0.5]), IndexError, "only integers"),
        ("tiny/01", IndexError, "only integers"),
        (None, IndexError, "one-dimensional, got None"),
        (True, IndexError, "one-dimensional, got True"),
        ([[0, 1], [2, 3]], IndexError, r"one-dimensional, got \[\[0, 1\], \[2, 3\]\]"),
        ([], ValueError, "the image set is empty"),
        (slice(12, 20), ValueError, "the image set is empty"),
        ([1, 1], ValueError, "got 2 of which 1 differ"),
    ],
)
def test_positions_that_are_none_are_refused(images, positions, error, message):
    with pytest.raises(error, match=message):
        images[positions]


@pytest.mark.parametrize("positions", [slice(None), ..., 0, [0, 1], torch.ones(12, dtype=torch.bool)])
def test_what_is_chosen_can_be_changed_without_changing_the_set(images, positions):
    before, chosen = images.fingerprint(), images[positions]
    chosen.images.zero_()
    chosen.labels.add_(1)
    assert images.fingerprint() == before


def test_images_come_one_by_one_in_a_loop(images):
    assert [one.ids for one in images] == [(name,) for name in images.ids]


def test_hashes_of_a_part_are_that_part_of_the_hashes(images):
    assert images[[7, 2]].hashes() == (images.hashes()[7], images.hashes()[2])
    assert len(set(images.hashes())) == 12


@pytest.mark.parametrize("what", ["images", "labels"])
def test_hash_of_an_image_is_of_its_pixels_and_label_alone(images, what):
    fields = {"images": images.images.clone(), "labels": images.labels.clone()}
    fields[what][3] = 1 - fields[what][3]
    names = tuple(f"other/{i}" for i in range(12))
    other = ms.ImageSet(**fields, ids=names, classes=("x", "y", "z"), name="other")
    differs = [a != b for a, b in zip(other.hashes(), images.hashes(), strict=True)]
    assert differs == [place == 3 for place in range(12)]


def test_hash_is_the_start_of_a_sha256():
    one = ms.ImageSet(torch.zeros(1, 1, 1, 1), torch.tensor([1]), ("a",), tiny.CLASSES, "one")
    expected = hashlib.sha256(b"\0\0\0\0" + b"\1\0\0\0\0\0\0\0").hexdigest()[:16]
    assert one.hashes() == (expected,)


@pytest.mark.parametrize("what", ["images", "labels", "ids"])
def test_fingerprint_changes_with_a_single_entry(images, what):
    fields = {"images": images.images.clone(), "labels": images.labels.clone(), "ids": images.ids}
    if what == "ids":
        fields["ids"] = ("other", *images.ids[1:])
    else:
        fields[what].view(-1)[0] = 1 - fields[what].view(-1)[0]
    other = ms.ImageSet(**fields, classes=images.classes, name=images.name)
    assert other.fingerprint() != images.fingerprint() == tiny.image_set().fingerprint()


@pytest.mark.parametrize(
    ("images", "error", "culprit"),
    [
        (np.zeros((3, 1, 8, 8), np.float32), TypeError, "ndarray"),
        ((ONE * 255).to(torch.uint8), TypeError, "uint8; divide 8-bit images by 255"),
        (ONE.double(), TypeError, "float64"),
        (ONE[:, 0], ValueError, "(3, 8, 8)"),
        (ONE.expand(3, 2, 8, 8), ValueError, "(3, 2, 8, 8)"),
        (ONE[:0], ValueError, "empty: shape (0, 1, 8, 8)"),
        (changed((1, 0, 2, 2), torch.nan), ValueError, "1 image(s) contain NaN"),
        (changed((1, 0, 2, 2), torch.inf), ValueError, "0.5 to inf"),
        (changed((1, 0, 2, 2), -0.25), ValueError, "-0.25 to 0.5"),
        (ONE * 255, ValueError, "127.5 to 127.5"),
    ],
)
def test_bad_images_are_refused_naming_the_culprit(images, error, culprit):
    with pytest.raises(error, match=re.escape(culprit)):
        check_images(images)
    with pytest.raises(error, match=re.escape(culprit)):
        ms.ImageSet(images, torch.zeros(3, dtype=torch.int64), ("a", "b", "c"), tiny.CLASSES, "bad")


@pytest.mark.parametrize(
    ("labels", "error", "culprit"),
    [
        ([0, 1, 2], TypeError, "list"),
        (torch.tensor([0, 1, 2], dtype=torch.int32), TypeError, "int32"),
        (torch.tensor([0.0, 1.0, 2.0]), TypeError, "float32"),
        (torch.tensor([0, 1]), ValueError, "3 images, got shape (2,)"),
        (torch.tensor([[0], [1], [2]]), ValueError, "3 images, got shape (3, 1)"),
        (
            torch.tensor([0, 3, 4]),
            ValueError,
            "2 label(s) outside the 3 classes 0 … 2: the first is 3 at position 1",
        ),
        (torch.tensor([0, 1, -1]), ValueError, "the first is -1 at position 2"),
    ],
)
def test_bad_labels_are_refused_naming_the_culprit(labels, error, culprit):
    with pytest.raises(error, match=re.escape(culprit)):
        check_labels(labels, n_images=3, n_classes=3)
    with pytest.raises(error, match=re.escape(culprit)):
        ms.ImageSet(ONE, labels, ("a", "b", "c"), tiny.CLASSES, "bad")


@pytest.mark.parametrize(
    ("ids", "culprit"),
    [(("a", "b"), "got 2 of which 2 differ"), (("a", "b", "a"), "got 3 of which 2 differ")],
)
def test_missing_or_repeated_ids_are_refused(ids, culprit):
    with pytest.raises(ValueError, match=culprit):
        ms.ImageSet(ONE, torch.tensor([0, 1, 2]), ids, tiny.CLASSES, "bad")


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (dict(ids=(0, 1, 2)), TypeError, "image ids must be strings, got 0"),
        (dict(ids=("a", "", "c")), ValueError, "image ids must not be empty, got ''"),
        (dict(ids="abc"), TypeError, "image ids must be several strings, got one: 'abc'"),
        (dict(classes=(0, 1, 2)), TypeError, "class names must be strings, got 0"),
        (dict(classes=("ant", "", "cow")), ValueError, "class names must not be empty, got ''"),
    ],
)
def test_ids_and_classes_that_no_study_could_hold_are_refused(names, error, message):
    given = dict(ids=("a", "b", "c"), classes=tiny.CLASSES) | names
    with pytest.raises(error, match=message):
        ms.ImageSet(ONE, torch.tensor([0, 1, 2]), name="bad", **given)


def test_uneven_draw_is_refused(images):
    with pytest.raises(ValueError, match="multiple of the 3 classes, got 7"):
        images.balanced(7)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(n=0), ValueError, "n must be at least 1, got 0"),
        (dict(n=-3), ValueError, "n must be at least 1, got -3"),
        (dict(n=3.0), TypeError, "n must be a whole number, got 3.0"),
        (dict(n="3"), TypeError, "n must be a whole number, got '3'"),
        (dict(n=True), TypeError, "n must be a whole number, got True"),
        (dict(n=3, seed=-1), ValueError, "seed must be at least 0, got -1"),
        (dict(n=3, seed=0.5), TypeError, "seed must be a whole number, got 0.5"),
        (dict(n=3, seed=2**63), ValueError, r"seed must be less than 2\*\*63"),
    ],
)
def test_number_of_images_and_seed_out_of_range_are_refused_by_name(images, options, error, message):
    with pytest.raises(error, match=message):
        images.balanced(**options)


def test_draw_of_more_than_a_class_holds_names_the_class(images):
    without_last_bee = images[[i for i in range(12) if i != 10]]
    with pytest.raises(ValueError, match="class 'bee' has 3 images, 4 were asked for"):
        without_last_bee.balanced(12)


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="'validation'"):
        ms.fashion_mnist("validation")


@pytest.mark.parametrize("lacking", ["fashion-mnist", "fashion69"])
def test_folder_of_other_data_is_named_and_not_taken(lacking, tmp_path, monkeypatch):
    for name in {"fashion-mnist", "fashion69", "thesis"} - {lacking}:
        (tmp_path / name).mkdir()
    monkeypatch.setenv("MODELSIM_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"at {tmp_path} .no {lacking} in it.*set MODELSIM_DATA"):
        ms.data_directory()


def test_folder_beside_an_installed_package_is_taken_only_if_it_is_ours(tmp_path, monkeypatch):
    # A package may have put its own data/ into site-packages.
    (tmp_path / "data").mkdir()
    monkeypatch.delenv("MODELSIM_DATA", raising=False)
    monkeypatch.setattr(modelsim.images, "__file__", str(tmp_path / "modelsim" / "images.py"))
    with pytest.raises(FileNotFoundError, match="no fashion-mnist and no fashion69 in it"):
        ms.data_directory()


def test_relative_data_folder_is_named_by_where_it_was_looked_for(copied_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setenv("MODELSIM_DATA", tmp_path.name)
    assert ms.data_directory() == tmp_path
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"at {tmp_path / tmp_path.name} "):
        ms.data_directory()


def test_absent_data_folder_is_named_with_the_way_to_set_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MODELSIM_DATA", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match=r"gone.*set MODELSIM_DATA"):
        ms.fashion_mnist("test")


def test_path_with_a_space_is_quoted_in_the_command_that_restores_it(copied_data, tmp_path, monkeypatch):
    there = tmp_path / "a b"
    there.mkdir()
    shutil.copytree(copied_data, there / "fashion-mnist")
    (there / "fashion69").mkdir()
    path = there / "fashion-mnist" / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(b"")
    monkeypatch.setenv("MODELSIM_DATA", str(there))
    with pytest.raises(ValueError, match="restore it with") as caught:
        ms.fashion_mnist("test")
    command = shlex.split(str(caught.value).partition("restore it with ")[2])
    assert command == ["git", "-C", str(path.parent), "checkout", "--", path.name]


def test_absent_data_file_is_named(copied_data):
    (copied_data / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte\.gz"):
        ms.fashion_mnist("test")


def flipped(content, position):
    return content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]


@pytest.mark.parametrize("kind", ["images-idx3", "labels-idx1"])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[: len(content) // 2], id="halved"),
        pytest.param(lambda content: content[:-1], id="cut by one byte"),
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: flipped(content, 12), id="flipped at the start"),
        pytest.param(lambda content: flipped(content, len(content) // 2), id="flipped in the middle"),
        pytest.param(lambda content: flipped(content, len(content) - 6), id="flipped in the checksum"),
        pytest.param(lambda content: b"<html>not found</html>", id="not gzip"),
    ],
)
def test_damaged_data_file_is_named_with_the_way_to_restore_it(copied_data, kind, damage):
    path = copied_data / f"t10k-{kind}-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{path.name}.*git -C {copied_data} checkout -- {path.name}$"):
        ms.fashion_mnist("test")
