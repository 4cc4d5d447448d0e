"""Networks to train in blocks, one per file."""

from dblocks.models.causal_lm import CausalLM as CausalLM
from dblocks.models.causal_lm import CausalLMConfig as CausalLMConfig
from dblocks.models.dit import DiT as DiT
from dblocks.models.dit import DiTConfig as DiTConfig
from dblocks.models.masked_lm import MaskedLM as MaskedLM
from dblocks.models.masked_lm import MaskedLMConfig as MaskedLMConfig
from dblocks.models.recurrent import RecurrentConfig as RecurrentConfig
from dblocks.models.recurrent import RecurrentLM as RecurrentLM
from dblocks.models.vit import ViT as ViT
from dblocks.models.vit import ViTConfig as ViTConfig
