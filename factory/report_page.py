"""A report as one HTML page that needs nothing else: its figures are inside, and it works without network and scripts."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from mllm_factory.report_figures import Picture
from mllm_factory.report_runs import DONE
from mllm_factory.report_tables import BEST, FRONT, JOB_HEADINGS, Report, headings, job_rows, rows

SECTIONS = {
    "pareto": "Merit against trained parameters",
    "curves": "Training",
    "by_layer": "Attention by layer",
    "intervals": "Values with intervals",
    "samples": "Samples",
}
"""The parts of the page that hold figures, in order."""

CAUTION = "Attention says where a model looks, not whether it matters; read it beside the counterfactual values."

OVERLAY = (
    "Maps and bars: the attention of the rows that predict the answer, mean over heads, rows and layers, of each token of the "
    "item. A map's colours go from 0 to its own maximum; share is the sum over the item's tokens."
)


def html(report: Report, pictures: Sequence[Picture]) -> str:
    """One page with its figures inside; every text from the runs is escaped."""
    from jinja2 import Environment

    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE)
    sections = [(title, [p for p in pictures if p.section == key]) for key, title in SECTIONS.items()]
    return page.render(
        report=report,
        head=headings(report),
        names=len(report.settings) or 1,
        rows=rows(report),
        job_head=JOB_HEADINGS,
        undone=job_rows([run for run in report.runs if run.state != DONE]),
        sections=[(title, inside) for title, inside in sections if inside],
        data=lambda picture: "data:image/svg+xml;base64," + base64.b64encode(picture.svg).decode(),
        best=BEST,
        front=FRONT,
        cautions={SECTIONS["by_layer"]: CAUTION, SECTIONS["samples"]: f"{OVERLAY} {CAUTION}"},
    )


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.title }}</title>
<style>
body { max-width: 70rem; margin: 0 auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid #bbb; }
p, figcaption { overflow-wrap: anywhere; }
.box { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ccc; text-align: left; white-space: nowrap; }
thead th { border-bottom: 2px solid #555; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.best { font-weight: 700; background: #e6f0f7; }
figure { margin: 1rem 0; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { font-size: .875rem; color: #444; }
@media print { body { max-width: none; } .box { overflow: visible; } figure, tr { break-inside: avoid; } td, th { white-space: normal; } }
</style>
</head>
<body>
<h1>{{ report.title }}</h1>
<p>{{ report.counts }}.{% if report.columns[report.main] %} Ranked by {{ report.main }}.{% endif %}
 Values are means over seeds ± the sample standard deviation, or one run's value [with its interval].
 {{ best }} best of its column; {{ front }} on the Pareto front of the ranking metric against trainable parameters.</p>
{% if rows %}
<h2>Configurations</h2>
<div class="box" tabindex="0" role="region" aria-label="Configurations">
<table>
<thead><tr>{% for name in head %}<th scope="col"{% if loop.index > names %} class="number"{% endif %}>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>
{% for text, mark in row %}
<td{% if loop.index > names %} class="number{{ ' best' if mark }}"{% endif %}>{{ text }}{{ ' ' ~ best if mark }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endif %}
{% if undone %}
<h2>Not done</h2>
<div class="box" tabindex="0" role="region" aria-label="Jobs that are not done">
<table>
<thead><tr>{% for name in job_head %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in undone %}
<tr>{% for text in row %}<td>{{ text }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endif %}
{% for title, pictures in sections %}
<h2>{{ title }}</h2>
{% if title in cautions %}<p>{{ cautions[title] }}</p>{% endif %}
{% for picture in pictures %}
<figure>
<img src="{{ data(picture) }}" alt="{{ picture.title }}">
<figcaption><strong>{{ picture.title }}.</strong> {{ picture.caption }}</figcaption>
</figure>
{% endfor %}
{% endfor %}
</body>
</html>
"""
