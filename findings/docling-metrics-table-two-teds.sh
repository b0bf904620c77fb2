#!/usr/bin/env bash
# docling-metrics-table: two scores named TEDS in one package, which differ on the same tables
#
# Expected: TEDS, as published with PubTabNet, charges a cell whose text differs by its normalized
#   edit distance, so that one wrong letter in twenty costs a twentieth of a cell, and divides by the
#   number of elements below <table>. A C++ and a Python version in one package should agree.
# Observed (docling-metrics-table 0.16.0): TEDScorer in docling_metrics_table.utils.teds follows that
#   definition. TableMetric, the documented entry point, compares cells for equality in C++: one wrong
#   letter costs as much as a cell with entirely different text. It also counts <table> itself as a
#   node, so the two disagree on structure, too. Both results are called "teds".
# Output:
#   docling-metrics-table 0.16.0
#   same text:          TableMetric 1.0000, TEDScorer 1.0000
#   one letter wrong:   TableMetric 0.8571, TEDScorer 0.9912
#   all letters wrong:  TableMetric 0.8571, TEDScorer 0.8333
#   last row missing:   TableMetric 0.5714, TEDScorer 0.5000
# Why it matters: a model that misreads single letters scores much lower with TableMetric than in
#   published results, and an improvement from garbled to nearly right text does not show. Numbers
#   from the two must not be put in one table; say which implementation gave them.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'docling-metrics-table==0.16.0'
"$work/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from docling_metrics_table.docling_metrics_table import TableMetric, TableMetricHTMLInputSample, TableMetricKind
from docling_metrics_table.utils.teds import TEDScorer
from lxml import html

metric = TableMetric(metrics=[TableMetricKind.TEDS])
scorer = TEDScorer()


def table(*rows):
    cells = ("".join(f"<td>{text}</td>" for text in row) for row in rows)
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def scores(truth, read):
    sample = TableMetricHTMLInputSample(id="x", html_a=truth, html_b=read)
    in_python = scorer.teds(html.fromstring(truth), html.fromstring(read), structure_only=False)
    return metric.evaluate_sample(sample).teds.teds, in_python


print("docling-metrics-table", version("docling-metrics-table"))
head, text = ("Item", "Amount"), "Consulting services"
truth = table(head, (text, "1,234.50"))
below = 6  # elements below <table>: 2 rows and 4 cells
for label, read, for_cpp, for_python in (
    ("same text:        ", truth, 1, 1),
    ("one letter wrong: ", table(head, ("Consulting servicez", "1,234.50")), 1 - 1 / (below + 1), 1 - 1 / len(text) / below),
    ("all letters wrong:", table(head, ("0" * len(text), "1,234.50")), 1 - 1 / (below + 1), 1 - 1 / below),
    ("last row missing: ", table(head), 1 - 3 / (below + 1), 1 - 3 / below),
):
    in_cpp, in_python = scores(truth, read)
    print(f"{label}  TableMetric {in_cpp:.4f}, TEDScorer {in_python:.4f}")
    assert abs(in_cpp - for_cpp) < 1e-9 and abs(in_python - for_python) < 1e-9, (for_cpp, for_python)
PYTHON
