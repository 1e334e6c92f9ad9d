import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

import modelsim as ms
from modelsim import training
from modelsim.workers import sole_writer
from modelsim.zoo import count_flops, count_parameters, fingerprint, read_metadata

NAME = "deit_small_patch16_224"
MODELS = [NAME, f"{NAME}-seed1", "resnet50-seed1"]
QUICK = ms.Recipe(epochs=1, batch_size=32)
WEIGHTS = ms.data_directory() / "fashion69" / "weights"


class Killed(BaseException):
    pass


def write_idx(path, values):
    header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def make_data(folder):
    """Make a data folder of 100 training and 50 test images."""
    for name in ("fashion-mnist", "fashion69"):
        (folder / name).mkdir()
    for stem, n, seed in (("train", 100, 0), ("t10k", 50, 1)):
        images = ms.fashion_mnist("test", n=n, seed=seed)
        pixels, stem = (images.images[:, 0] * 255).round().numpy(), folder / "fashion-mnist" / stem
        write_idx(Path(f"{stem}-images-idx3-ubyte.gz"), pixels)
        write_idx(Path(f"{stem}-labels-idx1-ubyte.gz"), images.labels.numpy())


@pytest.fixture
def small_data(tmp_path, monkeypatch):
    """A small data folder; returns where its weights go."""
    make_data(tmp_path)
    monkeypatch.setenv("MODELSIM_DATA", str(tmp_path))
    return tmp_path / "fashion69" / "weights"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Hashes of the models trained by one process in one thread."""
    folder = tmp_path_factory.mktemp("alone")
    make_data(folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MODELSIM_DATA", str(folder))
        training.train_zoo(MODELS, recipe=QUICK)
    return hashes(folder / "fashion69" / "weights")


def hashes(folder):
    return {path.name: read_metadata(path)["sha256"] for path in Path(folder).glob("*.safetensors")}


@pytest.fixture
def no_training(monkeypatch):
    def train(name, **_):
        raise AssertionError(f"{name} is trained")

    monkeypatch.setattr(training, "train", train)


@pytest.fixture
def trained(small_data):
    training.train_zoo([NAME], recipe=QUICK)
    return small_data / f"{NAME}.safetensors"


@pytest.mark.parametrize("name", [NAME, "resnet50"])
def test_training_depends_on_its_seed_and_leaves_the_global_random_state_alone(name, small_data):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    prints = [fingerprint(ms.train(name, seed=s, recipe=QUICK, progress=False)) for s in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_trained_classifier_differs_from_the_untrained_and_is_in_evaluation_mode(small_data):
    classifier = ms.train(NAME, recipe=QUICK, progress=False)
    assert not any(module.training for module in classifier.modules())
    assert fingerprint(classifier) != fingerprint(ms.build(NAME))


class Plain(ms.Classifier):
    """Writes into what it is given, and returns nothing when its mode is set."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.network = tiny.mlp(1)

    def forward(self, canvas):
        return self.network(canvas.sub_(0.1).clamp_(0, 1))

    def train(self, mode=True):
        super().train(mode)

    def eval(self):
        self.train(False)


def test_network_that_writes_into_its_input_or_returns_nothing_from_train_is_trained(images):
    before, plain = images.images.clone(), Plain()
    first = fingerprint(plain)
    trained = ms.fit(plain, images, recipe=ms.Recipe(epochs=1, batch_size=4), progress=False)
    assert trained is plain
    assert fingerprint(plain) != first
    assert not plain.training
    ms.accuracy(plain, images)
    assert torch.equal(images.images, before)


def test_accuracy_leaves_the_mode_as_it_was(images):
    assert ms.accuracy(tiny.mlp(2).train(), images) == ms.accuracy(tiny.mlp(2).eval(), images)
    classifier = tiny.mlp(2).train()
    ms.accuracy(classifier, images)
    assert all(module.training for module in classifier.modules())


def test_gradient_that_overflows_before_the_loss_does_is_found_at_that_step(images):
    class Steep(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny.linear(1)

        def forward(self, canvas):
            return (self.inner(canvas) * 0).abs().sqrt()

    classifier = Plain()
    classifier.network = Steep()
    with pytest.raises(FloatingPointError, match=r"loss 1\.1, gradient nan at step 0"):
        ms.fit(classifier, images, recipe=ms.Recipe(epochs=1, batch_size=4), progress=False)


def test_fewer_images_than_a_batch_are_refused(small_data):
    with pytest.raises(ValueError, match="100 images are fewer than one batch of 101"):
        ms.train(NAME, recipe=ms.Recipe(batch_size=101))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(epochs=0), ValueError, "epochs must be at least 1, got 0"),
        (dict(epochs=1.5), TypeError, "epochs must be a whole number, got 1.5"),
        (dict(batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
        (dict(batch_size=-64), ValueError, "batch_size must be at least 1, got -64"),
        (dict(learning_rate=math.nan), ValueError, "learning_rate must be greater than 0, got nan"),
        (dict(learning_rate=math.inf), ValueError, "learning_rate must be at most .*, got inf"),
        (dict(weight_decay=-0.1), ValueError, "weight_decay must be at least 0, got -0.1"),
        (dict(weight_decay=math.nan), ValueError, "weight_decay must be at least 0, got nan"),
        (dict(warm_up=1.5), ValueError, "warm_up must be at most 1, got 1.5"),
        (dict(warm_up="half"), TypeError, "warm_up must be a number, got 'half'"),
    ],
)
def test_recipe_out_of_range_is_refused_by_name(settings, error, message):
    with pytest.raises(error, match=message):
        ms.Recipe(**settings)


@pytest.mark.parametrize(("seed", "error"), [(-1, ValueError), (0.5, TypeError), ("1", TypeError)])
def test_seed_that_is_none_is_refused_by_name(seed, error, small_data):
    with pytest.raises(error, match=f"seed must be .*, got {seed!r}"):
        ms.train(NAME, seed=seed, recipe=QUICK)
    with pytest.raises(error, match=f"seed must be .*, got {seed!r}"):
        ms.fit(ms.build(NAME), ms.fashion_mnist("train"), seed=seed, recipe=QUICK)


@pytest.mark.parametrize(("workers", "error"), [(0, ValueError), (1.5, TypeError)])
def test_number_of_workers_out_of_range_is_refused_and_nothing_written(workers, error, small_data):
    with pytest.raises(error, match=f"workers must be .*, got {workers}"):
        training.train_zoo([NAME], recipe=QUICK, workers=workers)
    assert not small_data.exists()


@pytest.mark.parametrize("temperature", [math.nan, math.inf])
def test_temperature_of_a_teacher_is_finite(temperature):
    with pytest.raises(ValueError, match=f"temperature must be .*, got {temperature}"):
        ms.Teacher(torch.zeros(2, 4, 3), temperature=temperature)


def test_numbers_of_numpy_make_the_same_recipe(small_data):
    recipe = ms.Recipe(epochs=np.int64(1), batch_size=np.int32(32), learning_rate=np.float64(0.01))
    training.train_zoo([NAME], recipe=recipe)
    assert training.train_zoo([NAME], recipe=QUICK).recipe[NAME] == json.dumps(asdict(QUICK))


def test_loss_that_stops_being_finite_names_the_step(small_data):
    recipe = ms.Recipe(epochs=3, batch_size=5, learning_rate=1e30)
    with pytest.raises(
        FloatingPointError, match=r"loss nan, gradient nan at step \d+: lower the learning rate"
    ):
        ms.train(NAME, recipe=recipe, progress=False)


def test_accuracy_is_the_share_of_correct_images(images):
    labels = images.labels.clone()

    class Oracle(torch.nn.Module):
        def forward(self, canvas):
            return torch.nn.functional.one_hot(labels[: len(canvas)], 3).float()

    wrong = ms.ImageSet(
        images.images, (labels + (torch.arange(12) < 3)) % 3, images.ids, images.classes, "wrong"
    )
    assert ms.accuracy(Oracle(), images) == 1
    assert ms.accuracy(Oracle(), wrong) == 0.75


def test_trained_models_are_kept_and_only_missing_ones_trained(trained, monkeypatch):
    before, asked = trained.read_bytes(), []
    train = training.train
    monkeypatch.setattr(
        training, "train", lambda name, **given: asked.append(given["seed"]) or train(name, **given)
    )
    table = training.train_zoo([NAME, f"{NAME}-seed1"], recipe=QUICK)
    assert asked == [1]
    assert table.seed.to_dict() == {NAME: 0, f"{NAME}-seed1": 1}
    assert trained.read_bytes() == before


def test_killed_training_loses_only_the_model_in_progress(trained, monkeypatch):
    def killed(name, **_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(training, "train", killed)
        with pytest.raises(Killed):
            training.train_zoo([NAME, f"{NAME}-seed1"], recipe=QUICK)
    assert [path.name for path in trained.parent.glob("*.safetensors")] == [trained.name]
    assert set(training.train_zoo([f"{NAME}-seed1"], recipe=QUICK).index) == {NAME, f"{NAME}-seed1"}


@pytest.mark.parametrize("error", [FloatingPointError, ValueError])
def test_failing_model_is_named_after_the_others_are_trained_and_noted(small_data, monkeypatch, error):
    train = training.train

    def failing(name, **given):
        if given["seed"] == 1:
            raise error("loss is nan")
        return train(name, **given)

    monkeypatch.setattr(training, "train", failing)
    with pytest.raises(FloatingPointError, match=f"{NAME}-seed1: loss is nan. The 2 others are trained"):
        training.train_zoo([f"{NAME}-seed1", NAME, f"{NAME}-seed2"], recipe=QUICK)
    assert set(ms.training_table().index) == {NAME, f"{NAME}-seed2"}
    assert len((small_data / "training.csv").read_text().splitlines()) == 3


def test_model_that_does_not_fit_into_half_precision_takes_no_other_with_it(small_data, monkeypatch):
    train = training.train

    def large(name, **given):
        classifier = train(name, **given)
        if given["seed"] == 1:
            classifier.network.head.bias.data[0] = 1e6
        return classifier

    monkeypatch.setattr(training, "train", large)
    with pytest.raises(FloatingPointError, match=rf"{NAME}-seed1: .*infinite.* The 1 others are trained"):
        training.train_zoo([f"{NAME}-seed1", NAME], recipe=QUICK)
    assert set(ms.training_table().index) == {NAME}


def test_two_workers_report_every_diverging_model(small_data):
    recipe = ms.Recipe(epochs=3, batch_size=5, learning_rate=1e30)
    with pytest.raises(FloatingPointError, match=rf"{NAME}(-seed1)?: loss nan.*; {NAME}.*The 0 others"):
        training.train_zoo([NAME, f"{NAME}-seed1"], recipe=recipe, workers=2)
    assert ms.training_table().empty


def test_weights_do_not_depend_on_the_number_of_threads_which_stays(small_data, alone):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        training.train_zoo(MODELS, recipe=QUICK)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert hashes(small_data) == alone


def test_two_workers_train_the_same_weights_and_note_their_accuracy(small_data, alone):
    table = training.train_zoo(MODELS, recipe=QUICK, workers=2)
    assert hashes(small_data) == alone
    assert set(table.index) == set(MODELS)
    for name in MODELS:
        stored = ms.accuracy(ms.load_zoo(names=[name])[name], ms.fashion_mnist("test"))
        assert table.test_accuracy[name] == pytest.approx(stored, abs=5e-5)


def test_folder_that_another_run_writes_into_is_refused(small_data, no_training):
    with sole_writer(small_data), pytest.raises(BlockingIOError, match=f"process {os.getpid()}"):
        training.train_zoo([NAME], recipe=QUICK)
    assert not list(small_data.glob("*.csv"))


KILLED = """
import modelsim as ms
from modelsim.training import train_zoo
if __name__ == "__main__":
    train_zoo({names}, recipe=ms.Recipe(epochs=1, batch_size=32), workers={workers})
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_run_that_is_killed_by_the_system_loses_only_models_in_progress(small_data, tmp_path, alone, workers):
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(names=MODELS, workers=workers))
    with subprocess.Popen([sys.executable, script], stderr=subprocess.DEVNULL) as run:
        while not hashes(small_data) and run.poll() is None:
            time.sleep(0.05)
        run.kill()
    assert run.returncode == -signal.SIGKILL
    times = {path: path.stat().st_mtime_ns for path in small_data.glob("*.safetensors")}
    assert 1 <= len(times) < 3
    training.train_zoo(MODELS, recipe=QUICK)
    assert hashes(small_data) == alone
    assert times.items() <= {path: path.stat().st_mtime_ns for path in small_data.iterdir()}.items()


def test_model_of_another_recipe_is_refused_naming_the_difference(trained, no_training):
    before = trained.read_bytes()
    other = ms.Recipe(epochs=2, batch_size=32, learning_rate=0.02)
    with pytest.raises(
        ValueError, match=r"epochs: 1 there, 2 now; learning_rate: 0\.01 there, 0\.02 now"
    ) as caught:
        training.train_zoo([f"{NAME}-seed1", NAME], recipe=other)
    assert str(trained) in str(caught.value)
    assert trained.read_bytes() == before


def test_damaged_model_is_named_before_anything_is_trained(trained, no_training):
    trained.write_bytes(trained.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{trained.name} is truncated or corrupted.*modelsim train {NAME}"):
        training.train_zoo([f"{NAME}-seed1", NAME], recipe=QUICK)


def test_unknown_name_is_found_before_anything_is_trained(small_data, no_training):
    with pytest.raises(ValueError, match="unknown architecture 'resnet51'"):
        training.train_zoo([NAME, "resnet51"], recipe=QUICK)
    assert not small_data.exists()


def test_table_tells_what_is_true_of_the_stored_weights(trained):
    table = ms.training_table()
    row, classifier = table.loc[NAME], ms.load_zoo(names=[NAME])[NAME]
    assert row.test_accuracy == pytest.approx(ms.accuracy(classifier, ms.fashion_mnist("test")), abs=5e-5)
    assert (row.architecture, row.seed) == (NAME, 0)
    assert (row.parameters, row.flops) == (count_parameters(classifier), count_flops(classifier))
    assert json.loads(row.recipe) == asdict(QUICK)
    assert row.torch == torch.__version__
    written = pd.read_csv(trained.parent / "training.csv", index_col="model")
    pd.testing.assert_frame_equal(written, table, check_dtype=False)


def test_table_of_a_folder_without_weights_has_no_rows(small_data):
    assert len(ms.training_table()) == 0


def test_every_architecture_is_shipped_and_twelve_of_them_with_two_further_seeds():
    shipped = {path.stem for path in WEIGHTS.glob("*.safetensors")}
    assert set(ms.CATALOGUE) <= shipped
    for seed in (1, 2):
        assert len([name for name in shipped if name.endswith(f"-seed{seed}")]) >= 12


@pytest.mark.parametrize("path", sorted(WEIGHTS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_shipped_model_is_as_accurate_as_its_file_says(path: Path):
    metadata = read_metadata(path)
    assert json.loads(metadata["recipe"]) == asdict(ms.Recipe())
    recorded, n = float(metadata["test_accuracy"]), 500
    assert recorded >= 0.85
    measured = ms.accuracy(ms.load_zoo(names=[path.stem])[path.stem], ms.fashion_mnist("test", n=n, seed=7))
    # Four standard deviations of a binomial share: 1 in 16,000 for a file that tells the truth.
    # Drawing without replacement and evenly over the classes only makes the deviation smaller.
    assert abs(measured - recorded) <= 4 * np.sqrt(recorded * (1 - recorded) / n)


def test_shipped_table_is_that_of_the_shipped_files():
    path = WEIGHTS / "training.csv"
    if not path.exists():
        pytest.skip("training.csv is not written yet")
    written = pd.read_csv(path, index_col="model")
    pd.testing.assert_frame_equal(written, ms.training_table(), check_dtype=False)
