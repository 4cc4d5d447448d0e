"""Modules: embeddings of targets and noise, adaptive norms, the noise-conditioned layer."""

from dblocks.nn.branches import MLP as MLP
from dblocks.nn.branches import Attend as Attend
from dblocks.nn.branches import Attention as Attention
from dblocks.nn.branches import Rotary as Rotary
from dblocks.nn.branches import SwiGLU as SwiGLU
from dblocks.nn.branches import init_linear_ as init_linear_
from dblocks.nn.branches import rotary_of as rotary_of
from dblocks.nn.conditioning import CONDITIONINGS as CONDITIONINGS
from dblocks.nn.conditioning import ConditioningKind as ConditioningKind
from dblocks.nn.conditioning import conditioning_of as conditioning_of
from dblocks.nn.conditioning import inverse_silu as inverse_silu
from dblocks.nn.conditioning import over_rows as over_rows
from dblocks.nn.embeddings import LabelEmbedding as LabelEmbedding
from dblocks.nn.embeddings import NoiseEmbedding as NoiseEmbedding
from dblocks.nn.layer import AdaLayerNorm as AdaLayerNorm
from dblocks.nn.layer import Modulation as Modulation
from dblocks.nn.layer import Norm as Norm
from dblocks.nn.layer import TransformerLayer as TransformerLayer
