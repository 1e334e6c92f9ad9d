import hashlib
import pickle
import shlex
import shutil
from copy import deepcopy
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import tiny
import torch

import modelsim as ms
import modelsim.images

# Of the files as Zalando published them, and the time in their gzip headers.
PUBLISHED = {
    "t10k-images-idx3-ubyte": ("bef4ecab320f06d8554ea6380940ec79", 1504176627),
    "t10k-labels-idx1-ubyte": ("bb300cfdad3c16e7a12a480ee83cd310", 1504176627),
    "train-images-idx3-ubyte": ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", 1504176606),
    "train-labels-idx1-ubyte": ("25c81989df183df01b3e8a0aad5dffbe", 1504176606),
}
ONE = torch.full((3, 1, 8, 8), 0.5)
TWELVE = tiny.image_set()
BEES = TWELVE.labels == 2


def with_pixel(value):
    images = ONE.clone()
    images[1, 0, 2, 2] = value
    return images


def image_set(images=ONE, labels=(0, 1, 2), ids=("a", "b", "c"), classes=tiny.CLASSES):
    labels = torch.tensor(labels) if isinstance(labels, tuple) else labels
    return ms.ImageSet(images, labels, ids, classes, "three")


@pytest.mark.parametrize("name", PUBLISHED)
def test_embedded_file_is_the_published_one_without_name_and_time_in_its_header(name):
    digest, time = PUBLISHED[name]
    path = ms.data_directory() / "fashion-mnist" / f"{name}.gz"
    content = path.read_bytes()
    header = b"\x1f\x8b\x08\x08" + time.to_bytes(4, "little") + b"\x00\x03" + name.encode() + b"\x00"
    assert hashlib.md5(header + content[10:]).hexdigest() == digest
    stated = (path.parent / "README.md").read_text().splitlines()
    assert any(path.name in line and hashlib.sha256(content).hexdigest() in line for line in stated)


def test_subset_has_as_many_of_each_class_and_its_ids_find_the_same_images_in_the_whole():
    whole, subset = ms.fashion_mnist("test"), ms.fashion_mnist("test", n=1000, seed=3)
    for split, images, n in (("test", whole, 10_000), ("train", ms.fashion_mnist("train"), 60_000)):
        assert images.images.shape == (n, 1, 28, 28)
        assert torch.bincount(images.labels).tolist() == [n // 10] * 10
        assert (images.ids[0], images.ids[-1]) == (f"{split}/00000", f"{split}/{n - 1:05d}")
        assert len(images) == n
    assert whole.classes[whole.labels[0]] == "Ankle boot"
    pixels = subset.images * 255
    assert torch.equal(pixels.round() / 255, subset.images)
    assert pixels.max() == 255
    assert torch.bincount(subset.labels).tolist() == [100] * 10
    places = [whole.ids.index(name) for name in subset.ids]
    assert places == sorted(places)
    assert torch.equal(whole.images[places], subset.images)
    assert torch.equal(whole.labels[places], subset.labels)
    assert whole.balanced(1000, seed=3).ids == subset.ids != whole.balanced(1000, seed=4).ids


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (slice(5), [0, 1, 2, 3, 4]),
        (slice(None, None, -4), [11, 7, 3]),
        ([4, 1], [4, 1]),
        (-1, [11]),
        (np.int64(2), [2]),
        (torch.tensor(2), [2]),
        (torch.tensor([3, -2]), [3, 10]),
        *((mask, [2, 5, 8, 11]) for mask in (BEES, BEES.numpy(), BEES.tolist())),
    ],
)
def test_images_are_chosen_as_elements_of_an_array_are_and_copied(images, positions, expected):
    before, chosen = images.fingerprint(), images[positions]
    assert chosen.ids == tuple(images.ids[place] for place in expected)
    assert chosen.hashes() == tuple(images.hashes()[place] for place in expected)
    assert torch.equal(chosen.images, images.images[expected])
    assert torch.equal(chosen.labels, images.labels[expected])
    chosen.images.zero_()
    chosen.labels.add_(1)
    assert images.fingerprint() == before
    assert [one.ids for one in images] == [(name,) for name in images.ids]


def test_lists_of_ids_and_classes_are_kept_as_tuples():
    made = image_set(ids=["a", "b", "c"], classes=[*tiny.CLASSES])
    assert (made.ids, made.classes) == (("a", "b", "c"), tiny.CLASSES)


@pytest.mark.parametrize("what", ["images", "labels", "ids"])
def test_fingerprint_changes_with_a_single_entry_and_the_hash_of_an_image_with_its_own_alone(images, what):
    fields = {"images": images.images.clone(), "labels": images.labels.clone(), "ids": images.ids}
    if what == "ids":
        fields["ids"] = (*images.ids[:3], "other", *images.ids[4:])
    else:
        fields[what][3] = 1 - fields[what][3]
    other = ms.ImageSet(**fields, classes=("x", "y", "z"), name="other")
    assert other.fingerprint() != images.fingerprint() == tiny.image_set().fingerprint()
    differs = [a != b for a, b in zip(other.hashes(), images.hashes(), strict=True)]
    assert differs == [place == 3 and what != "ids" for place in range(12)]


def test_pixels_of_8_bit_are_kept_and_make_the_canvas_and_the_hashes_of_their_255ths():
    pixels = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    divided = torch.from_numpy(pixels.numpy() / np.float32(255))
    given, plain = (ms.ImageSet(x, torch.arange(4), [*"abcd"], [*"abcd"], "all") for x in (pixels, divided))
    assert given.pixels is pixels
    assert (given[1:3].pixels.dtype, given.balanced(4).pixels.dtype) == (torch.uint8, torch.uint8)
    assert torch.equal(given.images, plain.images)
    assert torch.equal(given[[3, 0]].images, divided[[3, 0]])
    assert plain.images is divided
    assert (given.fingerprint(), given.hashes()) == (plain.fingerprint(), plain.hashes())
    whole = hashlib.sha256(divided.numpy().tobytes() + torch.arange(4).numpy().tobytes() + b"a\nb\nc\nd")
    assert given.fingerprint() == whole.hexdigest()
    for copy in (pickle.loads(pickle.dumps(given)), replace(given, name="other"), deepcopy(given)):
        assert copy.fingerprint() == given.fingerprint()
    given.images.zero_()
    assert torch.equal(given.pixels.flatten(), torch.arange(256, dtype=torch.uint8))
    with pytest.raises(FrozenInstanceError):
        given.images = divided


def test_fashion_mnist_is_kept_in_8_bit_and_its_fingerprint_is_that_of_the_shipped_study():
    images, study = ms.fashion_mnist("test"), ms.open_study("data/fashion69")
    assert images.pixels.dtype == ms.fashion_mnist("train").pixels.dtype == torch.uint8
    assert images.fingerprint() == study.attrs["test_images_sha256"]
    drawn = images[[images.ids.index(name) for name in study.image.values]]
    assert drawn.fingerprint() == study.attrs["images_sha256"]
    assert drawn.hashes() == tuple(study.image_sha256.values)


def test_hash_is_the_start_of_a_sha256():
    one = image_set(torch.zeros(1, 1, 1, 1), (1,), ("a",))
    assert one.hashes() == (hashlib.sha256(b"\0\0\0\0" + b"\1\0\0\0\0\0\0\0").hexdigest()[:16],)


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda: image_set(np.zeros((3, 1, 8, 8), np.float32)), TypeError, "ndarray"),
        (lambda: image_set((ONE * 255).long()), TypeError, "int64: .*divide 8-bit images by 255"),
        (lambda: image_set(ONE[:, 0].byte()), ValueError, r"\(3, 8, 8\)"),
        (lambda: image_set(ONE[:0].byte()), ValueError, r"empty: shape \(0, 1, 8, 8\)"),
        (lambda: image_set(ONE.double()), TypeError, r"float64: convert them by \.float\(\)"),
        (lambda: image_set(ONE.clone().requires_grad_()), ValueError, r"give images\.detach\(\)\.cpu\(\)"),
        (lambda: image_set(ONE.to("meta")), ValueError, "on the CPU"),
        (
            lambda: image_set(labels=torch.zeros(3, dtype=torch.int64, device="meta")),
            ValueError,
            "labels must",
        ),
        (lambda: replace(TWELVE, name=None), TypeError, "names of image sets must be strings, got None"),
        (lambda: image_set(with_pixel(1 + 2**-23)), ValueError, r"from 0.5 to 1.0000001: .* normalisation"),
        (lambda: image_set(ONE[:, 0]), ValueError, r"\(3, 8, 8\)"),
        (lambda: image_set(ONE.expand(3, 2, 8, 8)), ValueError, r"\(3, 2, 8, 8\)"),
        (lambda: image_set(ONE[:0]), ValueError, r"empty: shape \(0, 1, 8, 8\)"),
        (lambda: image_set(with_pixel(torch.nan)), ValueError, r"1 image\(s\) contain NaN"),
        (lambda: image_set(with_pixel(torch.inf)), ValueError, "0.5 to inf"),
        (lambda: image_set(with_pixel(-0.25)), ValueError, "-0.25 to 0.5"),
        (lambda: image_set(labels=[0, 1, 2]), TypeError, "list"),
        (lambda: image_set(labels=torch.tensor([0, 1, 2]).int()), TypeError, "int32"),
        (lambda: image_set(labels=(0, 1)), ValueError, r"3 images, got shape \(2,\)"),
        (lambda: image_set(labels=([0], [1], [2])), ValueError, r"3 images, got shape \(3, 1\)"),
        (lambda: image_set(labels=(0, 3, 4)), ValueError, r"2 .* the 3 classes 0 … 2: .* is 3 at position 1"),
        (lambda: image_set(labels=(0, 1, -1)), ValueError, "the first is -1 at position 2"),
        (lambda: image_set(ids=("a", "b")), ValueError, "got 2 of which 2 differ"),
        (lambda: image_set(ids=("a", "b", "a")), ValueError, "got 3 of which 2 differ"),
        (lambda: image_set(ids=(0, 1, 2)), TypeError, "image ids must be strings, got 0"),
        (lambda: image_set(ids=("a", "", "c")), ValueError, "image ids must not be empty, got ''"),
        (lambda: image_set(ids="abc"), TypeError, "image ids must be several strings, got one: 'abc'"),
        (lambda: image_set(classes=(0, 1, 2)), TypeError, "class names must be strings, got 0"),
        (lambda: TWELVE.balanced(7), ValueError, "multiple of the 3 classes, got 7"),
        (lambda: TWELVE.balanced(0), ValueError, "n must be at least 1, got 0"),
        (lambda: TWELVE.balanced(3.0), TypeError, "n must be a whole number, got 3.0"),
        (lambda: TWELVE.balanced(True), TypeError, "n must be a whole number, got True"),
        (lambda: TWELVE.balanced(3, seed=-1), ValueError, "seed must be at least 0, got -1"),
        (lambda: TWELVE.balanced(3, seed=2**63), ValueError, r"seed must be less than 2\*\*63"),
        (lambda: TWELVE[[*range(10), 11]].balanced(12), ValueError, "class 'bee' has 3 images, 4 were asked"),
        (lambda: TWELVE[[0, -13]], IndexError, "index -13 is out of bounds .* size 12"),
        (lambda: TWELVE[torch.ones(5, dtype=torch.bool)], IndexError, "axis is 12 but .* boolean axis is 5"),
        *((lambda at=at: TWELVE[at], IndexError, "only integers") for at in (1.0, torch.tensor([0.5]), "1")),
        (lambda: TWELVE[None], IndexError, "one-dimensional, got None"),
        (lambda: TWELVE[[[0, 1], [2, 3]]], IndexError, r"one-dimensional, got \[\[0, 1\], \[2, 3\]\]"),
        (lambda: TWELVE[12:20], ValueError, "the image set is empty"),
        (lambda: TWELVE[[1, 1]], ValueError, "got 2 of which 1 differ"),
        (lambda: ms.fashion_mnist("validation"), ValueError, "'validation'"),
    ],
)
def test_sets_and_draws_that_can_not_be_are_refused_naming_the_culprit(use, error, message):
    with pytest.raises(error, match=message):
        use()


@pytest.mark.parametrize("there", [("fashion69",), ("fashion-mnist", "thesis"), ()])
def test_folder_of_other_data_is_named_and_not_taken(there, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODELSIM_DATA", "mine")
    for name in there:
        (tmp_path / "mine" / name).mkdir(parents=True)
    lacking = " and no ".join(sorted({"fashion-mnist", "fashion69"} - {*there}))
    message = f"at {tmp_path / 'mine'} .no {lacking} in it.*set MODELSIM_DATA"
    with pytest.raises(FileNotFoundError, match=message):
        ms.data_directory()
    # A package may have put its own data/ into site-packages.
    monkeypatch.delenv("MODELSIM_DATA")
    monkeypatch.setattr(modelsim.images, "__file__", str(tmp_path / "modelsim" / "images.py"))
    with pytest.raises(FileNotFoundError, match="no fashion-mnist and no fashion69 in it"):
        ms.data_directory()


def flipped(content, position):
    return content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]


DAMAGES = {
    "cut by one byte": lambda content: content[:-1],
    "empty": lambda content: b"",
    "flipped at the start": lambda content: flipped(content, 12),
    "flipped in the middle": lambda content: flipped(content, len(content) // 2),
    "flipped in the checksum": lambda content: flipped(content, len(content) - 6),
    "not gzip": lambda content: b"<html>not found</html>",
}


@pytest.mark.parametrize("kind", ["images-idx3", "labels-idx1"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_or_absent_data_file_is_named_with_the_command_that_restores_it(
    kind, damage, tmp_path, monkeypatch
):
    (tmp_path / "da ta" / "fashion69").mkdir(parents=True)
    folder = tmp_path / "da ta" / "fashion-mnist"
    files = shutil.ignore_patterns("train*")
    shutil.copytree(ms.data_directory() / "fashion-mnist", folder, ignore=files)
    monkeypatch.setenv("MODELSIM_DATA", str(folder.parent))
    path = folder / f"t10k-{kind}-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{path.name} is truncated or corrupted") as caught:
        ms.fashion_mnist("test")
    command = shlex.split(str(caught.value).partition("restore it with ")[2])
    assert command == ["git", "-C", str(folder), "checkout", "--", path.name]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.name):
        ms.fashion_mnist("test")
