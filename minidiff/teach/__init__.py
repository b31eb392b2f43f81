"""Tools of the notebooks: pictures and films with alt text, explorers, exercises that answer."""
from minidiff.teach.check import check
from minidiff.teach.film import film
from minidiff.teach.show import show, style

__all__ = ["check", "explore", "film", "show", "style"]


def __getattr__(name: str):
    if name == "explore":  # until it is wanted: ipywidgets takes half a second to import
        from minidiff.teach.explore import explore

        return explore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
