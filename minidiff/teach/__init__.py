"""Tools of the notebooks: pictures and films with alt text, explorers, exercises that answer."""
from minidiff.teach.check import check
from minidiff.teach.diagram import diagram
from minidiff.teach.explore import explore
from minidiff.teach.film import film
from minidiff.teach.show import show, style
from minidiff.teach.studio import studio
from minidiff.teach.tree import tree

__all__ = ["check", "diagram", "explore", "film", "show", "studio", "style", "tree"]
