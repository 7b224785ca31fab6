"""Folders of AdapterHub's `adapters` library, in and out, without that library."""
from slimtune.io.adapterhub_folder import is_adapterhub
from slimtune.io.adapterhub_read import load_adapterhub
from slimtune.io.adapterhub_write import save_adapterhub

__all__ = ["is_adapterhub", "load_adapterhub", "save_adapterhub"]
