"""The 13 components of an architecture, read off its modules and one traced forward pass.

Nothing is looked up by name but whether an architecture was found by search, of which a model shows no
trace. The pass runs on PyTorch's meta device, on shapes alone: it takes neither weights nor memory.
"""

import copy
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pandas as pd
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modelsim.images import data_directory
from modelsim.zoo import check_timm_name

_SEARCHED_CLASSES = {"EfficientNet", "MobileNetV3", "NASNetALarge", "PNASNet5Large", "RegNet", "RexNet"}
_SEARCHED_NAMES = re.compile("regnet|gernet|swin_s3")  # in classes that hold designed ones too
_DESIGNED_NAMES = re.compile("mobilenetv[12]|lcnet")  # in searched classes

_ACTIVATIONS = {"relu": "ReLU", "gelu": "GeLU", "silu": "SiLU", "leaky_relu": "Leaky ReLU", "mish": "Mish"}
_ACTIVATIONS |= {"hardswish": "HardSwish", "hardtanh": "ReLU6", "elu": "ELU", "_prelu_kernel": "PReLU"}
_ACTIVATION_CLASSES = {"QuickGELU": "GeLU", "Swish": "SiLU", "SwishMe": "SiLU", "StarReLU": "StarReLU"}
_ACTIVATION_CLASSES |= {"SquaredReLU": "Squared ReLU"}
_NORMALIZATIONS = {"native_layer_norm": "LN", "native_batch_norm": "BN", "native_group_norm": "GN"}
_NORMALIZATION_CLASSES = {"EvoNorm": "EvoNorm", "Affine": "Affine transform", "RmsNorm": "RMSNorm"}
_NORMALIZATION_CLASSES |= {"SimpleNorm": "SimpleNorm", "FilterResponseNorm": "FRN"}
_NORMALIZATION_CLASSES |= {"RMSNorm": "RMSNorm", "FrozenBatchNorm": "BN"}
_SPATIAL_ATTENTION = {"LambdaLayer": "Lambda", "HaloAttn": "Halo", "BottleneckAttn": "BoT"}
_SPATIAL_ATTENTION |= {"NonLocalAttn": "NL", "BatNonLocalAttn": "BAT"}
_CHANNEL_ATTENTION = {"SEModule": "SE", "SqueezeExcite": "SE", "SqueezeExciteCl": "SE", "EcaModule": "ECA"}
_CHANNEL_ATTENTION |= {"CecaModule": "ECA", "EffectiveSEModule": "ESE", "EseModule": "ESE", "CoordAttn": "CA"}
_CHANNEL_ATTENTION |= {"GlobalContext": "GCA", "GatherExcite": "GE", "SimpleCoordAttn": "CA"}
_CHANNEL_ATTENTION |= {"CbamModule": "CBAM", "LightCbamModule": "CBAM"}
_ATTENTIVE_CONVOLUTIONS = {"SelectiveKernel": "SK", "SplitAttn": ""}  # the paper names no kind for SplitAttn
_ATTENTION_POOLS = ("AttentionPool2d", "RotAttentionPool2d", "AttentionPoolLatent", "AttentionPoolPrr")
_POOLS = {"mean": "GAP", "avg_pool2d": "GAP", "_adaptive_avg_pool2d": "GAP"}
_POOLS |= {"amax": "max", "max_pool2d_with_indices": "max", "adaptive_max_pool2d": "max"}

_Reading = tuple[str, str]  # a component's value, and the evidence for it


@dataclass(eq=False)
class _Call:
    """One module at work: what it was given and returned, and the operations it ran (start up to end)."""

    path: str
    module: nn.Module
    parent: "_Call | None"
    start: int
    given: list[Tensor]
    returned: list[Tensor] = field(default_factory=list)
    end: int = 0
    children: "list[_Call]" = field(default_factory=list)

    @property
    def kind(self) -> str:
        return type(self.module).__name__

    def ancestors(self) -> "list[_Call]":
        return [] if self.parent is None else [self.parent, *self.parent.ancestors()]

    def within(self, kinds: Iterable[str]) -> bool:
        return any(call.kind in kinds for call in (self, *self.ancestors()))

    def owner(self) -> "_Call":
        """Find the module that holds this one, past mere sequences."""
        return next((call for call in self.ancestors() if not isinstance(call.module, nn.Sequential)), self)

    def branches(self) -> bool:
        """Tell whether several modules inside take the same tensor; one that hands it on doesn't count."""
        inner = [(call.given[0], call.returned[0]) for call in self.children if call.given and call.returned]
        taken = [id(given) for given, returned in inner if _memory(given) != _memory(returned)]
        return len({*taken}) < len(taken)

    def lowers_resolution(self) -> bool:
        before, after = (_places(tensors) for tensors in (self.given, self.returned))
        return before is not None and after is not None and 1 < after < before


@dataclass(eq=False)
class _Operation:
    """One tensor operation of PyTorch, and the module that ran it."""

    index: int
    name: str
    arguments: tuple[Any, ...]
    results: list[Tensor]
    call: _Call

    @property
    def kernel(self) -> tuple[int, int]:
        """Of a convolution, as are those below."""
        height, width = self.arguments[1].shape[-2:]
        return height, width

    @property
    def stride(self) -> int:
        return max(self.arguments[3])

    @property
    def groups(self) -> int:
        return self.arguments[8]

    @property
    def depthwise(self) -> bool:
        return 1 < self.groups == self.arguments[0].shape[1]

    def __str__(self) -> str:
        channels = f"{self.arguments[0].shape[1]} to {self.arguments[1].shape[0]} channels"
        size = "x".join(map(str, self.kernel))
        return f"{self.call.path}: {size}, stride {self.stride}, {channels}, {self.groups} groups"


class _Trace(TorchDispatchMode):
    """All calls and operations of one forward pass; the indices where stem and body end."""

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.operations: list[_Operation] = []
        self._running: list[_Call] = []
        for path, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._enter, path), with_kwargs=True)
            module.register_forward_hook(self._leave, with_kwargs=True)
        with torch.no_grad(), self:
            self.output = model(image)
        # What is computed from weights alone, such as tables of relative positions, is no part of it.
        on_image = self.reached([image])
        self.on_image = [o for o in self.operations if o.index in on_image]
        spatial = [o for o in self.on_image if o.name == "convolution" and o.arguments[1].ndim == 4]
        self.convolutions = [o for o in spatial if not _is_blur(o)]
        self.stem_end, self.body_end = self._bounds(_body_units(model))

    def _bounds(self, units: set[nn.Module]) -> tuple[int, int]:
        """Find where the body starts and ends; without units it starts after the image's convolutions."""
        later = self.reached([result for c in self.convolutions for result in c.results])
        start = max((c.index + 1 for c in self.convolutions if c.index not in later), default=0)
        body = [call for call in self.calls if call.module in units and call.start >= start]
        if not body:
            return start, len(self.operations)
        end = max(call.end for call in body)
        begins = {*body} | {call for call in self.calls if call.start >= start > 0 and call.branches()}
        body = [call for call in self.calls if call in begins]
        holder = body[0].parent
        if holder is not None and holder.start < start and isinstance(holder.module, nn.Sequential):
            # A stem may hold repeated blocks of its own, but fewer than the body.
            after = [call for call in body if call.start >= holder.end]
            body = after if 2 * len(after) > len(body) else body
        return body[0].start, end

    def _enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        parent = self._running[-1] if self._running else None
        call = _Call(path, module, parent, len(self.operations), _tensors((args, kwargs)))
        self.calls.append(call)
        self._running.append(call)
        if parent is not None:
            parent.children.append(call)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        call = self._running.pop()
        call.returned, call.end = _tensors(result), len(self.operations)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name, index = func._schema.name.removeprefix("aten::").rstrip("_"), len(self.operations)
        self.operations.append(_Operation(index, name, args, _tensors(result), self._running[-1]))
        return result

    def body(self, operations: list[_Operation]) -> list[_Operation]:
        return [o for o in operations if self.stem_end <= o.index < self.body_end]

    def executed(self, kinds: Iterable[str]) -> list[_Call]:
        return [call for call in self.calls if call.kind in kinds]

    def reached(self, tensors: list[Tensor], start: int = 0, end: int | None = None) -> set[int]:
        """Follow tensors: the indices of the operations that use them or what became of them."""
        found, known = set(), set(map(_memory, tensors))
        for operation in self.operations[start:end]:
            if not known.isdisjoint(map(_memory, _tensors(operation.arguments))):
                found.add(operation.index)
                known |= set(map(_memory, operation.results))
        return found

    def scales(self, operation: _Operation) -> bool:
        """Tell whether what is made of a map changes that map, as in normalisation and attention."""
        shape, after = operation.arguments[0].shape, self.reached(operation.results, operation.index + 1)
        return any(result.shape == shape for i in after for result in self.operations[i].results)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    """Identify what a tensor shares with its views."""
    return tensor.untyped_storage()._cdata


def _is_blur(operation: _Operation) -> bool:
    """Tell a convolution whose filter is fixed."""
    return operation.name == "convolution" and next(operation.call.module.parameters(), None) is None


def _places(tensors: list[Tensor]) -> int | None:
    """Count the places of a square feature map (channels first or last) or a sequence of tokens."""
    shape = tuple(tensors[0].shape) if tensors else ()
    if len(shape) == 3:
        return shape[0] * shape[1]
    square = len(shape) == 4 and shape[2] in (shape[1], shape[3])
    return shape[0] * shape[2] ** 2 if square else None


def _kind(module: nn.Module) -> Hashable:
    inside = map(_kind, module.children()) if isinstance(module, nn.Sequential) else ()
    return (type(module), *inside)


def _body_units(model: nn.Module) -> set[nn.Module]:
    """Find the stages and blocks of the body, by repetition.

    A block is a module with several weight matrices of a kind that occurs several times; the kind is the
    class, of a sequence also the classes in it. A unit of the body has siblings of its class, and it, or
    one of them if there are no other siblings, has a block.
    """
    count = Counter(map(_kind, model.modules()))
    with_block: set[nn.Module] = set()
    for module in reversed(list(model.modules())):
        matrices = sum(p.numel() > len(p) for p in module.parameters() if p.ndim > 1)
        repeated = count[_kind(module)] > 1 and not isinstance(module, nn.ModuleList)
        if (repeated and matrices > 1) or not with_block.isdisjoint(module.children()):
            with_block.add(module)
    units: set[nn.Module] = set()
    for parent in model.modules():
        children = list(parent.children())
        for unit in children:
            alike = [child for child in children if type(child) is type(unit)]
            if len(alike) > 1 and (unit in with_block or (alike == children and parent in with_block)):
                # A list is never called itself, its modules are.
                units |= set(unit) if isinstance(unit, nn.ModuleList) else {unit}
    return units


def _joined(found: Iterable[tuple[str, Any]], none: _Reading) -> _Reading:
    """Join the values found, each once and with the first evidence for it."""
    first: dict[str, Any] = {}
    for value, evidence in found:
        first.setdefault(value, evidence)
    return (" + ".join(first), "; ".join(f"{k}: {v}" for k, v in first.items())) if first else none


def _base_architecture(trace: _Trace, name: str) -> _Reading:
    base, evidence = _base_by_body(trace)
    searched = [call.kind for call in trace.executed(_SEARCHED_CLASSES)]
    searched = [name] if _SEARCHED_NAMES.search(name) else searched
    if searched and not _DESIGNED_NAMES.search(name):
        found = f"{searched[0]} is listed as found by search"
        return ("NAS (CNN)" if base == "CNN" else "NAS (TFM)"), f"{found}; {evidence}"
    return base, evidence


def _base_by_body(trace: _Trace) -> _Reading:
    """Look for attention and convolutions in the body; those of a downsampling don't make a hybrid."""
    modules = {**_CHANNEL_ATTENTION, **_ATTENTIVE_CONVOLUTIONS, **_SPATIAL_ATTENTION}
    attention = [
        o.call.path
        for o in trace.body(trace.on_image)
        if (o.name in ("bmm", "baddbmm", "_softmax", "_safe_softmax") or o.call.kind.endswith("Attention"))
        and not (isinstance(o.call.module, nn.Linear) or o.call.within(modules))
    ]
    convolutions = trace.body(trace.convolutions)
    mixing = [c for c in convolutions if c.stride < max(c.kernel) and not c.call.owner().lowers_resolution()]
    recurrent = [call.path for call in trace.calls if isinstance(call.module, nn.RNNBase)]
    if recurrent:
        return "RNN", f"recurrent layer {recurrent[0]}"
    if attention:
        if mixing:
            return "Hybrid", f"attention in {attention[0]}; convolution in {mixing[0]}"
        return "Transformer", f"attention in {attention[0]}; no convolution in a block"
    if convolutions:
        return "CNN", f"convolution in {convolutions[0]}; no attention in a block"
    return "MLP-Mixer", "neither attention nor a convolution in a block"


def _hierarchical_structure(trace: _Trace) -> _Reading:
    """Search from the outside in; what a block does inside doesn't count if it keeps the resolution."""
    queue = trace.calls[:1]
    while queue:
        call = queue.pop(0)
        if call.start >= trace.stem_end:
            if call.lowers_resolution():
                return "Yes", f"{call.path}: {_places(call.given)} to {_places(call.returned)} places"
            if {_places([tensor]) for tensor in call.returned} == {_places(call.given)} != {None}:
                continue
        queue[:0] = call.children
    return "No", "no module after the stem lowers the resolution"


def _stem_layer(trace: _Trace) -> _Reading:
    """Take the convolutions before the body; of parallel ones, the one with the largest kernel."""
    stem: dict[int, _Operation] = {}
    for c in trace.convolutions:
        if c.index < trace.stem_end and not c.call.within(_CHANNEL_ATTENTION):
            other = stem.setdefault(id(c.arguments[0]), c)
            stem[id(c.arguments[0])] = max(other, c, key=lambda c: c.kernel)
    layers = ["x".join(map(str, sorted({*c.kernel}))) for c in stem.values()]
    strides = [f"s{c.stride}" if c.stride > 1 or i == 0 else "" for i, c in enumerate(stem.values())]
    value = "/".join(map("".join, zip(layers, strides, strict=True)))
    return (value, "; ".join(map(str, stem.values()))) if stem else ("~", "no convolution before the body")


def _stem_pooling(trace: _Trace) -> _Reading:
    start = trace.convolutions[0].index if trace.convolutions else 0
    for o in trace.operations[start : trace.stem_end]:
        pools = o.name in ("max_pool2d_with_indices", "avg_pool2d") or _is_blur(o)
        if pools and o.results[0].shape[-1] < o.arguments[0].shape[-1]:
            return "Yes", f"{o.call.path}: {o.call.kind}"
    return "No", "no pooling before the body"


def _normalization(trace: _Trace) -> _Reading:
    found = [(_NORMALIZATIONS[o.name], o.call.path) for o in trace.on_image if o.name in _NORMALIZATIONS]
    for kind, value in _NORMALIZATION_CLASSES.items():
        found += [(value, call.path) for call in trace.calls if call.kind.startswith(kind)]
    order = [*_NORMALIZATIONS.values(), *_NORMALIZATION_CLASSES.values()]
    return _joined(sorted(found, key=lambda f: order.index(f[0])), ("Norm-free", "nothing normalises"))


def _activation(trace: _Trace) -> _Reading:
    found = []
    for o in trace.on_image:
        kind = next((kind for kind in (o.call.kind, o.call.owner().kind) if kind in _ACTIVATION_CLASSES), "")
        if value := _ACTIVATION_CLASSES.get(kind, _ACTIVATIONS.get(o.name)):
            found.append((value, o.call.path))
    return _joined(sorted(found, key=lambda f: f[0]), ("-", "no activation function runs"))


def _final_pooling(trace: _Trace) -> _Reading:
    found = [(v, o) for o in trace.operations[trace.stem_end :] if (v := _pooling(trace, o)) is not None]
    if trace.body_end < len(trace.operations):
        # A class token may leave the map in the last block already.
        found = [(v, o) for v, o in found if o.index >= trace.body_end] or found[-1:]
    readings = [(v, f"{o.name} in {o.call.path or o.call.kind}") for v, o in found]
    return _joined(readings, ("~", "nothing after the body pools the whole map"))


def _pooling(trace: _Trace, operation: _Operation) -> str | None:
    """Name how an operation makes one vector of a whole feature map, or return None if it doesn't."""
    name, (source, *options), results = operation.name, operation.arguments or (None,), operation.results
    if operation.call.within(_ATTENTION_POOLS):
        return "Attention"
    if not isinstance(source, Tensor) or not results or operation.call.within(_CHANNEL_ATTENTION):
        return None
    if source.ndim not in (3, 4) or (_places([source]) or 1) == 1 or source.shape[0] > 1:
        return None
    selected = name == "select" and options == [1, 0]
    sliced = name == "slice" and options[:2] == [1, 0] and results[0].shape[1] <= 2
    if source.ndim == 3 and (selected or sliced):
        return "CLS token"
    if name not in _POOLS or results[0].numel() not in (source.shape[1], source.shape[-1]):
        return None
    return None if trace.scales(operation) else _POOLS[name]


def _attention(trace: _Trace, kinds: Mapping[str, str]) -> _Reading:
    calls = sorted(trace.executed(kinds), key=lambda call: list(kinds).index(call.kind))
    first = {kinds[call.kind]: call for call in reversed(calls)}
    names = ", ".join(filter(None, reversed(first)))
    value = f"Yes ({names})" if names else "Yes"
    evidence = "; ".join(f"{call.path}: {call.kind}" for call in reversed(first.values()))
    return (value, evidence) if first else ("No", "none of its classes runs")


def _location(trace: _Trace) -> _Reading:
    """Ask whether a convolution of the same block uses what the attention returns."""
    found = []
    for call in trace.executed(_CHANNEL_ATTENTION):
        owner = call.owner()
        used = trace.reached(call.returned, call.end, owner.end)
        later = [c.call.path for c in trace.convolutions if c.index in used]
        where = f"{call.path} before {later[0]}" if later else f"{call.path} after all of {owner.path}"
        found.append(("Middle" if later else "End", where))
    return _joined(sorted(found, reverse=True), ("~", "no channel attention beside the convolutions"))


def _depthwise(trace: _Trace) -> _Reading:
    found = [str(c) for c in trace.convolutions if c.depthwise and max(c.kernel) > 1]
    return ("Yes", found[0]) if found else ("No", "no convolution has a group for each channel")


def _grouped(trace: _Trace) -> _Reading:
    found = [str(c) for c in trace.convolutions if c.groups > 1 and not c.depthwise]
    return ("Yes", found[0]) if found else ("No", "no convolution has groups of several channels")


def _configured(model: nn.Module, key: str, default: Any) -> Any:
    return (getattr(model, "pretrained_cfg", None) or {}).get(key) or default


def _image(model: nn.Module, input_size: int | None) -> Tensor:
    """Make an image of the size, the channels and the precision that the model takes."""
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    told = built or _configured(model, "input_size", ())[-2:]
    size = told if input_size is None else (input_size, input_size)
    if len(size) != 2 or size[0] != size[1]:
        known = "x".join(map(str, size)) or "none"
        raise ValueError(
            f"components are read off a square image, and this {type(model).__name__} tells "
            f"the input size {known}: give input_size, in pixels"
        )
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = getattr(model, "in_chans", 3 if convolution is None else convolution.in_channels)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    return torch.zeros(1, channels, *size, dtype=dtype, device="meta")


def _on_meta(model: nn.Module) -> nn.Module:
    """Copy a model, but for the values of its tensors, also of those that are neither weights nor buffers."""
    copies: dict[int, Any] = {}
    for tensor in _tensors([vars(module) for module in model.modules()]):
        meta = tensor.detach().to("meta")
        copies[id(tensor)] = nn.Parameter(meta, False) if isinstance(tensor, nn.Parameter) else meta
    return copy.deepcopy(model, copies).eval()


def _trace(model: nn.Module, input_size: int | None) -> _Trace:
    kind = type(model).__name__
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule | torch.fx.GraphModule):
        raise TypeError(f"components are read off an nn.Module as it was written, not exported, got {kind}")
    image = _image(model, input_size)
    try:
        trace = _Trace(_on_meta(model), image)
    except Exception as error:
        raise ValueError(
            f"this {kind} does not run on images of shape {tuple(image.shape)}: expected a classifier of "
            f"timm, and its own input_size ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(trace.output, Tensor) or trace.output.ndim != 2:
        raise ValueError(f"this {kind} is no classifier: expected one that returns logits (n, class)")
    return trace


def _read(model: nn.Module, input_size: int | None, name: str | None) -> dict[str, _Reading]:
    trace = _trace(model, input_size)
    height, width = trace.calls[0].given[0].shape[-2:]
    return {
        "Base architecture": _base_architecture(trace, name or _configured(model, "architecture", "")),
        "Hierarchical structure": _hierarchical_structure(trace),
        "Stem layer": _stem_layer(trace),
        "Input resolution": (f"{height} x {width}", f"logits of shape {tuple(trace.output.shape)}"),
        "Normalization": _normalization(trace),
        "Activation": _activation(trace),
        "Pooling (stem)": _stem_pooling(trace),
        "Pooling (final)": _final_pooling(trace),
        "2D SA": _attention(trace, _SPATIAL_ATTENTION),
        "CW attention": _attention(trace, _CHANNEL_ATTENTION | _ATTENTIVE_CONVOLUTIONS),
        "Location of CW attention": _location(trace),
        "DW conv": _depthwise(trace),
        "Group conv": _grouped(trace),
    }


def components(
    model: nn.Module, *, input_size: int | None = None, name: str | None = None, evidence: bool = False
) -> pd.Series:
    """Read the 13 components of an architecture off a model.

    What is read is what runs in one forward pass and depends on the image. The stem is what runs before
    the body, which starts with the first of the repeated blocks, the stage that holds it, or a module of
    several branches.

    - *Base architecture*: with attention in the body a Transformer, or a Hybrid if convolutions larger
      than their stride stand there too, outside downsamplings; a CNN with convolutions alone, and an
      MLP-Mixer without any; RNN, which the paper has not, with recurrent layers. Classes and names
      listed in this module as found by search are NAS (CNN), or NAS (TFM) with attention.
    - *Hierarchical structure*: whether the body lowers the resolution to more than one place.
    - *Stem layer*: kernel and stride of its convolutions as they run, parallel ones of one input once.
    - *Normalization*: also inside attention; *Norm-free* is a network without any.
    - *Activation*: also inside channel attention; gates (sigmoids, softmax) are none.
    - *2D SA*, *CW attention*: timm's modules of these kinds. Attention across channels in a Transformer
      is its body. Split attention is *Yes*, and, like selective kernels, has no location.
    - *Location*: *Middle* if a convolution of the same block uses what the attention returns, else *End*.
    - *DW conv*, *Group conv*: fixed filters of blur pools don't count, nor do groups of one channel for
      *Group conv*.

    Examples
    --------
    >>> components(timm.create_model("seresnet50"))["CW attention"]
    'Yes (SE)'

    Parameters
    ----------
    model : nn.Module
        A classifier of timm, with any weights or on the meta device; it stays as it is.
    input_size : int, optional
        Side of the image, in pixels; by default what the model was built for, as far as it tells.
    name : str, optional
        Name in timm, for the search of architectures alone; by default what the model tells.
    evidence : bool
        Return what proves each value instead: the modules that show it.

    Returns
    -------
    Series
        Text by component, in the spelling of the paper's table.

    Raises
    ------
    TypeError
        If `model` is no module, or one that was scripted, traced or exported.
    ValueError
        If it tells no square size of its input and none is given, doesn't run on such an image, or
        returns no logits.

    References
    ----------
    Hwang et al., arXiv 2210.11407, the table of components in its appendix.
    """
    readings = _read(model, input_size, name)
    shown = {key: proof if evidence else value for key, (value, proof) in readings.items()}
    return pd.Series(shown, name=name)


def components_table() -> pd.DataFrame:
    """Open the stored table of the catalogue's components, as `read_components` gives it.

    Examples
    --------
    >>> components_table()["Normalization"].value_counts()

    Returns
    -------
    DataFrame
        One row an architecture, the 13 columns of `components`, strings.
    """
    path = data_directory() / "fashion69" / "components.csv"
    return pd.read_csv(path, index_col="model", keep_default_na=False)


def read_components(names: str | Iterable[str], *, evidence: bool = False) -> pd.DataFrame:
    """Read the components of timm's models, built without weights.

    Examples
    --------
    >>> read_components(["resnet50", "convnext_tiny"]).T

    Parameters
    ----------
    names : str or iterable of str
        Names of timm.
    evidence : bool
        As for `components`.

    Returns
    -------
    DataFrame
        One row a model, the 13 columns of `components`.

    Raises
    ------
    ValueError
        If timm doesn't know a name; the message suggests the nearest.
    """
    rows = {}
    for name in [names] if isinstance(names, str) else names:
        check_timm_name("model of timm", name)
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
        rows[name] = components(model, name=name, evidence=evidence)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")
