"""Saves a trained network: `model.safetensors`, and a `config.json` that rebuilds it."""

from dblocks.checkpoint.files import appearing as appearing
from dblocks.checkpoint.files import current as current
from dblocks.checkpoint.files import discard as discard
from dblocks.checkpoint.files import make_folder as make_folder
from dblocks.checkpoint.files import naming as naming
from dblocks.checkpoint.files import no_empty_folder as no_empty_folder
from dblocks.checkpoint.files import replacing as replacing
from dblocks.checkpoint.files import saving as saving
from dblocks.checkpoint.files import unchanged as unchanged
from dblocks.checkpoint.networks import NETWORKS as NETWORKS
from dblocks.checkpoint.networks import load_model as load_model
from dblocks.checkpoint.networks import prepare as prepare
from dblocks.checkpoint.networks import read_config as read_config
from dblocks.checkpoint.networks import save_model as save_model
from dblocks.checkpoint.tensors import load_safetensors as load_safetensors
from dblocks.checkpoint.tensors import save_safetensors as save_safetensors
