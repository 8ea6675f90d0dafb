"""Checkpoints: a set of boxes of global tensors, so that any mesh loads what any mesh saved.

OUTPUT/checkpoints/step-00000100/ holds one safetensors file a writing rank and manifest.json. No pickle anywhere.
"""

from parallax.checkpoint.hf_import import copy_companions, load_hf
from parallax.checkpoint.load import load
from parallax.checkpoint.manifest import read_manifest
from parallax.checkpoint.save import Entry, Exchange, find, latest, save

__all__ = ["Entry", "Exchange", "copy_companions", "find", "latest", "load", "load_hf", "read_manifest", "save"]
