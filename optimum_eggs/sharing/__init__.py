"""Sharing packed models: the model card, and the push to the Hub."""

from .card import keep_own_text, model_card, write_card
from .push import push_folder, save_and_push

__all__ = ["keep_own_text", "model_card", "push_folder", "save_and_push", "write_card"]
