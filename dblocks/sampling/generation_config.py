"""Options of text generation, also read from a GenerationConfig of transformers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dblocks.config import check_count

TOP_K = 50  # the default of transformers

# Options that have no effect at these values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (), "begin_suppress_tokens": (), "constraints": (),
    "diversity_penalty": (0.0,), "dola_layers": (), "early_stopping": (False,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,), "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,),
    "exponential_decay_length_penalty": (), "force_words_ids": (), "forced_bos_token_id": (),
    "forced_eos_token_id": (), "guidance_scale": (1.0,), "length_penalty": (1.0,), "max_time": (),
    "min_length": (0,), "min_new_tokens": (0,), "min_p": (0.0,), "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,), "num_beams": (1,), "num_return_sequences": (1,),
    "output_attentions": (False,), "output_hidden_states": (False,), "output_logits": (False,),
    "output_scores": (False,), "penalty_alpha": (0.0,), "prompt_lookup_num_tokens": (),
    "remove_invalid_values": (False,), "return_dict_in_generate": (False,), "sequence_bias": (),
    "stop_strings": (), "suppress_tokens": (), "token_healing": (False,), "top_h": (),
    "typical_p": (1.0,), "use_mtp": (False,), "watermarking_config": (),
}  # fmt: skip
# Options that do not affect the generated tokens: caches, compilation, start tokens (prompts are
# given), draft models (not used), logs and files.
IGNORED = {
    "_from_model_config", "assistant_confidence_threshold", "assistant_early_exit",
    "assistant_ensemble_weight", "assistant_lookbehind", "bos_token_id", "cache_config",
    "cache_implementation", "compile_config", "continuous_batching_config",
    "decoder_start_token_id", "disable_compile", "generation_kwargs", "is_assistant",
    "low_memory", "max_cache_len",
    "max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "prefill_chunk_size", "renormalize_logits", "speculation_type", "target_lookbehind",
    "transformers_version",
}  # fmt: skip
KNOWN = (
    "do_sample", "eos_token_id", "max_length", "max_new_tokens", "pad_token_id",
    "repetition_penalty", "temperature", "top_k", "top_p", "use_cache",
)  # fmt: skip


@dataclass(frozen=True)
class Writing:
    """Options of text generation; see `stream`."""

    max_new_tokens: int | None = None
    max_length: int | None = None
    """Length of prompt and continuation, if `max_new_tokens` is not given."""
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    pad_token: int | None = None
    """The token yielded after a stop token; by default the stop token itself."""
    cache: bool = True

    @classmethod
    def of(
        cls,
        generation_config: Any,
        *,
        stop_token: int | Sequence[int] | None,
        cache: bool,
        **given: Any,
    ) -> Writing:
        """Options of `stream`; arguments that are not None override the config.

        Args:
            generation_config: a GenerationConfig of transformers, a mapping of its names, or None.
            stop_token: see `stream`.
            cache: see `stream`.
            **given: other fields, or None.

        Raises:
            TypeError: `generation_config` has another type.
            ValueError: it has an option that is not supported.
        """
        base = cls() if generation_config is None else _from(_read(generation_config))
        named = {name: value for name, value in given.items() if value is not None}
        if stop_token is not None:
            named["stop_tokens"] = _tokens("stop_token", stop_token)
        return replace(base, cache=cache and base.cache, **named)

    def new_tokens(self, longest: int) -> int:
        """The number of tokens to generate, if the longest prompt has this length.

        Raises:
            ValueError: the number is missing or not positive.
        """
        if self.max_new_tokens is not None:
            return check_count("max_new_tokens", self.max_new_tokens)
        if self.max_length is None:
            raise ValueError(
                "max_new_tokens must be given, as an argument or in the generation_config, got None"
            )
        if self.max_length <= longest:
            raise ValueError(
                "max_length of the generation_config must exceed the length of the longest prompt, "
                f"got {self.max_length} and {longest}; give max_new_tokens"
            )
        return self.max_length - longest


def _read(generation_config: Any) -> dict[str, Any]:
    """The options that are set, that is, not None or an empty list."""
    to_dict = getattr(generation_config, "to_dict", None)
    options = to_dict() if callable(to_dict) else generation_config
    if not isinstance(options, Mapping):
        raise TypeError(
            "generation_config must be a GenerationConfig of transformers or a mapping of its "
            f"names, got {type(generation_config).__name__}"
        )
    return {name: v for name, v in options.items() if not (v is None or v in ([], ()))}


def _from(options: dict[str, Any]) -> Writing:
    unknown = sorted(set(options) - set(NEUTRAL) - IGNORED - set(KNOWN))
    if unknown:
        raise ValueError(
            f"generation_config must hold known options only, got {unknown}; the supported "
            f"options are {list(KNOWN)}"
        )
    asked = {n: options[n] for n in options if n in NEUTRAL and options[n] not in NEUTRAL[n]}
    if asked:
        raise ValueError(
            f"generation_config must hold supported options only, got {asked}; "
            f"leave them out; the supported options are {list(KNOWN)}"
        )
    sampled = options.get("do_sample", False)
    if not isinstance(sampled, bool):
        raise TypeError(f"do_sample must be a bool, got {type(sampled).__name__}")
    fields = {
        name: options[name]
        for name in ("max_new_tokens", "max_length", "repetition_penalty")
        if name in options
    }
    if "eos_token_id" in options:
        fields["stop_tokens"] = _tokens("eos_token_id", options["eos_token_id"])
    fields |= _sampling(options) if sampled else _greedy(options)
    return Writing(
        **fields, pad_token=options.get("pad_token_id"), cache=options.get("use_cache", True)
    )


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    top_k = options.get("top_k", TOP_K)
    return {
        "temperature": options.get("temperature", 1.0),
        "top_k": None if top_k == 0 else top_k,
        "top_p": options.get("top_p"),
    }


def _greedy(options: dict[str, Any]) -> dict[str, Any]:
    # Options that are not set have the defaults of transformers 4.
    unused = {"temperature": 1.0, "top_k": TOP_K, "top_p": 1.0}
    unread = {n: options[n] for n, plain in unused.items() if options.get(n, plain) != plain}
    if unread:
        warnings.warn(
            "do_sample of the generation_config is not True, so the most likely token is chosen, "
            f"as in transformers, and {unread} have no effect; set do_sample=True",
            UserWarning,
            stacklevel=5,
        )
    return {"temperature": 0.0}


def _tokens(name: str, value: Any) -> tuple[int, ...]:
    tokens = tuple(value) if isinstance(value, Sequence) else (value,)
    if not tokens or not all(isinstance(t, int) and not isinstance(t, bool) for t in tokens):
        raise TypeError(f"{name} must be a token or a sequence of tokens, got {value!r}")
    return tokens
