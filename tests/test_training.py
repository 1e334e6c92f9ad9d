import gzip
import json
import math
import os
import shutil
import signal
import time
from dataclasses import asdict
from pathlib import Path

import dask
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from processes import end, start, wait_for

import modelsim as ms
from modelsim import training
from modelsim.training import train_zoo
from modelsim.workers import sole_writer
from modelsim.zoo import count_flops, count_parameters, fingerprint, read_metadata

NAME = "deit_small_patch16_224"
MODELS = [NAME, "resnet50-seed1"]
QUICK = ms.Recipe(epochs=1, batch_size=32)
WEIGHTS = ms.data_directory() / "fashion69" / "weights"
SHIPPED = sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def few_images(tmp_path_factory):
    """A data folder of 100 training and 50 test images, without weights."""
    folder = tmp_path_factory.mktemp("few")
    for name in ("fashion-mnist", "fashion69"):
        (folder / name).mkdir()
    for stem, n in {"train": 100, "t10k": 50}.items():
        images = ms.fashion_mnist("test", n=n)
        pixels, labels = (images.images[:, 0] * 255).round().numpy(), images.labels.numpy()
        for kind, values in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
            content = gzip.compress(header + values.astype(np.uint8).tobytes())
            (folder / "fashion-mnist" / f"{stem}-{kind}-ubyte.gz").write_bytes(content)
    return folder


@pytest.fixture
def weights(few_images, tmp_path, monkeypatch):
    """Where the weights of a small data folder go."""
    shutil.copytree(few_images, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("MODELSIM_DATA", str(tmp_path))
    return tmp_path / "fashion69" / "weights"


@pytest.fixture
def untrained(monkeypatch):
    """Build networks instead of training them; the seeds asked for, and what is to be done with one."""
    asked, odd = [], {}

    def train(name, *, seed, **_):
        asked.append(seed)
        classifier = ms.build(name, seed=seed).eval()
        odd.get(seed, lambda _: None)(classifier)
        return classifier

    monkeypatch.setattr(training, "train", train)
    return asked, odd


def hashes(folder):
    return {path.name: read_metadata(path)["sha256"] for path in Path(folder).glob("*.safetensors")}


def raising(error):
    def fail(_):
        raise error

    return fail


def test_training_depends_on_its_seed_and_leaves_the_global_random_state_alone(weights):
    before = torch.manual_seed(5).get_state()
    trained = [ms.train(NAME, seed=seed, recipe=QUICK, progress=False) for seed in (0, 0, 1)]
    prints = [fingerprint(classifier) for classifier in trained]
    assert prints[0] == prints[1] != prints[2]
    assert fingerprint(ms.build(NAME)) != prints[0]
    assert not any(module.training for module in trained[0].modules())
    assert torch.equal(torch.get_rng_state(), before)


def test_accuracy_is_the_share_of_correct_images_in_evaluation_mode(images):
    right = tiny.mlp(2).eval()(images.images).argmax(1)
    labels = torch.where(torch.arange(12) < 3, (right + 1) % 3, right)
    classifier = tiny.mlp(2).train()
    marked = ms.ImageSet(images.images, labels, images.ids, images.classes, "marked")
    assert ms.accuracy(classifier, marked) == 0.75
    assert all(module.training for module in classifier.modules())


@pytest.mark.parametrize(
    ("output", "recipe", "message"),
    [
        (lambda logits: (logits * 0).abs().sqrt(), {}, r"loss 1\.1, gradient nan at step 0: lower the"),
        (lambda logits: logits, dict(epochs=5, learning_rate=1e30), r"loss nan, gradient nan at step [1-9]"),
    ],
)
def test_loss_or_gradient_that_stops_being_finite_names_the_step(output, recipe, message, images):
    classifier = ms.Classifier(tiny.linear(1), input_size=8)
    classifier.network.register_forward_hook(lambda module, given, logits: output(logits))
    with pytest.raises(FloatingPointError, match=message):
        ms.fit(classifier, images, recipe=ms.Recipe(batch_size=4, **recipe), progress=False)


TOLD = torch.zeros(2, 4, 3)


def fit(**given):
    return ms.fit(ms.Classifier(tiny.linear(1), input_size=8), tiny.image_set(), progress=False, **given)


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda: ms.Recipe(epochs=0), ValueError, "epochs must be at least 1, got 0"),
        (lambda: ms.Recipe(batch_size=-64), ValueError, "batch_size must be at least 1, got -64"),
        (lambda: ms.Recipe(learning_rate=math.nan), ValueError, "learning_rate must be greater .* got nan"),
        (lambda: ms.Recipe(learning_rate=math.inf), ValueError, "learning_rate must be at most .*, got inf"),
        (lambda: ms.Recipe(weight_decay=-0.1), ValueError, "weight_decay must be at least 0, got -0.1"),
        (lambda: ms.Recipe(warm_up=1.5), ValueError, "warm_up must be at most 1, got 1.5"),
        (lambda: ms.Recipe(warm_up="half"), TypeError, "warm_up must be a number, got 'half'"),
        (lambda: fit(recipe=ms.Recipe(batch_size=13)), ValueError, "12 images are fewer than .* batch of 13"),
        (lambda: fit(seed=-1), ValueError, "seed must be at least 0, got -1"),
        (lambda: fit(seed=0.5), TypeError, "seed must be a whole number, got 0.5"),
        (lambda: ms.train(NAME, seed=-1), ValueError, "seed must be at least 0, got -1"),
        (lambda: ms.train(NAME, seed="1"), TypeError, "seed must be a whole number, got '1'"),
        (lambda: ms.Teacher(TOLD, temperature=math.nan), ValueError, "temperature must be .*, got nan"),
        (lambda: ms.Teacher(TOLD, temperature=math.inf), ValueError, "temperature must be .*, got inf"),
    ],
)
def test_setting_out_of_range_is_refused_by_name(use, error, message):
    with pytest.raises(error, match=message):
        use()


def test_numbers_of_numpy_make_the_same_recipe():
    recipe = ms.Recipe(epochs=np.int64(1), batch_size=np.int32(32), learning_rate=np.float64(0.01))
    assert json.dumps(asdict(recipe)) == json.dumps(asdict(QUICK))


def test_only_missing_models_are_trained_and_the_table_tells_what_is_true_of_all(weights, untrained):
    assert len(ms.training_table()) == 0
    asked, odd = untrained
    odd[1] = raising(Killed)
    with pytest.raises(Killed):
        train_zoo([NAME, f"{NAME}-seed1", f"{NAME}-seed2"], recipe=QUICK)
    kept = hashes(weights)
    assert list(kept) == [f"{NAME}.safetensors"]
    odd.clear()
    table = train_zoo([f"{NAME}-seed1", NAME], recipe=QUICK)
    assert asked == [0, 1, 1]
    assert hashes(weights).items() > kept.items()
    assert table.seed.to_dict() == {NAME: 0, f"{NAME}-seed1": 1}
    written = pd.read_csv(weights / "training.csv", index_col="model")
    pd.testing.assert_frame_equal(written, table, check_dtype=False)
    row, classifier = table.loc[NAME], ms.load_zoo(names=[NAME])[NAME]
    assert row.test_accuracy == pytest.approx(ms.accuracy(classifier, ms.fashion_mnist("test")), abs=5e-5)
    assert row.architecture == NAME
    assert (row.parameters, row.flops) == (count_parameters(classifier), count_flops(classifier))
    assert json.loads(row.recipe) == asdict(QUICK)
    assert row.torch == torch.__version__


def test_failing_models_are_named_after_the_others_are_trained_and_noted(weights, untrained):
    _, odd = untrained
    odd |= {1: raising(FloatingPointError("loss is nan")), 2: raising(ValueError("no class"))}
    odd[3] = lambda classifier: classifier.network.head.bias.data[0].fill_(float("inf"))
    said = f"{NAME}-seed1: loss is nan; {NAME}-seed2: no class; {NAME}-seed3: .*infinite.* The 2 others are"
    with pytest.raises(FloatingPointError, match=said):
        train_zoo([f"{NAME}-seed{seed}" for seed in range(1, 5)] + [NAME], recipe=QUICK)
    assert set(ms.training_table().index) == {NAME, f"{NAME}-seed4"}
    assert len((weights / "training.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("names", "workers", "error", "message"),
    [
        ([NAME, "resnet51"], 1, ValueError, "unknown architecture 'resnet51'"),
        ([NAME], 0, ValueError, "workers must be at least 1, got 0"),
        ([NAME], 1.5, TypeError, "workers must be a whole number, got 1.5"),
    ],
)
def test_what_can_not_be_trained_is_refused_before_writing(names, workers, error, message, weights):
    with pytest.raises(error, match=message):
        train_zoo(names, recipe=QUICK, workers=workers)
    assert not weights.exists()


def test_folder_that_can_not_be_added_to_is_refused_before_anything_is_trained(weights, untrained):
    names, path = [f"{NAME}-seed1", NAME], weights / f"{NAME}.safetensors"
    train_zoo([NAME], recipe=QUICK)
    content = path.read_bytes()
    with sole_writer(weights), pytest.raises(BlockingIOError, match=f"process {os.getpid()}"):
        train_zoo(names, recipe=QUICK)
    said = rf"{path} .*epochs: 1 there, 2 now; learning_rate: 0\.01 there, 0\.02 now"
    with pytest.raises(ValueError, match=said):
        train_zoo(names, recipe=ms.Recipe(epochs=2, batch_size=32, learning_rate=0.02))
    assert path.read_bytes() == content
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 0xFF]))
    with pytest.raises(ValueError, match=rf"{path.name} is truncated or corrupted.*modelsim train {NAME}"):
        train_zoo(names, recipe=QUICK)
    assert untrained[0] == [0]


def train_the_first(folder):
    """Train the models, but wait at the second to be killed."""
    os.environ["MODELSIM_DATA"], train = str(folder), training.train

    def waiting(name, **given):
        return time.sleep(600) if name == "resnet50" else train(name, **given)

    training.train = waiting
    train_zoo(MODELS, recipe=QUICK)


def test_killed_run_is_finished_and_weights_depend_on_neither_threads_nor_workers(weights, tmp_path):
    run, threads = start(train_the_first, tmp_path), torch.get_num_threads()
    wait_for(lambda: hashes(weights) or run.exitcode is not None)
    run.kill()
    assert end(run) == -signal.SIGKILL
    times = {path: path.stat().st_mtime_ns for path in weights.glob("*.safetensors")}
    assert len(times) == 1
    torch.set_num_threads(3)
    try:
        train_zoo(MODELS, recipe=QUICK)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert times.items() <= {path: path.stat().st_mtime_ns for path in weights.iterdir()}.items()
    finished = hashes(weights)
    shutil.rmtree(weights)
    forks = {"worker.multiprocessing-method": "forkserver", "nanny.environ.MODELSIM_DATA": str(tmp_path)}
    with dask.config.set({f"distributed.{key}": value for key, value in forks.items()}):
        table = train_zoo(MODELS, recipe=QUICK, workers=2)
    assert hashes(weights) == finished
    assert set(table.index) == set(MODELS)
    for name, classifier in ms.load_zoo(names=MODELS).items():
        stored = ms.accuracy(classifier, ms.fashion_mnist("test"))
        assert table.test_accuracy[name] == pytest.approx(stored, abs=5e-5)


def test_every_architecture_is_shipped_and_twelve_of_them_with_two_further_seeds():
    assert set(ms.CATALOGUE) <= set(SHIPPED)
    for seed in (1, 2):
        assert len([name for name in SHIPPED if name.endswith(f"-seed{seed}")]) >= 12
    table = ms.training_table()
    assert table.test_accuracy.min() >= 0.85
    assert [json.loads(recipe) for recipe in table.recipe] == [asdict(ms.Recipe())] * len(table)
    written = pd.read_csv(WEIGHTS / "training.csv", index_col="model")
    pd.testing.assert_frame_equal(written, table, check_dtype=False)


@pytest.fixture(scope="module")
def first_images():
    """Those of the shipped study, and what every model but the third seeds says of them there."""
    study = ms.open_study(ms.data_directory() / "fashion69").clean_prediction[:, :50].load()
    return study, ms.fashion_mnist("test", n=1000, seed=0)[:50].images


@pytest.mark.parametrize("name", [name for name in SHIPPED if not name.endswith("-seed2")])
def test_shipped_model_predicts_what_the_shipped_study_says(name, first_images):
    predicted, images = first_images
    with torch.inference_mode():
        told = ms.load_zoo(names=[name])[name](images).argmax(1).numpy()
    # Another processor rounds otherwise, which may tip an image that lies on a boundary.
    assert (told == predicted.sel(target=name)).sum() >= 48


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.endswith("-seed2")])
def test_shipped_model_beside_the_study_is_as_accurate_as_its_file_says(name):
    recorded, n = float(read_metadata(WEIGHTS / f"{name}.safetensors")["test_accuracy"]), 500
    measured = ms.accuracy(ms.load_zoo(names=[name])[name], ms.fashion_mnist("test", n=n, seed=7))
    # Four standard deviations of a binomial share: 1 in 16,000 for a file that tells the truth.
    # Drawing without replacement and evenly over the classes only makes the deviation smaller.
    assert abs(measured - recorded) <= 4 * np.sqrt(recorded * (1 - recorded) / n)
