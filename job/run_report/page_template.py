"""The template of a report's page, for Jinja2. It is Python, so that it comes wherever the code comes."""

TEMPLATE = """\
<!doctype html>
<html lang="en">
{#- Every text stands here in both languages, and the style hides one of them. The page needs no other file, and its
    policy forbids all requests and every script but the one below. -#}
{%- macro words(text) -%}
{%- if text is string -%}
{{ text }}
{%- elif text.en == text.zh -%}
{{ text.en }}
{%- else -%}
<span lang="en">{{ text.en }}</span><span lang="zh">{{ text.zh }}</span>
{%- endif -%}
{%- endmacro %}
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src '{{ script_hash }}'">
<title>{{ title.en }}</title>
<style>
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #1c1e21; --soft: #5f6570; --rule: #d9dce1; --shade: #f4f5f7;
  --c0: #1f5fbf; --c1: #c2410c; --c2: #15803d; --c3: #a21caf;
  --c4: #8a6100; --c5: #0e7490; --c6: #b91c1c; --c7: #57534e;
  --done: #15803d; --stopped: #1f5fbf; --failed: #b91c1c; --superseded: #8a6100; --unknown: #6b7280;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --ink: #e6e8eb; --soft: #a0a7b1; --rule: #353a42; --shade: #1f2329;
    --c0: #7fb0ff; --c1: #ff9a62; --c2: #6fd693; --c3: #e79bf0;
    --c4: #e5bd5c; --c5: #67cfe3; --c6: #ff8a8a; --c7: #bdb7b0;
    --done: #2f9e58; --stopped: #4f86e0; --failed: #d65a5a; --superseded: #b98a2c; --unknown: #808894;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC",
    sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .75rem 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .75rem; padding-bottom: .25rem; border-bottom: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 0 0 .5rem; font-weight: 600; overflow-wrap: anywhere; }
p { margin: .5rem 0; overflow-wrap: anywhere; }
.about, figcaption, .label { color: var(--soft); font-size: .875rem; }
input[name=language], input[name=axis] { position: absolute; opacity: 0; }
input + label { display: inline-block; padding: .15rem .7rem; margin: 0 .25rem .25rem 0; border: 1px solid var(--rule);
  border-radius: 1rem; font-size: .875rem; cursor: pointer; }
input:checked + label { background: var(--ink); color: var(--paper); }
input:focus-visible + label { outline: 2px solid var(--c0); outline-offset: 2px; }
#in-en:checked ~ * [lang=zh], #in-zh:checked ~ * [lang=en] { display: none; }
#by-steps:checked ~ main .on-tokens, #by-steps:checked ~ main .on-hours,
#by-tokens:checked ~ main .on-steps, #by-tokens:checked ~ main .on-hours,
#by-hours:checked ~ main .on-steps, #by-hours:checked ~ main .on-tokens { display: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { text-align: left; vertical-align: top; padding: .25rem 1.25rem .25rem 0;
  border-bottom: 1px solid var(--rule); }
td:nth-child(n+2) { overflow-wrap: anywhere; min-width: min-content; }
td.short { white-space: nowrap; }
th { font-weight: 600; }
td:first-child { color: var(--soft); }
.charts { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.cards { display: grid; gap: .75rem; margin-bottom: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); }
.card { background: var(--shade); border-radius: .4rem; padding: .6rem .8rem; overflow-wrap: anywhere;
  white-space: pre-wrap; }
.label { display: block; }
figure { margin: 0; min-width: 0; }
svg { display: block; width: 100%; height: auto; color: var(--ink); }
svg text { font-size: 12px; fill: var(--soft); }
svg text.y { text-anchor: end; dominant-baseline: middle; }
svg text.x, svg text.axis { text-anchor: middle; }
svg text.bar { text-anchor: middle; fill: #fff; }
svg .grid { stroke: var(--rule); }
polyline { fill: none; stroke-width: 1.75; stroke-linejoin: round; stroke: currentColor; }
polyline.thin { stroke-width: 1.25; stroke-opacity: .7; }
polyline.marked { stroke-width: 2.25; }
polyline.dashed { stroke-dasharray: 5 4; }
circle { fill: currentColor; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: .5rem 0; font-size: .9rem; }
.legend b { display: inline-block; width: 1.2rem; height: .25rem; margin-right: .4rem; vertical-align: middle;
  background: currentColor; border-radius: 1px; }
.legend span span { color: var(--ink); overflow-wrap: anywhere; }
{% for number in range(colours) %}.c{{ number }} { color: var(--c{{ number }}); } {% endfor %}
{% for kind in ("done", "stopped", "failed", "superseded", "unknown") -%}
rect.{{ kind }} { fill: var(--{{ kind }}); } {% endfor %}
pre { background: var(--shade); border-radius: .4rem; padding: .6rem .8rem; font-size: .8rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
</style>
</head>
<body>
<input type="radio" name="language" id="in-en" checked><label for="in-en" lang="">English</label>
<input type="radio" name="language" id="in-zh"><label for="in-zh" lang="">中文</label>
<header>
<h1>{{ words(title) }}</h1>
<p class="about">{{ words(about) }}</p>
{%- if names | length > 1 %}
<div class="legend">
{% for name in names %}<span class="c{{ loop.index0 }}"><b></b><span>{{ name }}</span></span>{% endfor %}

</div>
{%- endif %}
</header>
<p class="about">{{ words(charts_over) }}</p>
{%- for axis, label in axes.items() %}
<input type="radio" name="axis" id="by-{{ axis }}"{% if loop.first %} checked{% endif %}>
<label for="by-{{ axis }}"><span>{{ words(label) }}</span></label>
{%- endfor %}
<main>
{%- for section in sections %}
<section id="{{ section.name }}">
<h2>{{ words(section.title) }}</h2>
{%- for group in section.groups %}
{%- if group.kind == "Chart" %}
<div class="charts">
{%- for chart in group.blocks %}
<figure>
<h3>{{ words(chart.title) }}</h3>
{%- for axis, drawing in chart.drawings.items() %}
<div class="on-{{ axis }}">
{%- if drawing %}{{ drawing }}{% else %}<p class="about">{{ words(no_points) }}</p>{% endif %}</div>
{%- endfor %}
</figure>
{%- endfor %}
</div>
{%- else %}
{%- for block in group.blocks %}
{%- if group.kind == "Note" %}
<p>{{ words(block.text) }}</p>
{%- elif group.kind == "Code" %}
<pre>{{ block.text }}</pre>
{%- elif group.kind == "Cards" %}
<h3>{{ words(block.title) }}</h3>
<div class="cards">
{%- for label, text in block.cards %}
<div class="card"><span class="label">{{ words(label) }}</span>{{ text }}</div>
{%- endfor %}
</div>
{%- elif block.rows %}
<div class="scroll"><table>
{%- if block.header %}
<thead><tr>{% for cell in block.header %}<th>{{ words(cell) }}</th>{% endfor %}</tr></thead>
{%- endif %}
<tbody>
{%- for row in block.rows %}
<tr>
{%- for cell in row %}
<td{% if (cell if cell is string else cell.en) | length < 22 %} class="short"{% endif %}>{{ words(cell) }}</td>
{%- endfor %}
</tr>
{%- endfor %}
</tbody>
</table></div>
{%- endif %}
{%- endfor %}
{%- endif %}
{%- endfor %}
</section>
{%- endfor %}
</main>
<script>{{ script }}</script>
</body>
</html>
"""
