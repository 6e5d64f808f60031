"""Sharing packed models: the model card, and the push to the Hub."""

from .card import model_card, own_card, put_card, write_card
from .push import push_folder, save_and_push

__all__ = ["model_card", "own_card", "push_folder", "put_card", "save_and_push", "write_card"]
