"""Parts of an experiment: what a name in the config stands for, and what does not go with it.

A registry is a dict of parts; its keys are the names that the config may have. A part says in its
own entry which facts it brings, which it needs and which it excludes, each with the reason. `check`
reads that, so that whoever adds a part edits no other place.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ddpm.config import flatten
from ddpm.errors import InputError

# Facts of a schedule.
NO_SIGNAL = "leaves no signal at t = T"
ONE_LEVEL = "has one noise level"
IS_LEARNED = "is learned"
RESCALED = "is rescaled or shifted"
CLOSELY_SPACED = "has its first level as close to the next as any other: a wide decoder"
# Facts of a network and of what its output means.
SEES_LOG_SNR = "the network sees the log-SNR"
PRECONDITIONED = "the network is preconditioned, x_0 alone"
HAS_ENERGY = "the network is the gradient of an energy"
PREDICTS_EPS = "the network predicts eps"
HALF_PRECISION = "the network computes in bfloat16"
SELF_CONDITIONED = "the network sees its own estimate of x_0"
LEARNS_VARIANCE = "the reverse variance is learned"
# Facts of a loss, and of how its times are drawn.
SQUARED = "a squared error that can be weighted"
BOUND = "a bound, with weights of its own"
CONTINUOUS = "the bound in continuous time"
TRAINS_VARIANCE = "the reverse variance is trained"
HAS_VARIANCE = "a fixed reverse variance makes a difference"
EVEN_TIMES = "an integral over evenly drawn times"
CODES_DATA = "a decoder of 8-bit data"
DUAL = "the energy is normalised"
FRACTIONAL = "times between the whole ones, in training"
# Facts of sampling.
SKIPS = "steps longer than from t to t - 1, with a reverse variance"
BETWEEN = "calls between whole times"
FLOW = "a likelihood by the probability flow"


class Blame(NamedTuple):
    """A reason that is reported for another key of the config than the part's own."""

    key: str
    why: str


Reasons = Mapping[str, str | Blame]


@dataclass(frozen=True)
class Part:
    """An entry of a registry.

    make: what the name stands for, as its registry says.
    facts: what is so with this part.
    needs, excludes: facts that must, or must not, hold, and why: the end of a sentence, in which
      {section_key} is the value of config.section.key.
    label: its settings, where they stand in the names of files; None: its name.
    """

    make: Any = None
    facts: Collection[str] = ()
    needs: Reasons = field(default_factory=dict)
    excludes: Reasons = field(default_factory=dict)
    label: Callable[[Any], str] | None = None


Registry = Mapping[str, Part]
Chosen = Mapping[str, tuple[Any, Part]]  # key of the config -> its value, and the part it names


def choose(config: ConfigDict, registries: Mapping[str, Registry]) -> dict[str, tuple[Any, Part]]:
    """Returns what the config chooses of registries, each by the key that names its part."""
    found = {}
    for key, registry in registries.items():
        section, name = key.split(".")
        value = config[section][name]
        found[key] = value, registry[value]
    return found


def check(config: ConfigDict, chosen: Chosen, facts: Mapping[str, str] | None = None) -> None:
    """Raises InputError, with its reason, for the first part that does not go with the others.

    `facts` are those that no part brings, such as those of the schedule's numbers, with the key
    that the error reports, or '' for that of the part that excludes them.
    """
    facts = facts or {}
    there = set(facts).union(*(part.facts for _, part in chosen.values()))
    values = flatten(config)
    names = {key.replace(".", "_"): repr(value) for key, value in values.items()}
    for own, (_, part) in chosen.items():
        wrong = [(fact, why) for fact, why in part.excludes.items() if fact in there]
        wrong += [(fact, why) for fact, why in part.needs.items() if fact not in there]
        for fact, why in wrong:
            key, text = why if isinstance(why, Blame) else (facts.get(fact) or own, why)
            raise InputError(f"config.{key} = {values[key]!r}: {text.format_map(names)}")
