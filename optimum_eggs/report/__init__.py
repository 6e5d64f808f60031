"""The report of a pruned model as pictures and as one page."""

from .page import report_page

__all__ = ["report_page"]
