"""A converted model in blocks, and how it is saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from dblocks.blocks import Batch, Block, BlocksConfig, DiffusionBlocks, Draw
from dblocks.blocks.changes import Seen, remember, seen_of, settings_of
from dblocks.checkpoint import naming
from dblocks.config import check_block
from dblocks.integrations.convert import files
from dblocks.integrations.convert.again import check_copies, convert_again
from dblocks.integrations.convert.clean_loss import clean_loss
from dblocks.integrations.convert.network import Converted
from dblocks.integrations.convert.options import ConvertOptions
from dblocks.integrations.convert.tasks import Task, network_of
from dblocks.integrations.convert.whole import check_whole


class ConvertedBlocks(DiffusionBlocks):
    """The user's model in blocks: a `DiffusionBlocks` with a `Converted` as its network.

    `base_model` wraps the user's model, `base_model.model`, and has its call signature and
    attributes.

    Args:
        model: the user's model as a network for `DiffusionBlocks`.
        config: the number of blocks and the options of their training.
        task: the target, as in `convert`.
        options: the other arguments of `convert`.
    """

    base_model: Converted  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self, model: Converted, config: BlocksConfig, task: Task, options: ConvertOptions
    ) -> None:
        super().__init__(cast(Any, model), config)
        self.task: Task = task
        self.options = options
        self.clean_loss_weight: float = options.clean_loss_weight

    def settings(self) -> list[Any]:
        """See `Denoiser.settings`: models of other libraries read their configs in calls."""
        model = self.base_model.model
        return [id(vars(model).get("config")), settings_of(model)]

    def watched(self) -> list[nn.Module]:
        """See `Denoiser.watched`."""
        added = (c for n, c in self.base_model.named_children() if n != "model")
        return [self.base_model.model, *added]

    def take_changes(self, before: Seen | None, now: Seen) -> None:
        """See `Denoiser.take_changes` and `convert_again`."""
        convert_again(self, before, now)

    def ready_(self) -> None:
        """Runs `check_whole` if the model had no data yet, and follows its attributes.

        Raises:
            ValueError: the model computes something that would be left out.
        """
        network = self.base_model
        check_copies(self)
        if not network.whole_checked:
            network.whole_checked = check_whole(network)
        network.follow_model_()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy or pickle could not tell what was changed before it from how it was converted.
        self.follow_changes_()
        return super().__reduce_ex__(protocol)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Else it is being unpickled, and refers to this by a hook.
        if "_modules" in vars(self.base_model.model):
            remember(self, seen_of(*self.watched()))

    def extra_loss(self, batch: Batch, block: int, draw: Draw) -> Tensor | None:
        """`clean_loss_weight` times `clean_loss`; see `DiffusionBlocks.extra_loss`."""
        weight = self.clean_loss_weight
        return weight * self.clean_loss(batch, block, draw) if weight else None

    def clean_loss(self, batch: Batch, block: int, draw: Draw) -> Tensor:
        """The model's own loss, with gradients for the layers of one block only.

        With masked tokens, the loss of the tokens that `draw` masks.
        """
        schedule, z = self.config.schedule, None
        if schedule.corruption == "masks":
            y = self.base_model.target.embed(self.base_model.target.check(batch))
            z = schedule.corrupt(y, schedule.level(draw.sigma), draw.seed_of(y)).z
        first, last = self.layer_ranges[block]
        names = self.base_model.names[first:last]
        layers = [self.base_model.model.get_submodule(name) for name in names]
        return clean_loss(self.base_model, layers, batch, z)

    def block(self, block: int) -> Block:
        """The view of one block.

        Raises:
            ValueError: `clean_loss_weight` is not 0; a clean loss needs the whole model.
        """
        if self.clean_loss_weight:
            raise ValueError(
                "a block alone must not have a clean loss, which runs the whole model, got "
                f"clean_loss_weight={self.clean_loss_weight}; train with train_step(dm, ...), "
                "or convert without it"
            )
        return super().block(block)

    def save_pretrained(self, folder: str | Path, block: int | None = None) -> None:
        """Writes a file for each block, one for shared tensors, and dblocks.json.

        After `scale.convert_block` only one block is loaded, and only that one is saved, as with
        `block=`.

        Args:
            folder: created if it does not exist.
            block: for the worker that trains this block: writes the block's file and, if they are
                missing, the shared tensors, dblocks.json and the model card. With `shared="train"`,
                shared tensors are not written, since those of the workers differ.

        Raises:
            ImportError: safetensors is not installed.
            ValueError: the folder cannot be written to; `block` is out of range, or not the one
                that is loaded; or one block is saved, and other workers have saved blocks with
                other options or other shared tensors in the folder. Nothing is written then.
        """
        if block is not None:
            block = check_block(block, self.config.num_blocks)
            if self.loaded not in (None, block):
                raise ValueError(
                    f"block must be {self.loaded}, the only one held here, got {block}; save "
                    "each block in its own job"
                )
        files.save(self, folder, block)

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: nn.Module) -> ConvertedBlocks:
        """Loads files of `save_pretrained` into a model of the same architecture.

        Args:
            folder: the folder with the files of all blocks.
            model: the model, whose weights are replaced.

        Raises:
            ImportError: safetensors is not installed.
            ValueError: a file is missing or broken, or does not match the model, which may have
                another config than the saved one; the message names what differs.
        """
        folder = Path(folder)
        given, tensors = files.read(folder, model)
        with naming(folder / files.CONFIG_FILE):
            config = BlocksConfig.from_dict(given["blocks_config"])
            options = ConvertOptions(**given["options"])
            network = network_of(model, config, given["task"], given["layers"], options)
            converted = cls(network, config, given["task"], options)
        files.fill(converted, folder, tensors, given["ties"])
        network.whole_checked = False
        return converted
