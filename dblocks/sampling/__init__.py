"""Samplers, text generation, unmasking, and likelihoods of texts."""

from dblocks.sampling.levels import SamplingCost as SamplingCost
from dblocks.sampling.levels import sampling_cost as sampling_cost
from dblocks.sampling.likelihood import Bound as Bound
from dblocks.sampling.likelihood import denoising_bound as denoising_bound
from dblocks.sampling.likelihood import next_token_nll as next_token_nll
from dblocks.sampling.likelihood import product_nll as product_nll
from dblocks.sampling.masked_likelihood import BoundTerms as BoundTerms
from dblocks.sampling.masked_likelihood import bound_terms as bound_terms
from dblocks.sampling.masked_likelihood import points_for as points_for
from dblocks.sampling.samplers import initial_noise as initial_noise
from dblocks.sampling.samplers import product_logits as product_logits
from dblocks.sampling.samplers import sample_euler as sample_euler
from dblocks.sampling.samplers import sample_heun as sample_heun
from dblocks.sampling.samplers import sample_logits as sample_logits
from dblocks.sampling.text import generate as generate
from dblocks.sampling.text import stream as stream
from dblocks.sampling.unmasking import Written as Written
from dblocks.sampling.unmasking import unmask as unmask
