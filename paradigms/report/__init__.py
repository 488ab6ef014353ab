"""A run on one page, or several side by side: settings, results beside the published ones, learning curves, images.

A page is one file that needs neither network nor scripts. The figures are of matplotlib, made without pyplot or any other
global state, and can be had alone.
"""

from paradigms.report.examples import Examples, read_examples, save_examples
from paradigms.report.figures import confusion, image_grid, learning_curves
from paradigms.report.page import Record, compare, html
from paradigms.report.tables import shown

__all__ = [
    "Examples",
    "Record",
    "compare",
    "confusion",
    "html",
    "image_grid",
    "learning_curves",
    "read_examples",
    "save_examples",
    "shown",
]
