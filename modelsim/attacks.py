"""Adversarial attacks as plain functions.

Every attack is a function of (classifier, images, labels) and keyword-only settings that returns
adversarial images on the same canvas. Any callable of this form can be given to `transfer`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from modelsim.images import check_images, check_labels

_AT_A_TIME = 125
"""Images whose gradients are taken together."""


@contextmanager
def frozen(classifier: nn.Module) -> Iterator[nn.Module]:
    """Hold `classifier` in evaluation mode with no parameter taking a gradient.

    On leaving, also by an exception, the mode of every module and every `requires_grad` flag is as
    it was before.
    """
    modes = {module: module.training for module in classifier.modules()}
    flags = {parameter: parameter.requires_grad for parameter in classifier.parameters()}
    try:
        classifier.eval().requires_grad_(False)
        yield classifier
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def checked_logits(classifier: nn.Module, images: Tensor) -> Tensor:
    """Return the logits (n, class) of `images`, or raise if they aren't that.

    Raises
    ------
    ValueError
        If the output isn't a tensor of shape (n, class), or holds NaN.
    """
    logits = classifier(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"a classifier must return logits of shape ({len(images)}, class), got {shape}")
    if logits.isnan().any():
        count = int(logits.isnan().any(1).sum())
        raise ValueError(f"the classifier returned NaN logits for {count} of {len(images)} images")
    return logits


def _input_gradient(classifier: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the cross-entropy of each image with respect to its own pixels."""
    # An image's gradient doesn't depend on its batch, and what a network keeps for it fills the memory.
    gradients = []
    for part, of_part in zip(images.detach().split(_AT_A_TIME), labels.split(_AT_A_TIME), strict=True):
        part.requires_grad_(True)
        loss = cross_entropy(checked_logits(classifier, part), of_part, reduction="sum")
        gradients += torch.autograd.grad(loss, part)
    return torch.cat(gradients)


def _ascend(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    start: Tensor,
    *,
    eps: float,
    steps: int,
    step_size: float,
    decay: float = 0.0,
) -> Tensor:
    """Take `steps` signed gradient steps up the loss, each followed by a projection; return the last."""
    low, high = (images - eps).clamp(min=0), (images + eps).clamp(max=1)
    adversarial, momentum = start, torch.zeros_like(images)
    for _ in range(steps):
        gradient = _input_gradient(classifier, adversarial, labels)
        if decay:
            size = gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
            gradient = momentum = decay * momentum + gradient / size.clamp(min=1e-30)
        adversarial = torch.clamp(adversarial + step_size * gradient.sign(), low, high)
    return adversarial.detach()


def _check_input(images: Tensor, labels: Tensor, classifier: nn.Module, **positive: float) -> None:
    check_images(images)
    # Not inference_mode: what some networks keep from here, ConViT for one, autograd would refuse later.
    with torch.no_grad():
        n_classes = checked_logits(classifier, images[:1]).shape[1]
    check_labels(labels, n_images=len(images), n_classes=n_classes)
    for name, value in positive.items():
        if not value > 0:
            raise ValueError(f"{name} must be greater than 0, got {value}")


def pgd(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float = 18 / 255,
    steps: int = 50,
    step_size: float = 2 / 255,
    seed: int = 0,
) -> Tensor:
    """Projected gradient descent in the L∞ ball: untargeted, random start, final iterate.

    The final iterate is returned also for images on which the attack failed. (Returning the clean
    image there, as several libraries do, would bias every transfer count low.)

    Examples
    --------
    >>> adversarial = pgd(classifier, images, labels, eps=18 / 255, steps=50)
    >>> fooled = classifier(adversarial).argmax(1) != labels

    Parameters
    ----------
    classifier : nn.Module
        Canvas to logits. Left as it was: mode, `requires_grad` flags, no gradient on parameters.
    images : Tensor
        Canvas: float32 (n, channel, height, width) in [0, 1].
    labels : Tensor
        int64 (n,), the true classes.
    eps : float
        Largest change of a pixel, in units of the canvas (0 … 1).
    steps : int
        Gradient steps.
    step_size : float
        Change of a pixel in one step, in units of the canvas.
    seed : int
        Of the random start, uniform in the ball.

    Returns
    -------
    Tensor
        Adversarial images, like `images`; at most `eps` away from them and in [0, 1].

    Raises
    ------
    TypeError, ValueError
        If images, labels or a setting is out of range, or the classifier returns something other
        than finite logits.

    References
    ----------
    Madry et al., *Towards Deep Learning Models Resistant to Adversarial Attacks*, ICLR 2018, eq. (2).
    """
    with frozen(classifier):
        _check_input(images, labels, classifier, eps=eps, steps=steps, step_size=step_size)
        generator = torch.Generator(images.device).manual_seed(seed)
        noise = torch.empty_like(images).uniform_(-eps, eps, generator=generator)
        start = (images + noise).clamp(0, 1)
        return _ascend(classifier, images, labels, start, eps=eps, steps=steps, step_size=step_size)


def fgsm(classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float = 18 / 255) -> Tensor:
    """Fast gradient sign method: one step of size `eps` from the clean image.

    Parameters, result and errors are those of `pgd`.

    References
    ----------
    Goodfellow, Shlens and Szegedy, *Explaining and Harnessing Adversarial Examples*, ICLR 2015, sec. 4.
    """
    with frozen(classifier):
        _check_input(images, labels, classifier, eps=eps)
        return _ascend(classifier, images, labels, images, eps=eps, steps=1, step_size=eps)


def mi_fgsm(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float = 18 / 255,
    steps: int = 10,
    step_size: float = 2 / 255,
    decay: float = 1.0,
) -> Tensor:
    """Momentum iterative FGSM: steps along a decaying sum of L1-normalised gradients.

    Parameters, result and errors are those of `pgd`; `decay` is the weight of the earlier gradients.
    It starts from the clean image.

    References
    ----------
    Dong et al., *Boosting Adversarial Attacks with Momentum*, CVPR 2018, algorithm 1.
    """
    with frozen(classifier):
        _check_input(images, labels, classifier, eps=eps, steps=steps, step_size=step_size, decay=decay)
        return _ascend(
            classifier, images, labels, images, eps=eps, steps=steps, step_size=step_size, decay=decay
        )
