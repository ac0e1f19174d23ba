"""Changes of the config that a run may make on its way."""

from typing import Any

from ml_collections import ConfigDict

from ddpm.config.keys import default
from ddpm.config.tree import flatten, to_json
from ddpm.errors import InputError

# Keys, or beginnings of keys, that no weight depends on.
_FREE = ("sampling.", "editing.", "codec.", "comparison.", "evaluation.", "training.steps",
         "training.log_every", "training.sample_every", "training.checkpoint",
         "training.ema_snapshot_every", "data.on_device")  # fmt: skip
# Keys that the weights depend on from here on: a change is reported.
_REPORTED = ("data.path", "data.broken_images", "data.max_pixels", "model.dtype", "model.remat",
             "model.scan_blocks", "training.accumulation",
             "training.learning_rate", "training.warmup_steps", "training.grad_clip")  # fmt: skip


def check_same_run(config: ConfigDict, saved: dict[str, Any], workdir: Any) -> list[str]:
    """Raises InputError if a run folder's config differs in what a run cannot change on its way.

    Returns a phrase for each change that is allowed and that the weights depend on. A key that is
    missing, in a run by an older version, had its default.
    """
    now, before = flatten(to_json(config)), flatten(to_json(default())) | flatten(saved)
    changed = []
    for key in sorted(now.keys() | before.keys()):
        if key.startswith(_FREE) or now.get(key) == before.get(key):
            continue
        if key not in _REPORTED:
            raise InputError(
                f"{workdir} holds a run with config.{key} = {before.get(key)!r}, this one says "
                f"{now.get(key)!r}: choose another --workdir"
            )
        changed.append(f"config.{key} = {now[key]!r}, before {before[key]!r}")
    return changed


def saved_config(saved: dict[str, Any]) -> ConfigDict:
    """Returns the config of a run from the JSON that is saved with it; keys that are missing, in a
    run by an older version, have their defaults."""
    config = default()
    known = flatten(config)
    found = {key: _tuples(value) for key, value in flatten(saved).items() if key in known}
    with config.ignore_type():
        config.update_from_flattened_dict(found)
    return config


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
