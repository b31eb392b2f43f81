"""Settings of `jupyter nbconvert --to slides --config notebooks/slides.py`: slides without a network (see README)."""
from nbconvert.exporters.html import HTMLExporter

c = get_config()  # noqa: F821, given by nbconvert

exporter = c.SlidesExporter
exporter.reveal_url_prefix = "node_modules/reveal.js"
exporter.jquery_url = "node_modules/jquery/dist/jquery.min.js"
exporter.require_js_url = "node_modules/requirejs/require.js"
exporter.mathjax_url = "node_modules/mathjax/MathJax.js?config=TeX-AMS_HTML"
exporter.font_awesome_url = "data:text/css,"
exporter.reveal_theme = "white"
exporter.reveal_number = "c/t"
exporter.reveal_scroll = True
exporter.reveal_width, exporter.reveal_height = "1400", "900"
# not a setting of nbconvert; the notebooks have no such diagrams
HTMLExporter.mermaid_js_url = "data:text/javascript,export default {initialize() {}}"
