from functools import partial

import numpy as np
import pytest
import torch
from pages import code_cells, page

import modelsim as ms

own = page("full_size")


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """The page up to its small study, of which two networks and six photographs are taken."""
    (weights, photographs) = (
        next(cell for cell in code_cells("full_size") if marker in cell)
        for marker in ("def folder_of", "synsets = ImageNetInfo")
    )
    names = vars(own).copy()
    exec(f"{weights}\n{photographs}", names)
    images = ms.image_folder(names["folder"], per_class=1, progress=False)[:6]
    zoo = ms.pretrained("tf_efficientnet_lite[01]", names["weights"])
    out = tmp_path_factory.mktemp("study")
    study = ms.transfer(zoo, images, partial(ms.pgd, eps=8 / 255, steps=2), out, progress=False)
    names |= dict(images=images, zoo=zoo, study=study, weights_folder=names["weights"])
    yield names
    names["temporary"].cleanup()


def test_photographs_are_told_by_the_weights_that_the_page_renames(cells):
    assert (cells["study"].clean_prediction == cells["study"].label).mean() > 0.8


def test_names_beside_a_photograph_are_those_of_the_networks_that_it_fools(cells):
    study = cells["study"]
    source = study.source.values[0]
    definition = next(cell for cell in code_cells("full_size") if "def fooled_by" in cell)
    exec(definition.partition("\n\n\neveryone")[0], cells)
    adversarial = ms.adversarial_images(study, source, cells["images"])
    for place in range(6):
        with torch.no_grad():
            said = [network(adversarial[place : place + 1]).argmax() for network in cells["zoo"].values()]
        wrong = [
            name.removeprefix("tf_")
            for name, told in zip(cells["zoo"], said, strict=True)
            if told != study.label.values[place]
        ]
        assert cells["fooled_by"](source, place) == wrong


def test_margin_is_the_lead_of_the_true_class(cells):
    definition = next(cell for cell in code_cells("full_size") if "def margins" in cell)
    exec(definition.partition("\n\n\ntarget")[0], cells)
    name = next(iter(cells["zoo"]))
    with torch.no_grad():
        told = cells["zoo"][name](cells["images"].images).numpy()
    labels = cells["images"].labels.numpy()
    best_other = [np.delete(row, label).max() for row, label in zip(told, labels, strict=True)]
    expected = told[np.arange(6), labels] - best_other
    np.testing.assert_allclose(cells["margins"](name), expected, rtol=1e-5)
