"""Numbers and truth values of every library, as Python's own; what only looks like one is refused."""
from __future__ import annotations

import math
import operator
import reprlib


def whole(name: str, value: object, low: int, high: int, text: str | None = None) -> int:
    """A whole number as Python's int, whether it is Python's, NumPy's or a tensor's; no bool, no float.

    Raises:
        ValueError: something else, or outside low … high; it says `text`, if given.

    >>> whole("steps", 8.0, 1, 1000)
    Traceback (most recent call last):
    ValueError: steps is 8.0; it must be a whole number from 1 to 1000
    """
    try:
        index = None if _is_odd(value) else operator.index(value)
    except (TypeError, RuntimeError):                                     # of tensors without numbers
        index = None
    if index is None or not low <= index <= high:
        text = text or f"{name} is {_shown(value)}; it must be a whole number from {low} to {high}"
        raise ValueError(text + (_kind(value) if index is None else ""))
    return index


def number(name: str, value: object, share: bool = False) -> float:
    """A finite number, or a share in [0, 1], as Python's float, whether it is Python's, NumPy's or a tensor's; no bool.

    Raises:
        ValueError: something else.

    >>> number("eta", 1.5, share=True)
    Traceback (most recent call last):
    ValueError: eta is 1.5; it must be between 0 and 1
    """
    kind = ""
    try:
        real = None if _is_odd(value) or isinstance(value, (str, bytes)) else float(value)
    except OverflowError:
        real = math.inf
    except (TypeError, ValueError, RuntimeError):
        real = None
    if real is None:
        real, kind = math.nan, _kind(value)
    if not (0 <= real <= 1 if share else math.isfinite(real)):
        rule = "between 0 and 1" if share else "a finite number"
        raise ValueError(f"{name} is {_shown(value)}; it must be {rule}{kind}")
    return real


def truth(name: str, value: object) -> bool:
    """True or False as Python's bool, whether it is Python's, NumPy's or a tensor's.

    Raises:
        ValueError: something else: a text such as "no" would count as true.

    >>> truth("long", "no")
    Traceback (most recent call last):
    ValueError: long is 'no'; it must be True or False
    """
    if isinstance(value, bool) or _is_odd(value) and getattr(value, "ndim", 0) == 0:
        return bool(value)
    raise ValueError(f"{name} is {reprlib.repr(value)}; it must be True or False")


def text(value: str) -> str:
    """The text itself, if it is one.

    Raises:
        ValueError: it is of another type, or holds surrogates, what Python makes of bytes that it cannot decode.

    >>> text("caf\\udce9")
    Traceback (most recent call last):
    ValueError: the text 'caf\\udce9' holds bytes that are not UTF-8; write it anew in UTF-8
    """
    if not isinstance(value, str):
        raise ValueError(f"a prompt is a text, not a {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text {value!a} holds bytes that are not UTF-8; write it anew in UTF-8") from error
    return value


def _is_odd(value: object) -> bool:
    """Whether it would pass for a number, but is a truth value, or an array or tensor with axes."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool") or getattr(value, "ndim", 0) > 0


def _kind(value: object) -> str:
    return "" if isinstance(value, (bool, float)) else f", not a {type(value).__name__}"


def _shown(value: object) -> str:
    try:
        return f"{value}"
    except ValueError:                                                    # an int of more digits than Python prints
        return "a number of thousands of digits"
