"""Converts one block of a pretrained model without memory for the others."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from dblocks.blocks import BlocksConfig
from dblocks.blocks.config import check_config
from dblocks.checkpoint import naming
from dblocks.checkpoint.tensors import opened
from dblocks.config import check_block, read_json
from dblocks.integrations.convert import ConvertedBlocks, Task
from dblocks.integrations.convert.find import Layers
from dblocks.integrations.convert.network import Converted
from dblocks.integrations.convert.options import ConvertOptions
from dblocks.integrations.convert.tasks import library_of, network_of
from dblocks.scale.outline import META, Outline, Uncopied
from dblocks.scale.places import Place, check_complete, fitted, own_tensors

INDEX = ".safetensors.index.json"
WHOLE = "load the whole model, and convert it"
ALONE = ("frozen", "private")  # values of `shared` for which jobs need no communication


def convert_block(
    make: Callable[[], nn.Module],
    folder: str | Path,
    config: BlocksConfig,
    block: int,
    *,
    task: Task,
    layers: Layers | None = None,
    **options: Any,
) -> ConvertedBlocks:
    """`convert` for a pretrained model, with the weights of one block only.

    Its `block(block)` is bitwise the same as after `convert` of the whole model, and as many random
    numbers are drawn; the other layers are on the meta device. During the call the host also holds
    the first layer, on which the added modules are fitted. The first layer is compared with its
    parts as in `convert`, but the whole model is not: for that, `convert` a model of the same
    family with fewer layers.

    Args:
        make: creates the original model, with any weights, such as `lambda:
            LlamaForCausalLM(LlamaConfig.from_pretrained(folder))`. In the call, parameters have no
            memory and no random numbers are drawn. Weights get the dtype of these parameters.
        folder: folder of the weights, as written by the model's `save_pretrained`: one safetensors
            file, or several with an index.
        config: the number of blocks and the options of their training, with `shared` of "frozen"
            or "private".
        block: index of the block.
        task: see `convert`.
        layers: see `convert`.
        **options: other options of `convert`, except `check`.

    Returns:
        The model in blocks: train its `block(block)`, and save it with `save_pretrained(folder,
        block=block)`. Call `torch.manual_seed` with the same seed in all jobs before: the weights
        of the added modules are drawn.

    Raises:
        TypeError: as for `convert`; `make` is not a function; or `check` is given.
        ValueError: as for `convert`; `block` is out of range; `shared` has another value; there is
            a clean loss, which needs the whole model; `make` returns a model that it did not
            create, or one that `convert` cannot read without values; or the folder does not hold
            the weights of the model in a floating dtype of at least 16 bits.
        RuntimeError: the model cannot be created without memory.

    Warns:
        UserWarning: the folder holds tensors that the model does not have.
    """
    if isinstance(make, nn.Module) or not callable(make):
        raise TypeError(
            "make must be a function without arguments that makes the plain model, got "
            f"{type(make).__name__}"
        )
    if "check" in options:
        raise TypeError(
            "check must be left out: only convert has it, as a comparison needs the whole model, "
            f"got check={options['check']!r}; {WHOLE} with check"
        )
    check_config(config)
    check_block(block, config.num_blocks)
    if config.shared not in ALONE:
        raise ValueError(
            f"shared must be one of {ALONE} for a block alone, got {config.shared!r}, whose copies "
            "in the jobs would become different; pass shared= in BlocksConfig"
        )
    chosen = ConvertOptions(**options)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are raised once more below
        model = _outlined(make)
        try:
            with _rotations_fixed(model):
                network = network_of(model, config, task, layers, chosen)
        except RuntimeError as error:  # the model's code reads values
            raise ValueError(
                "the code of the model must run on tensors without values to create one "
                f"block, got: {_first_line(error)}; {WHOLE}"
            ) from error
        outline = ConvertedBlocks(network, config, task, chosen)
        outline.block(block)  # raises if the block cannot be used alone
    names = outline.base_model.names
    here = range(*outline.layer_ranges[block])
    _fill(model, [name for i, name in enumerate(names) if i and i not in here], Path(folder))
    network = network_of(model, config, task, layers, chosen)
    with Uncopied():
        converted = ConvertedBlocks(network, config, task, chosen)
    _let_go(converted, block, here)
    check_complete(converted.block(block), WHOLE)
    return converted


def _outlined(make: Callable[[], nn.Module]) -> nn.Module:
    try:
        with Outline(floats=True) as outline:
            model = make()
    except RuntimeError as error:
        reason = _first_line(error)
        raise RuntimeError(
            f"the model cannot be created without memory: {reason}; {WHOLE}"
        ) from error
    if isinstance(model, nn.Module):
        for name, parameter in model.named_parameters():
            if not outline.is_made(parameter):  # an existing model's weight
                raise ValueError(
                    f"make must create the model, got one whose {name} existed before or was "
                    "loaded; create it from its config inside the function"
                )
    return model


@contextmanager
def _rotations_fixed(model: nn.Module) -> Iterator[None]:
    """Disables dynamic rotary embeddings of transformers inside the `with` block.

    They read the largest position, which has no value in an outline.
    """
    inside = model.modules() if isinstance(model, nn.Module) else ()
    kinds = {m: cast(Any, m.rope_type) for m in inside if hasattr(m, "rope_type")}
    for module, kind in kinds.items():
        fixed: Any = dict.fromkeys(kind, "default") if isinstance(kind, Mapping) else "default"
        cast(Any, module).rope_type = fixed
    try:
        yield
    finally:
        for module, kind in kinds.items():
            cast(Any, module).rope_type = kind


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _fill(model: nn.Module, without: Sequence[str], folder: Path) -> None:
    """Reads all tensors of a model, except those under the given paths."""
    gone = {id(module) for path in without for module in model.get_submodule(path).modules()}
    groups: dict[int, list[Place]] = {}  # tied tensors are in one group
    places: dict[str, list[Place]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in () if id(module) in gone else own_tensors(module):
            if (place := Place(path, module, name)).saved:
                places[f"{path}.{name}".removeprefix(".")] = groups.setdefault(id(tensor), [])
                groups[id(tensor)].append(place)
    known, unknown, inside = set(model.state_dict()), list[str](), _renaming(model)
    filled: dict[int, _Filled] = {}
    for file in _files(folder):
        with naming(file), opened(file, foreign=True) as held:
            for stored in sorted(held.keys()):
                if (name := inside(stored)) in places:
                    found = _Filled(name, f"{stored} in {file.name}", held.get_tensor(stored))
                    _take(filled, places[name], found)
                elif name not in known:
                    unknown.append(stored)
    kind = type(model).__name__
    if missing := [name for name, group in places.items() if id(group) not in filled]:
        raise ValueError(
            f"{folder} must hold all weights of a {kind} under the names of its state_dict, but "
            f"{missing[0]} is missing ({len(missing)} are); write it with the save_pretrained of "
            f"a {kind}"
        )
    if unknown:
        warnings.warn(
            f"{folder} holds {len(unknown)} tensors that a {kind} does not have, such as "
            f"{unknown[0]}; they are ignored",
            UserWarning,
            stacklevel=3,
        )


class _Filled(NamedTuple):
    """A tensor read from a file."""

    name: str
    """In the model."""
    stored: str
    """Its name in the file, and that of the file."""
    tensor: Tensor


def _take(filled: dict[int, _Filled], group: list[Place], found: _Filled) -> None:
    """Writes a tensor of a file to a group of tied places."""
    name, like = found.name, group[0].tensor
    fresh: Any = fitted(name, found.tensor, like)
    if (before := filled.get(id(group))) is not None:
        if before.tensor.equal(fresh):
            return
        if before.name == name:
            raise ValueError(
                f"{name} must be stored once, or always with the same values, got other values in "
                f"{before.stored} than in {found.stored}; remove the outdated one"
            )
        raise ValueError(f"{name} must be the tensor to which the model ties it, got another")
    if isinstance(like, nn.Parameter):
        fresh = nn.Parameter(fresh, requires_grad=like.requires_grad)
    filled[id(group)] = found._replace(tensor=fresh)
    for place in group:
        place.put(fresh)


def _renaming(model: nn.Module) -> Callable[[str], str]:
    """Maps names in files to names in the model, which transformers may have renamed."""
    if library_of(model) != "transformers":
        return str
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # before transformers 5
        return str
    known = model.state_dict()
    rules = get_model_conversion_mapping(cast(Any, model))
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    others = cast(Any, [rule for rule in rules if not isinstance(rule, WeightRenaming)])
    prefix = getattr(model, "base_model_prefix", None)

    def renamed(stored: str) -> str:
        name, converted = rename_source_key(stored, renamings, others, prefix, known)
        if converted is not None:
            raise ValueError(
                f"{stored} must be stored as a {type(model).__name__} holds it, not in a form that "
                "transformers converts; write the model with save_original_format=False"
            )
        return name

    return renamed


def _files(folder: Path) -> list[Path]:
    """The files of a model's weights in a folder."""
    index, files = sorted(folder.glob(f"*{INDEX}")), sorted(folder.glob("*.safetensors"))
    if len(index) == 1:
        with naming(index[0]):
            found = read_json(index[0])
            named = found.get("weight_map") if isinstance(found, dict) else None
            if not isinstance(named, dict) or not all(isinstance(n, str) for n in named.values()):
                raise ValueError("it must have a weight_map from names to files")
            if not named:
                raise ValueError(
                    "its weight_map must name the files of the weights, got an empty map; write "
                    "the model with its save_pretrained"
                )
            files = [folder / name for name in sorted(set(named.values()))]
            if outside := [file for file in files if file.parent != folder]:
                raise ValueError(f"it must name files in its own folder, got {outside[0]}")
            if missing := [file.name for file in files if not file.is_file()]:
                raise ValueError(
                    f"all of the {len(files)} files that it names must be in its folder, but "
                    f"{missing[0]} is missing ({len(missing)} are); get it, or write the model "
                    "with its save_pretrained"
                )
    elif index or len(files) != 1:
        listed = ", ".join(path.name for path in index or files) or "none"
        raise ValueError(
            f"{folder} must hold one file *.safetensors, or several with one *{INDEX}, got {listed}"
        )
    return files


def _let_go(converted: ConvertedBlocks, block: int, here: range) -> None:
    """Frees the memory of all tensors that one block does not use."""
    network: Converted = converted.base_model
    modules = {
        id(module): module
        for i, layer in enumerate(network.layers)
        if i not in here
        for module in layer.modules()
    }
    if converted.config.copied:
        inside = {id(module) for layer in network.layers for module in layer.modules()}
        views = (network, *converted.copies.children())
        for own, view in enumerate(views):
            if own != block:
                modules |= {id(m): m for m in view.modules() if id(m) not in inside}
    empty: dict[int, Tensor] = {}  # tied tensors stay tied
    for module in modules.values():
        for name, tensor in list(own_tensors(module)):
            made = torch.empty_like(tensor, device=META)
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            Place("", module, name).put(empty.setdefault(id(tensor), made))
    converted.loaded = block
