"""How similar are two neural networks? Similarity of image classifiers by attack transferability."""

__version__ = "0.1.0"

from modelsim.agreement import agreement, jackknife
from modelsim.attacks import fgsm, pgd
from modelsim.catalogue import CATALOGUE, Architecture
from modelsim.clustering import distance, spectral_clusters
from modelsim.compare import compare
from modelsim.components import components, components_table, read_components
from modelsim.ensembles import vote
from modelsim.forecast import forecast, pair_features
from modelsim.images import ImageSet, data_directory, fashion_mnist, image_folder
from modelsim.measures import (
    capa,
    error_consistency,
    gradient_cosine,
    jensen_shannon,
    linear_cka,
    measure,
    penultimate_features,
    prediction_agreement,
)
from modelsim.plan import plan
from modelsim.pretrained import pretrained
from modelsim.published import PublishedScoresUnavailable, published_components, published_sat
from modelsim.scores import (
    first_seeds,
    interval,
    main_effects,
    neighbours,
    pairs,
    relative_sat,
    sat,
    transferability,
    white_box_success,
)
from modelsim.study import adversarial_images, open_study
from modelsim.training import Recipe, Teacher, accuracy, fit, train, training_table
from modelsim.transfer import transfer
from modelsim.zoo import Classifier, Zoo, build, load_weights, load_zoo, save_weights

# fmt: off
__all__ = [
    "CATALOGUE", "Architecture", "Classifier", "ImageSet", "PublishedScoresUnavailable", "Recipe", "Teacher",
    "Zoo", "accuracy", "adversarial_images", "agreement", "build", "capa", "compare", "components",
    "components_table", "data_directory", "distance", "error_consistency", "fashion_mnist", "fgsm",
    "first_seeds", "fit", "forecast", "gradient_cosine", "image_folder", "interval", "jackknife",
    "jensen_shannon", "linear_cka", "load_weights", "load_zoo", "main_effects", "measure", "neighbours",
    "open_study", "pair_features", "pairs", "penultimate_features", "pgd", "plan", "prediction_agreement",
    "pretrained", "published_components", "published_sat", "read_components", "relative_sat", "sat",
    "save_weights", "spectral_clusters", "train", "training_table", "transfer", "transferability", "vote",
    "white_box_success",
]
# fmt: on
