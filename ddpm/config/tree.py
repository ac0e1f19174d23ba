"""A config as a tree of keys: flattened, as JSON, changed by name."""

import difflib
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from ddpm.errors import InputError


def variant(config: ConfigDict, variants: Mapping[str, Mapping[str, Any]], name: str) -> ConfigDict:
    """Returns the config with the changes of this name, {'section.key': value}, as a file of
    ablations does. Raises InputError, with the names there are, for another."""
    if name not in variants:
        none = f"there is no {name!r}{nearest(name, variants)}; " if name else ""
        raise InputError(
            f"{none}name one of its variants, --config=FILE.py:NAME: {', '.join(variants)}"
        )
    config.update_from_flattened_dict(variants[name])
    return config


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {'a': {'b': 1}} as {'a.b': 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Returns the config as JSON would give it back: tuples as lists."""
    return json.loads(json.dumps(config.to_dict()))


def nearest(word: Any, possible: Any) -> str:
    """Returns '; did you mean ..?' where one of the possible words is near, else ''."""
    close = difflib.get_close_matches(str(word), list(possible), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def with_settings(config: ConfigDict, **sections: dict[str, Any]) -> tuple[ConfigDict, list[str]]:
    """Returns a copy with keys set, by section, and a phrase for each that differs from before."""
    new, changed = config.copy_and_resolve_references(), []
    for section, settings in sections.items():
        for key, value in settings.items():
            before = new[section][key]
            if isinstance(before, tuple | list):
                before = tuple(before)
            if before != value:
                shown = f"{len(value)} values" if len(str(value)) > 60 else f"{value!r}"
                changed.append(f"config.{section}.{key} = {shown}")
            with new.ignore_type():
                new[section][key] = value
    return new, changed
