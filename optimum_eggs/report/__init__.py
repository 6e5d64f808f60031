"""The report of a pruned model as pictures and as one page."""

from .page import PICTURES, report_page

__all__ = ["PICTURES", "report_page"]
