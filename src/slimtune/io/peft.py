"""PEFT's folders, in and out, without PEFT."""
from slimtune.io.peft_folder import is_peft
from slimtune.io.peft_read import load_peft
from slimtune.io.peft_write import save_peft

__all__ = ["is_peft", "load_peft", "save_peft"]
