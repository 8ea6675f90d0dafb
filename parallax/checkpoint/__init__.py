"""Checkpoints: a set of boxes of global tensors, so that any mesh loads what any mesh saved.

OUTPUT/checkpoints/step-00000100/ holds one safetensors file a writing rank and manifest.json. No pickle anywhere.
"""

from parallax.checkpoint.background import BackgroundSave, Staging
from parallax.checkpoint.hf_import import copy_companions, load_hf
from parallax.checkpoint.load import load
from parallax.checkpoint.lock import DirectoryLock
from parallax.checkpoint.manifest import Manifest, read_manifest
from parallax.checkpoint.place import Place, place
from parallax.checkpoint.save import Entry, Exchange, find, latest, prune, save, step_of
from parallax.checkpoint.store import clear_leftovers, make_directories, set_aside, sync_directory

__all__ = [
    "BackgroundSave",
    "DirectoryLock",
    "Entry",
    "Exchange",
    "Manifest",
    "Place",
    "Staging",
    "clear_leftovers",
    "copy_companions",
    "find",
    "latest",
    "load",
    "load_hf",
    "make_directories",
    "place",
    "prune",
    "read_manifest",
    "save",
    "set_aside",
    "step_of",
    "sync_directory",
]
