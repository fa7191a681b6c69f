"""What a run did, for people: tables for the terminal, plots and one self-contained page."""

from secura_ds.report.page import write_report
from secura_ds.report.table import evaluation_table, format_table

__all__ = ["evaluation_table", "format_table", "write_report"]
