"""How similar are two neural networks? Similarity of image classifiers by attack transferability."""

from modelsim.agreement import Agreement, agreement
from modelsim.attacks import fgsm, mi_fgsm, pgd
from modelsim.catalogue import CATALOGUE, Architecture
from modelsim.clustering import (
    ChanceTest,
    choose_k,
    cluster_agreement,
    consensus,
    distance,
    eigenvalues,
    embed,
    enrichment,
    perturbed,
    resampled,
    shuffled,
    spectral_clusters,
    stability,
    structure,
    tree,
)
from modelsim.compare import compare
from modelsim.components import components, disagreements, evidence, read_components
from modelsim.images import ImageSet, data_directory, fashion_mnist
from modelsim.published import PublishedScoresUnavailable, published_components, published_sat
from modelsim.scores import (
    interval,
    main_effects,
    relative_sat,
    sat,
    transferability,
    white_box_success,
)
from modelsim.training import Recipe, accuracy, train, train_zoo, training_table
from modelsim.transfer import adversarial_images, open_study, transfer
from modelsim.zoo import Classifier, Zoo, build, load_zoo

__all__ = [
    "CATALOGUE",
    "Agreement",
    "Architecture",
    "ChanceTest",
    "Classifier",
    "ImageSet",
    "PublishedScoresUnavailable",
    "Recipe",
    "Zoo",
    "accuracy",
    "adversarial_images",
    "agreement",
    "build",
    "choose_k",
    "cluster_agreement",
    "compare",
    "components",
    "consensus",
    "data_directory",
    "disagreements",
    "distance",
    "eigenvalues",
    "embed",
    "enrichment",
    "evidence",
    "fashion_mnist",
    "fgsm",
    "interval",
    "load_zoo",
    "main_effects",
    "mi_fgsm",
    "open_study",
    "perturbed",
    "pgd",
    "published_components",
    "published_sat",
    "read_components",
    "relative_sat",
    "resampled",
    "sat",
    "shuffled",
    "spectral_clusters",
    "stability",
    "structure",
    "train",
    "train_zoo",
    "training_table",
    "transfer",
    "transferability",
    "tree",
    "white_box_success",
]
