"""PEFT's folders, in and out, without PEFT."""
from slimtune.io.peft_folder import is_peft
from slimtune.io.peft_read import load_peft

__all__ = ["is_peft", "load_peft"]
