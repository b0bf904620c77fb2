"""The report as a Jinja template: HTML that is also well-formed XML, so that any parser can read it."""
# ruff: noqa: E501

TEMPLATE = """\
<!DOCTYPE html>
<html lang="en" xmlns="http://www.w3.org/1999/xhtml">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'" />
<title>What was read from {{ contents.n_pages }} page{{ 's' if contents.n_pages != 1 }}</title>
<style>
:root { color-scheme: light dark;
  --paper: #fbfbfa; --card: #fff; --ink: #1c1e21; --soft: #5d6470; --line: #dcdfe4; --head: #f1f3f6;
  --bad: #b3261e; --bad-paper: #fdecea; --warn: #8a5a00; --warn-paper: #fff4dc; --link: #0b57d0;
  --s0: #3366cc; --s1: #dc6b1f; --s2: #2e8b57; --s3: #a0408c; --s4: #8c6d1f; --s5: #1f8ca0; --s6: #c23b5a; --s7: #667; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15171a; --card: #1d2024; --ink: #e6e8eb; --soft: #9aa3af; --line: #343a42; --head: #262b31;
  --bad: #ff8a80; --bad-paper: #3a1f1d; --warn: #ffcf70; --warn-paper: #382d15; --link: #8ab4f8;
  --s0: #7aa2f7; --s1: #ff9e64; --s2: #73c991; --s3: #d699d6; --s4: #d6b35a; --s5: #5fc9dd; --s6: #f7768e; --s7: #aab; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 100rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .4rem 0; } h2 { font-size: 1.1rem; margin: 0; overflow-wrap: anywhere; }
h3 { font-size: .95rem; margin: 0 0 .5rem; } a { color: var(--link); }
.soft { color: var(--soft); font-weight: normal; font-size: .85rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; margin: 1rem 0; }
.failures { border-color: var(--bad); background: var(--bad-paper); }
.failures li { overflow-wrap: anywhere; margin: .25rem 0; }
.columns { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 1.25rem; margin-top: .75rem; }
@media (max-width: 60rem) { .columns { grid-template-columns: minmax(0, 1fr); } body { padding: .5rem; } }
figure { margin: 0; } .columns > figure { position: sticky; top: .5rem; align-self: start; }
@media (max-width: 60rem) { .columns > figure { position: static; } }
figure img { max-width: 100%; min-width: min(100%, 24rem); max-height: 96vh; height: auto; object-fit: contain; border: 1px solid var(--line);
  background: #fff; display: block; }
.answer + .answer { border-top: 1px solid var(--line); margin-top: 1.25rem; padding-top: 1rem; }
.mark { display: inline-block; font-size: .75rem; font-weight: 600; border-radius: .3rem; padding: 0 .4rem;
  margin-left: .3rem; color: var(--warn); background: var(--warn-paper); }
.mark.bad { color: var(--bad); background: var(--bad-paper); }
.scroll { overflow-x: auto; margin: .4rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: .2rem .45rem; text-align: left; vertical-align: top;
  white-space: pre-wrap; overflow-wrap: anywhere; min-width: 2.5rem; }
th { background: var(--head); }
dl { display: grid; grid-template-columns: minmax(5rem, max-content) minmax(0, 1fr); gap: .2rem .8rem; margin: .2rem 0; }
dt { color: var(--soft); overflow-wrap: anywhere; } dd { margin: 0; overflow-wrap: anywhere; }
.value { white-space: pre-wrap; }
li, td a { overflow-wrap: anywhere; } td.number { white-space: nowrap; }
ol.items { margin: 0; padding-left: 1.4rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; background: var(--head); border-radius: .3rem;
  padding: .5rem; margin: .4rem 0; max-height: 40rem; overflow-y: auto; }
.prose { white-space: pre-wrap; overflow-wrap: anywhere; }
svg { display: block; width: 100%; max-width: 42rem; height: auto; } svg text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); }
{% for i in range(8) %}
.s{{ i }} { fill: var(--s{{ i }}); stroke: none; } .l{{ i }} { stroke: var(--s{{ i }}); fill: none; stroke-width: 2; }
{% endfor %}
.key { display: flex; flex-wrap: wrap; gap: .2rem .9rem; font-size: .8rem; padding: 0; margin: .2rem 0; list-style: none; }
.key svg { display: inline-block; width: .7rem; height: .7rem; margin-right: .3rem; vertical-align: baseline; }
summary { cursor: pointer; color: var(--soft); font-size: .8rem; }
@media print { .card { break-inside: avoid; } .columns > figure { position: static; } }
</style>
</head>
<body>
{% macro table_of(table) %}
<div class="scroll"><table>
{% for row in rows(table) %}
<tr>{% for cell in row %}
{% set tag = 'th' if cell.header else 'td' %}
<{{ tag }}{% if cell.rowspan > 1 %} rowspan="{{ cell.rowspan }}"{% endif %}\
{% if cell.colspan > 1 %} colspan="{{ cell.colspan }}"{% endif %}>{{ cell.text }}</{{ tag }}>\
{% endfor %}</tr>
{% endfor %}
</table></div>
{% endmacro %}
{% macro scalar(value) %}
{% if value is none %}<span class="soft">not there</span>{% elif value is boolean %}{{ 'yes' if value else 'no' }}\
{% else %}<span class="value">{{ value }}</span>{% endif %}
{% endmacro %}
{% macro fields(value) %}
{% set names = columns(value) %}
{% if plain(value) %}{{ scalar(value) }}
{% elif value is mapping %}
{% if value %}<dl>{% for name, item in value.items() %}<dt>{{ name }}</dt><dd>{{ fields(item) }}</dd>{% endfor %}</dl>\
{% else %}<span class="soft">nothing</span>{% endif %}
{% elif names %}
<div class="scroll"><table><tr>{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for item in value %}
<tr>{% for name in names %}<td>{% if name in item %}{{ scalar(item[name]) }}{% endif %}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% elif value %}<ol class="items">{% for item in value %}<li>{{ fields(item) }}</li>{% endfor %}</ol>\
{% else %}<span class="soft">none</span>{% endif %}
{% endmacro %}
{% macro drawing(chart) %}
<figure>
<svg viewBox="0 0 {{ chart.width }} {{ chart.height }}" role="img" aria-label="the chart, drawn again from its data" \
xmlns="http://www.w3.org/2000/svg">
{% for tick in chart.ticks %}
<line class="grid" x1="{{ chart.left }}" x2="{{ chart.right }}" y1="{{ tick.y }}" y2="{{ tick.y }}" />
<text x="{{ tick.x }}" y="{{ tick.y + 4 }}" text-anchor="end">{{ tick.text }}</text>
{% endfor %}
{% for bar in chart.bars %}
<rect class="s{{ bar.series % 8 }}" x="{{ bar.x }}" y="{{ bar.y }}" width="{{ bar.width }}" height="{{ bar.height }}">\
<title>{{ bar.title }}</title></rect>
{% endfor %}
{% for series, points in chart.lines %}
<polyline class="l{{ series % 8 }}" points="{{ points }}" />
{% endfor %}
<line class="axis" x1="{{ chart.left }}" x2="{{ chart.right }}" y1="{{ chart.zero_y }}" y2="{{ chart.zero_y }}" />
{% for label in chart.labels %}
<text transform="translate({{ label.x }} {{ label.y }}) rotate(-35)" text-anchor="end">{{ label.text }}</text>
{% endfor %}
</svg>
<ul class="key">{% for name in chart.series %}<li><svg viewBox="0 0 10 10" xmlns="http://www.w3.org/2000/svg">\
<rect class="s{{ loop.index0 % 8 }}" width="10" height="10" /></svg>{{ name }}</li>{% endfor %}</ul>
</figure>
{% endmacro %}
{% macro answer(record) %}
<section class="answer">
<h3>{{ record.task }}\
{% if record.error %}<span class="mark bad">failed</span>{% elif not record.valid %}<span class="mark bad">not valid</span>\
{% endif %}\
{% if record.salvaged %}<span class="mark">cut: kept {{ record.kept }}</span>{% endif %}\
{% if record.copy_of %}<span class="mark">same pixels as {{ record.copy_of.source }}, page {{ record.copy_of.page }}</span>\
{% endif %}
</h3>
{% if record.error %}<p>{{ record.error }}</p>{% endif %}
{% for warning in record.warnings %}<p class="soft">{{ warning }}</p>{% endfor %}
{% if record.validity_error %}<p class="soft">{{ record.validity_error }}</p>{% endif %}
{% if record.tables %}
{% set drawn = chart(record) %}
{% if drawn %}{{ drawing(drawn) }}{% endif %}
{% for table in record.tables %}{{ table_of(table) }}{% endfor %}
{% elif record.kind == 'fields' and record.value is not none %}{{ fields(record.value) }}
{% elif record.kind == 'code' and record.value %}<pre>{{ record.value }}</pre>
{% elif record.value is string %}<p class="prose">{{ record.value }}</p>
{% elif record.value is not none %}<p class="soft">no table on this page</p>
{% endif %}
{% if record.text %}
<details><summary>the answer as it was written ({{ record.finish_reason }}\
{% if record.timings.get('n_generated') %}, {{ record.timings['n_generated'] }} tokens{% endif %}\
{% if record.timings.get('seconds') %}, {{ '%.1f' % record.timings['seconds'] }} s{% endif %})</summary>\
<pre>{{ record.text }}</pre></details>
{% endif %}
</section>
{% endmacro %}
<header>
<h1>What was read</h1>
<p class="soft">{{ contents.n_pages }} page{{ 's' if contents.n_pages != 1 }} of {{ contents.documents | length }} \
document{{ 's' if contents.documents | length != 1 }}, {{ contents.n_records }} record{{ 's' if contents.n_records != 1 }}: {{ contents.tasks | join(', ') }}.
{% if contents.n_salvaged %}{{ contents.n_salvaged }} cut short and kept in part. {% endif %}
Model:{% for role, digest in contents.model.items() %} {{ role }} {{ digest[:12] }}{% endfor %}.</p>
{% if contents.failures %}
<section class="card failures"><h2>{{ contents.failures | length }} without a valid answer</h2><ul>
{% for failure in contents.failures %}
{% set record = failure.record %}
<li><a href="#page-{{ failure.anchor }}">{{ record.source }}{% if record.page %}, page {{ record.page }}{% endif %}</a>, \
{{ record.task }}: {{ record.error or record.validity_error }}</li>
{% endfor %}
</ul></section>
{% endif %}
{% if contents.uncertain %}
<section class="card"><h2>Check first <span class="soft">the {{ contents.uncertain | length }} least certain cells and \
fields, by their least token probability</span></h2>
<div class="scroll"><table><tr><th>least</th><th>mean</th><th>page</th><th>where</th><th>text</th></tr>
{% for one in contents.uncertain %}
<tr><td class="number">{{ '%.2f' % one.least }}</td><td class="number">{{ '%.2f' % one.mean }}</td>\
<td><a href="#page-{{ one.anchor }}">{{ one.source }}{% if one.page %}, page {{ one.page }}{% endif %}</a></td>\
<td>{{ one.task }} {{ one.where }}</td><td>{{ '' if one.text is none else one.text }}</td></tr>
{% endfor %}
</table></div></section>
{% endif %}
{% if contents.documents | length > 1 %}
<nav class="card"><details><summary>documents</summary><ul>
{% for anchor, source, n in contents.documents %}
<li><a href="#page-{{ anchor }}">{{ source }}</a> <span class="soft">{{ n }} page{{ 's' if n != 1 }}</span></li>
{% endfor %}
</ul></details></nav>
{% endif %}
</header>
<main>
{% for page in pages %}
<article class="card" id="page-{{ page.anchor }}">
<h2>{{ page.source }} <span class="soft">{% if page.number %}page {{ page.number }}\
{% if page.n_pages %} of {{ page.n_pages }}{% endif %}{% endif %}\
{% if page.size_px %}, {{ page.size_px[0] }}×{{ page.size_px[1] }} pixels{% endif %}</span></h2>
<div class="columns">
<figure>{% if page.image %}<img src="{{ page.image }}" alt="page {{ page.number }} of {{ page.source }}" loading="lazy" />\
{% else %}<p class="soft">no image of this page</p>{% endif %}</figure>
<div>
{% for record in page.records %}
{{ answer(record) }}
{% endfor %}
</div>
</div>
</article>
{% endfor %}
</main>
</body>
</html>
"""
