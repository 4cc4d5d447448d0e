"""Modules: embeddings of targets and noise, adaptive norms, the noise-conditioned layer."""

from dblocks.nn.conditioning import AdaLayerNorm as AdaLayerNorm
from dblocks.nn.conditioning import ConditioningKind as ConditioningKind
from dblocks.nn.conditioning import LabelEmbedding as LabelEmbedding
from dblocks.nn.conditioning import Modulation as Modulation
from dblocks.nn.conditioning import NoiseEmbedding as NoiseEmbedding
from dblocks.nn.conditioning import Norm as Norm
from dblocks.nn.conditioning import conditioning_of as conditioning_of
from dblocks.nn.conditioning import over_rows as over_rows
from dblocks.nn.layer import MLP as MLP
from dblocks.nn.layer import Attend as Attend
from dblocks.nn.layer import Attention as Attention
from dblocks.nn.layer import Rotary as Rotary
from dblocks.nn.layer import SwiGLU as SwiGLU
from dblocks.nn.layer import TransformerLayer as TransformerLayer
from dblocks.nn.layer import rotary_of as rotary_of
