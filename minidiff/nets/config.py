"""A network's shape as a dataclass, checked against what a `config.json` says: every key, type and range."""

import dataclasses
import math
from types import NoneType, UnionType
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

REFUSED = object()  # in place of a value that a field does not take
LARGEST = 2**20  # of the whole numbers in a config: widths, counts, sides


@dataclasses.dataclass(frozen=True)
class Config:
    """A network's shape, read from and written to `config.json`. Subclasses add the fields.

    Class attributes of a subclass:
        saved: entries that `to_dict` adds, such as `_class_name`.
        renamed: {our field: name in the file}.
        default: {key that is no field: the one value at which it may stand, besides null}.
        ignored: keys that do not change what the network computes.
    """

    saved: ClassVar[dict[str, Any]] = {}
    renamed: ClassVar[dict[str, str]] = {}
    default: ClassVar[dict[str, Any]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Make a config from a parsed `config.json`. Missing keys take diffusers' class default.

        Raises:
            ValueError: a key that we do not know says anything but null, false, empty or its default; a value is of
                another type than its field; or the config is of another class.

        >>> from minidiff.nets.vae import VAEConfig
        >>> VAEConfig.from_dict({"latent_channels": 8, "act_fn": "silu", "_diffusers_version": "0.6"}).latent_channels
        8
        """
        fields = {cls.renamed.get(f.name, f.name): f.name for f in dataclasses.fields(cls)}
        given, hints, name = {}, get_type_hints(cls), cls.saved.get("_class_name")
        if name and values.get("_class_name", name) != name:
            raise ValueError(f"the config is of a {values['_class_name']}, not of a {name}")
        for key, value in values.items():
            value = _tuples(value)
            if key in fields:
                given[fields[key]] = _typed(value, hints[fields[key]])
                if given[fields[key]] is REFUSED:
                    raise ValueError(f"{cls.__name__} has {key} = {value!r}; it should be {_said(hints[fields[key]])}")
            elif not (key.startswith("_") or key in cls.ignored or value is None
                      or (value == cls.default[key] if key in cls.default else value in (False, "", {})
                          or isinstance(value, tuple) and not any(value))):
                raise ValueError(f"{cls.__name__} does not support {key} = {value!r}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The entries of `config.json`, under the names in the file.

        >>> from minidiff.nets.unet import UNetConfig
        >>> UNetConfig(heads=4).to_dict()["attention_head_dim"]
        4
        """
        fields = {self.renamed.get(f.name, f.name): getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**self.saved, **fields}


def _typed(value: Any, hint: Any) -> Any:
    """A value as a field of this type takes it: whole floats are ints, ints are floats; else REFUSED."""
    if get_origin(hint) is tuple:
        parts = [_typed(part, get_args(hint)[0]) for part in value] if isinstance(value, tuple) else [REFUSED]
        return REFUSED if REFUSED in parts else tuple(parts)
    if isinstance(hint, UnionType):
        return next((typed for part in get_args(hint) if (typed := _typed(value, part)) is not REFUSED), REFUSED)
    if hint in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
        fits = math.isfinite(value) and (hint is float or 0 <= value <= LARGEST and value == value // 1)
        return hint(value) if fits else REFUSED
    return value if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)) else REFUSED


def _said(hint: Any) -> str:
    """A field's type for a reader of JSON."""
    names = {int: f"a whole number from 0 to {LARGEST:,}", float: "a number", bool: "true or false", str: "a text",
             NoneType: "null"}
    if isinstance(hint, UnionType):
        return " or ".join(map(_said, get_args(hint)))
    if get_origin(hint) is tuple:
        return {int: "a list of whole numbers", str: "a list of texts"}[get_args(hint)[0]]
    return names.get(hint, hint.__name__)


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, all the way down: a frozen config is hashable."""
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
