"""Adversarial attacks as plain functions.

Every attack is a function of (classifier, images, labels) and keyword-only settings that returns
adversarial images on the same canvas. Any callable of this form can be given to `transfer`.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from modelsim.images import check_images, check_labels, check_number, check_whole, to_canvas

AT_A_TIME = 125
"""Images whose gradients are taken together, at most."""

_PIXELS_AT_A_TIME = 2**18
"""The same on a processor: more leave its caches, and of photographs fill its memory."""

_Limits = WeakKeyDictionary[nn.Module, int]
# How many images a network can take together, where memory ran out with more.
_LOGITS, _GRADIENTS = _Limits(), _Limits()


@contextmanager
def frozen(classifier: nn.Module) -> Iterator[nn.Module]:
    """Hold a classifier in evaluation mode with no parameter taking a gradient.

    Around it, autograd is switched on and reduced precision off.

    On leaving, also by an exception, the mode of every module, and every parameter's `requires_grad` flag
    and gradient, is as it was before. What is yielded is a copy if the classifier was made in torch's
    inference mode, whose tensors autograd refuses.

    Raises
    ------
    TypeError
        If it isn't a module.
    """
    if not isinstance(classifier, nn.Module):
        raise TypeError(
            f"a classifier must be a torch.nn.Module, got {type(classifier).__name__}: wrap it in "
            "one; of a class, give an object; a function that makes one must return it"
        )
    tensors = [*classifier.parameters(), *classifier.buffers()]
    device = next(filter(torch.amp.is_autocast_available, (t.device.type for t in tensors)), "cpu")
    with torch.inference_mode(mode=False), torch.enable_grad(), torch.autocast(device, enabled=False):
        if any(tensor.is_inference() for tensor in tensors):
            classifier = copy.deepcopy(classifier)
        modes = {module: module.training for module in classifier.modules()}
        flags = {p: (p.requires_grad, p.grad) for p in classifier.parameters()}
        try:
            with suppress(NotImplementedError):  # of an exported module, which has one mode only
                classifier.eval()
            for parameter in flags:
                parameter.requires_grad_(False)
            yield classifier
        finally:
            for module, mode in modes.items():
                module.training = mode
            for parameter, (flag, gradient) in flags.items():
                parameter.requires_grad_(flag)
                parameter.grad = gradient


def checked_logits(classifier: nn.Module, images: Tensor) -> Tensor:
    """Return the logits (n, class) of a copy of `images`, or raise if they aren't that.

    Raises
    ------
    ValueError
        If the classifier raises, or its output isn't a tensor of shape (n, class), or holds NaN or infinity.
    torch.OutOfMemoryError
        If the classifier raises that.
    """
    try:
        logits = classifier(images.clone())
    except torch.OutOfMemoryError:  # which has another remedy
        raise
    except Exception as error:  # whatever a network raises
        raise ValueError(
            f"{type(error).__name__}: {str(error).rstrip('.')}. A classifier takes a canvas in [0, 1], here "
            f"float32 of shape {tuple(images.shape)}: let its forward cast, resize (the input_size of "
            "Classifier) or repeat channels as its layers need"
        ) from error
    is_tensor = isinstance(logits, Tensor) and logits.is_floating_point()
    if not is_tensor or logits.ndim != 2 or len(logits) != len(images):
        shape = tuple(logits.shape) if is_tensor else getattr(logits, "dtype", type(logits).__name__)
        raise ValueError(f"a classifier must return logits of shape ({len(images)}, class), got {shape}")
    if not (finite := logits.isfinite()).all():
        what, count = "NaN" if logits.isnan().any() else "infinite", int((~finite.all(1)).sum())
        raise ValueError(f"the classifier returned {what} logits for {count} of {len(images)} images")
    return logits.float()


def _in_parts(
    compute: Callable[[slice], Tensor], n_images: int, classifier: nn.Module, limits: _Limits, most: int
) -> Tensor:
    """Compute for at most so many images together, and for half as many whenever memory runs out."""
    results, start = [], 0
    while start < n_images:
        size = min(most, limits.get(classifier, most), n_images - start)
        try:
            results.append(compute(slice(start, start + size)))
        except torch.OutOfMemoryError as error:
            if size == 1:
                raise ValueError(f"memory doesn't suffice for a single image: {error}") from error
            limits[classifier] = size // 2
        else:
            start += size
    return torch.cat(results)


def logits(
    classifier: nn.Module, canvas: Tensor, *, batch_size: int = 100, device: str | None = None
) -> Tensor:
    """Return logits (image, class) on the CPU, in evaluation mode; the classifier is left as it was.

    Parameters
    ----------
    classifier : nn.Module
        Canvas to logits, on `device`.
    canvas : Tensor
        (image, channel, height, width) in [0, 1], or uint8 in 0 … 255, which is made float batch by batch;
        the classifier is handed copies.
    device : str, optional
        Where the classifier is; by default where the canvas is.

    Raises
    ------
    TypeError, ValueError
        As `frozen` and `checked_logits`; or if memory doesn't suffice for a single image.
    """
    # Not inference_mode: what some networks keep from here, ConViT for one, autograd would refuse later.
    with frozen(classifier) as still, torch.no_grad():

        def compute(part: slice) -> Tensor:
            images = to_canvas(canvas[part].to(device or canvas.device))
            # Copied, because a network may hand out one tensor again and again.
            return checked_logits(still, images).to("cpu", copy=True)

        return _in_parts(compute, len(canvas), classifier, _LOGITS, batch_size)


def gradients_at_a_time(device: str | torch.device, pixels: int) -> int:
    """Return of how many images, of so many pixels each, gradients are taken together."""
    few = max(1, _PIXELS_AT_A_TIME // pixels)
    return min(AT_A_TIME, few) if torch.device(device).type == "cpu" else AT_A_TIME


def input_gradients(classifier: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the cross-entropy of each image with respect to its own pixels."""

    def compute(part: slice) -> Tensor:
        leaf = images[part].detach().clone().requires_grad_(True)
        loss = cross_entropy(checked_logits(classifier, leaf), labels[part].clone(), reduction="sum")
        gradient = torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
        if gradient is None:
            raise ValueError(
                "its logits can't be differentiated by its images: look for no_grad, detach or argmax in it"
            )
        return gradient

    # An image's gradient doesn't depend on its batch, and what a network keeps for it fills the memory.
    most = gradients_at_a_time(images.device, images.shape[2:].numel())
    return _in_parts(compute, len(images), classifier, _GRADIENTS, most)


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
        gradient = input_gradients(classifier, adversarial, labels)
        if decay:
            size = gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
            gradient = momentum = decay * momentum + gradient / size.clamp(min=1e-30)
        adversarial = torch.clamp(adversarial + step_size * gradient.sign(), low, high)
    return adversarial.detach()


def _check_input(images: Tensor, labels: Tensor, classifier: nn.Module, **settings: Any) -> None:
    check_whole(steps=settings.pop("steps", 1))
    check_whole(least=0, seed=settings.pop("seed", 0))
    check_number(most=1, eps=settings.pop("eps"))
    check_number(**settings)
    check_images(images)
    with torch.no_grad():
        n_classes = checked_logits(classifier, images[:1]).shape[1]
    check_labels(labels, n_images=len(images), n_classes=n_classes)


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
    with frozen(classifier) as still:
        _check_input(images, labels, still, eps=eps, steps=steps, step_size=step_size, seed=seed)
        generator = torch.Generator(images.device).manual_seed(int(seed))
        noise = torch.empty_like(images).uniform_(-eps, eps, generator=generator)
        start = (images + noise).clamp(0, 1)
        return _ascend(still, images, labels, start, eps=eps, steps=steps, step_size=step_size)


def fgsm(classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float = 18 / 255) -> Tensor:
    """Fast gradient sign method: one step of size `eps` from the clean image.

    Parameters, result and errors are those of `pgd`.

    References
    ----------
    Goodfellow, Shlens and Szegedy, *Explaining and Harnessing Adversarial Examples*, ICLR 2015, sec. 4.
    """
    with frozen(classifier) as still:
        _check_input(images, labels, still, eps=eps)
        return _ascend(still, images, labels, images, eps=eps, steps=1, step_size=eps)


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
    with frozen(classifier) as still:
        _check_input(images, labels, still, eps=eps, steps=steps, step_size=step_size, decay=decay)
        return _ascend(still, images, labels, images, eps=eps, steps=steps, step_size=step_size, decay=decay)
