"""How similar are two neural networks? Similarity of image classifiers by attack transferability."""

from modelsim.attacks import fgsm, mi_fgsm, pgd
from modelsim.clustering import distance, embed, spectral_clusters
from modelsim.images import ImageSet, data_directory, fashion_mnist
from modelsim.scores import interval, sat, transferability, white_box_success
from modelsim.training import Recipe, accuracy, train, train_zoo, training_table
from modelsim.transfer import adversarial_images, open_study, transfer
from modelsim.zoo import CATALOGUE, Architecture, Classifier, Zoo, build, load_zoo

__all__ = [
    "CATALOGUE",
    "Architecture",
    "Classifier",
    "ImageSet",
    "Recipe",
    "Zoo",
    "accuracy",
    "adversarial_images",
    "build",
    "data_directory",
    "distance",
    "embed",
    "fashion_mnist",
    "fgsm",
    "interval",
    "load_zoo",
    "mi_fgsm",
    "open_study",
    "pgd",
    "sat",
    "spectral_clusters",
    "train",
    "train_zoo",
    "training_table",
    "transfer",
    "transferability",
    "white_box_success",
]
