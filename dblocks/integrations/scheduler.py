"""A diffusers scheduler with the noise levels and steps of dblocks.

Use it in loops that need a diffusers scheduler; otherwise use `sample_euler` or `sample_heun`.
Importing this module imports diffusers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from dblocks.sampling.levels import levels_of
from dblocks.sampling.steps import Sampler, Steps
from dblocks.schedules import SCHEDULES, EDMSchedule
from dblocks.schedules.log_normal import P_MEAN, P_STD
from dblocks.schedules.noise import RHO, SIGMA_DATA, SIGMA_MAX, SIGMA_MIN, computed

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_edm_euler import EDMEulerSchedulerOutput
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
except ImportError as error:
    raise ImportError(
        "DiffusionBlocksScheduler needs the package diffusers, which is not installed or does not "
        "import; `pip install 'dblocks[hf]'`"
    ) from error

GridKind = Literal["equal_mass", "karras"]
InitialNoise = Literal["paper", "unit_variance"]
RENAMED = {"kind": "spacing", "initial_noise": "noise"}  # in configs saved by version 0.1
ROUNDED = 2.0**-7  # relative error of a timestep in bfloat16
FIELDS = ("sigma_min", "sigma_max", "p_mean", "p_std", "sigma_data", "partition")


class DiffusionBlocksScheduler(SchedulerMixin, ConfigMixin):
    """A scheduler with the levels of a noise schedule, for the loop of a diffusers pipeline.

        scheduler.set_timesteps(num_steps)
        z = scheduler.init_noise_sigma * torch.randn(shape)
        for t in scheduler.timesteps:
            z = scheduler.step(model(z, t, **cond), t, z).prev_sample

    Timesteps are the noise levels of the model calls: for n levels, n with `sampler="euler"` and 2n
    - 1 with "heun", which calls the model twice at all levels but the first. The model output is
    that of a `DiffusionBlocks`, the estimate of the clean target; each call runs the block that
    owns the level. The last step returns that estimate; there is no step at level 0. The states are
    bitwise equal to those of `sample_euler` and `sample_heun`.

    The model scales its input itself, so `scale_model_input` returns it unchanged. For guidance
    call `model(z, t, guidance_scale=...)`, or combine model outputs.

    Args:
        sigma_min: lowest noise level. This and the next five arguments are those of
            `NoiseSchedule`.
        sigma_max: highest noise level.
        p_mean: mean of ln sigma.
        p_std: standard deviation of ln sigma.
        sigma_data: standard deviation of one element of the clean target.
        partition: division of the levels among blocks; it does not affect the steps.
        spacing: rule for the levels of the steps, "equal_mass" or "karras"; see
            `NoiseSchedule.steps`.
        rho: exponent of the "karras" rule.
        noise: "paper" starts from `sigma * N(0, I)` at the first level, "unit_variance"
            from `sqrt(1 + sigma^2) * N(0, I)`.
        sampler: "euler" or "heun".
        density: name of the schedule's registered class. It is created with those of the first six
            arguments that are its fields.

    Raises:
        ValueError: the schedule refuses an argument.

    Source: Karras et al. 2022, algorithm 1 without churn.
    """

    @register_to_config
    def __init__(
        self,
        sigma_min: float = SIGMA_MIN,
        sigma_max: float = SIGMA_MAX,
        p_mean: float = P_MEAN,
        p_std: float = P_STD,
        sigma_data: float = SIGMA_DATA,
        partition: str | Sequence[float] = "equal_mass",
        spacing: GridKind = "equal_mass",
        rho: float = RHO,
        noise: InitialNoise = "paper",
        sampler: Sampler = "euler",
        density: str = "NoiseSchedule",
    ) -> None:
        rule: Any = partition if isinstance(partition, str) else tuple(partition)
        values = (sigma_min, sigma_max, p_mean, p_std, sigma_data, rule)
        self.noise_schedule = _schedule(density, dict(zip(FIELDS, values, strict=True)))
        self.noise_schedule.steps(2, spacing, rho=rho)
        self._steps = Steps([], sampler)
        if noise not in ("paper", "unit_variance"):
            raise ValueError(f"noise must be 'paper' or 'unit_variance', got {noise!r}")
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0, device="cpu")
        self._step_index: int | None = None
        self._begin_index: int | None = None

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """As in diffusers; also accepts configs saved with earlier names of options."""
        if config is not None and set(RENAMED) & set(config):
            config = {RENAMED.get(key, key): config[key] for key in config}
        return super().from_config(cast(Any, config), return_unused_kwargs, **kwargs)

    @classmethod
    def from_schedule(cls, schedule: EDMSchedule, **options: Any) -> DiffusionBlocksScheduler:
        """Creates a scheduler from a noise schedule, such as `model.config.noise_schedule`.

        Args:
            schedule: a noise schedule of a registered class.
            **options: `spacing`, `rho`, `noise` and `sampler`.

        Raises:
            TypeError: the schedule masks tokens.
            ValueError: its class is not registered, or has fields that a scheduler's config cannot
                hold.
        """
        density = type(schedule).__name__
        if schedule.corruption != "noise":
            raise TypeError(
                f"schedule must be a noise schedule, got a {density}; to sample masked tokens use "
                "dblocks.unmask"
            )
        fields = schedule.to_dict()
        if unknown := sorted(set(fields) - set(FIELDS)):
            raise ValueError(
                f"schedule must have no fields but {FIELDS}, which a scheduler's config can hold, "
                f"got a {density} with {unknown}; call set_timesteps(sigmas=schedule.steps(n))"
            )
        return cls(**fields, density=density, **options)

    @property
    def order(self) -> int:
        """Number of model calls per step, 2 with "heun"."""
        return 1 + self._steps.heun

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the initial state."""
        first = self._steps.grid[0] if self._steps.grid else self.noise_schedule.sigma_max
        return (first**2 + (cast(Any, self.config).noise == "unit_variance")) ** 0.5

    @property
    def sigmas(self) -> Tensor:
        """The levels, float64 [n] on the CPU; `timesteps` has the level of each call in float32."""
        return torch.tensor(self._steps.grid, dtype=torch.float64, device="cpu")

    @property
    def step_index(self) -> int | None:
        """The index of the next call; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The index of the first call, if a pipeline set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Sets the index of the first call, for pipelines that begin in the middle.

        With "heun" it must be even: pipelines pass the index of the step times `order`.
        """
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Tensor | Sequence[float] | None = None,
    ) -> None:
        """Sets the levels for a new sample.

        Args:
            num_inference_steps: number of levels, spaced by the rule `spacing`.
            device: device of `timesteps`. With the default, the CPU, a model on a GPU finds the
                block of a level without synchronising.
            sigmas: descending levels to use instead; a final 0 is accepted and is not a step.

        Raises:
            ValueError: not exactly one of these is given, or the levels do not descend.
        """
        if (num_inference_steps is None) == (sigmas is None):
            raise ValueError(
                "exactly one of num_inference_steps and sigmas must be given, "
                f"got num_inference_steps={num_inference_steps} and sigmas={sigmas}"
            )
        if num_inference_steps is not None:
            config = cast(Any, self.config)
            sigmas = self.noise_schedule.steps(num_inference_steps, config.spacing, rho=config.rho)
        levels = levels_of(cast(Tensor, sigmas))
        self._steps = Steps(levels.tolist(), cast(Any, self.config).sampler)
        of_calls = levels[self._steps.calls]
        self.timesteps = of_calls.to("cpu" if device is None else device, torch.float32)
        self.num_inference_steps = len(levels)
        self._step_index = self._begin_index = None

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """`sample` unchanged: the model scales its input itself."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> EDMEulerSchedulerOutput | tuple[Tensor, Tensor]:
        """Computes the state of the next call.

        With "euler" it is `a*sample + (1 - a)*model_output`, `a = sigma_next/sigma`; for "heun" see
        `dblocks.sampling.steps.Steps`.

        After the last call it returns the model output. Calls must be in order. The first one looks
        up its `timestep`, which synchronises if that is on a GPU; later ones check that of a CPU.

        Args:
            model_output: denoised, the estimate of the clean target, [N, ...].
            timestep: the element of `timesteps` that the model was called with.
            sample: the state at that level, of the same shape.
            generator: not used, as no random numbers are drawn; pipelines pass it.
            return_dict: False returns a plain tuple.

        Returns:
            `prev_sample`, the state of the next call, and `pred_original_sample`, the denoised
            estimate; in float32 (float64 for float64).

        Raises:
            RuntimeError: `set_timesteps` was not called, or all steps are done.
            ValueError: the first step's `timestep` is not one of the levels, or a later one on the
                CPU is not the next.
        """
        count = len(self.timesteps)
        if count == 0 or self._step_index == count:
            raise RuntimeError(
                "set_timesteps() must be called before each sample, got a step after all "
                f"{count} calls"
            )
        index = self._step_index
        if index is None:
            index = self._first_step(timestep)
        else:
            self._check_next(timestep, index)
        sample, denoised = computed(sample), computed(model_output)
        following = self._steps.after(index, sample, denoised)
        self._step_index = index + 1
        if not return_dict:
            return following, denoised
        return EDMEulerSchedulerOutput(prev_sample=following, pred_original_sample=denoised)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`original_samples + sigma*noise`, where sigma are the timesteps, 0-d or [N]."""
        sigma = timesteps.to(original_samples.device, computed(original_samples).dtype)
        sigma = sigma.reshape(sigma.shape + (1,) * (original_samples.ndim - 1) * sigma.ndim)
        return (original_samples + sigma * noise).to(original_samples.dtype)

    def __len__(self) -> int:
        return len(self._steps.grid)

    def _first_step(self, timestep: Tensor | float) -> int:
        if self._begin_index is not None:
            return self._begin_index
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor(timestep, device="cpu")
        levels = self.timesteps.cpu()
        same = levels == timestep.to("cpu", torch.float32)
        found = same.nonzero().flatten().tolist() if timestep.ndim == 0 else []
        if not found:
            raise ValueError(
                f"timestep must be an element of timesteps, {levels.tolist()}, got {timestep}"
            )
        # With Heun's method, the first call at a level is a correction, the second one starts a
        # step.
        return found[-1]

    def _check_next(self, timestep: Tensor | float, index: int) -> None:
        """Raises ValueError if a timestep on the CPU is not that of the next call."""
        if isinstance(timestep, Tensor) and (timestep.ndim or not timestep.is_cpu):
            return
        wanted = self.timesteps[index]
        if wanted.is_cpu and not math.isclose(float(timestep), wanted, rel_tol=ROUNDED):
            raise ValueError(
                f"timestep must be that of call {index}, {wanted}, got {timestep}; call step() "
                "once for each of timesteps in order, and set_timesteps() before another sample"
            )


def _schedule(density: str, values: dict[str, Any]) -> EDMSchedule:
    """Creates a schedule of a registered class from the values of its fields."""
    kind: Any = SCHEDULES.get(density)
    if kind is None or kind.corruption != "noise":
        known = [name for name, each in SCHEDULES.items() if cast(Any, each).corruption == "noise"]
        raise ValueError(
            f"density must be a registered noise schedule, one of {known}, "
            f"got {density!r}; see dblocks.schedules.register"
        )
    names = [field.name for field in dataclasses.fields(kind)]
    return kind(**{name: value for name, value in values.items() if name in names})
