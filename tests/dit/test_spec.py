from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any

import pytest

from dit.spec import Spec, kinds, knob, knobs, parse, spec


class Drink(Spec):
    __slots__ = ()


class Cake(Spec):
    __slots__ = ()


@spec("hot-tea", paper="Tea, 1610")
class Tea(Drink):
    """Tea."""

    minutes: int = knob(default=3, label="Time in the pot", low=1, high=10, unit="min")
    strength: float = knob(default=0.5, label="Strength", low=0.0, high=1.0)
    milk: bool | None = knob(default=None, label="Milk")
    kind: str = knob(default="green", label="Kind", choices=("green", "black"))
    spices: tuple[str, ...] = knob(default=(), label="Spices")
    name_of_guest: str = knob(default="", label="Guest")

    def check(self) -> None:
        if self.kind == "green" and self.milk:
            raise ValueError("hot-tea: milk goes into black tea")


@spec("carrot")
class Carrot(Cake):
    """A cake."""


def test_a_spec_is_frozen_slotted_and_keyword_only() -> None:
    tea: Any = Tea()
    with pytest.raises(dataclasses.FrozenInstanceError):
        tea.minutes = 5
    assert not hasattr(tea, "__dict__")
    with pytest.raises(TypeError):
        Tea(5)  # type: ignore[misc]
    assert (Tea.name, Tea.paper) == ("hot-tea", "Tea, 1610")


def test_families_are_apart() -> None:
    assert kinds(Drink) == {"hot-tea": Tea}
    assert kinds(Cake) == {"carrot": Carrot}
    with pytest.raises(ValueError, match="unknown cake 'hot-tea'"):
        parse(Cake, "hot-tea")


def test_two_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two specs are called 'hot-tea'"):

        @spec("hot-tea")
        class Other(Drink):
            pass


def test_a_class_without_a_family_is_refused() -> None:
    with pytest.raises(TypeError, match="belongs to no family"):

        @spec("alone")
        class Alone(Spec):
            pass


ALL = [
    Tea(),
    Tea(minutes=7, strength=1),
    Tea(kind="black", milk=True),
    Tea(milk=False, strength=0.1),
    Tea(minutes=10, kind="black", milk=None),
]


@pytest.mark.parametrize("tea", ALL, ids=str)
def test_text_dictionary_and_object_are_equal(tea: Tea) -> None:
    assert (
        parse(Drink, str(tea))
        == parse(Drink, json.loads(json.dumps(tea.to_dict())))
        == parse(Drink, tea)
        == tea
    )
    assert pickle.loads(pickle.dumps(tea)) == tea  # noqa: S301  # our own bytes
    assert hash(parse(Drink, str(tea))) == hash(tea)


def test_a_tuple_makes_the_round_trip_through_json() -> None:
    tea = Tea(spices=("clove", "cardamom"))
    assert tea.to_dict()["spices"] == ["clove", "cardamom"]
    assert parse(Drink, json.loads(json.dumps(tea.to_dict()))) == tea


def test_the_text_is_the_shortest() -> None:
    assert str(Tea()) == "hot-tea"
    assert str(Tea(minutes=3, milk=False)) == "hot-tea:milk=false"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"minutes": 0}, "hot-tea: minutes must be a whole number from 1 to 10 min, got 0"),
        ({"minutes": 2.5}, "minutes must be a whole number from 1 to 10 min, got 2.5"),
        ({"minutes": True}, "minutes must be .*, got True"),
        ({"minutes": None}, "minutes must be .*, got None"),
        ({"strength": float("nan")}, "strength must be a finite number, got nan"),
        ({"strength": 1.01}, "strength must be a number from 0 to 1, got 1.01"),
        ({"strength": "0.5"}, "strength must be .*, got '0.5'"),
        ({"kind": "blac"}, r"kind must be one of green, black, got 'blac' \(did you mean 'black'\?\)"),
        ({"milk": 1}, "milk must be true or false or none, got 1"),
        ({"milk": True}, "milk goes into black tea"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Tea(**settings)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hot-te", r"unknown drink 'hot-te' \(did you mean 'hot-tea'\?\); there are: hot-tea"),
        ("hot-tea:minuts=3", r"hot-tea: no setting 'minuts' \(did you mean 'minutes'\?\)"),
        ("hot-tea:minutes", "settings are written key=value, got 'minutes'"),
        ("hot-tea:minutes=three", "minutes must be a whole number .*, got 'three'"),
        ("hot-tea:minutes=99", "minutes must be a whole number .*, got 99"),
        ("hot-tea:milk=perhaps", "milk must be true or false or none, got 'perhaps'"),
        ({"minutes": 3}, "expected text or a dictionary with a name"),
        ({"name": "hot-tea", "sugar": 1}, "no setting 'sugar'"),
        (3, "expected text or a dictionary"),
    ],
)
def test_wrong_text_is_answered_with_the_nearest_right_one(text: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(Drink, text)


def test_text_may_have_spaces_and_every_type() -> None:
    found = parse(Drink, " hot-tea : minutes = 4 , strength=1, milk=none, kind=black ")
    assert found == Tea(minutes=4, strength=1.0, kind="black")


def test_replace_checks_again() -> None:
    assert Tea().replace(minutes=4) == Tea(minutes=4)
    with pytest.raises(ValueError, match="minutes"):
        Tea().replace(minutes=0)


def test_knobs_carry_everything_a_page_needs() -> None:
    minutes, _, milk, kind, spices, _ = knobs(Tea)
    assert (minutes.name, minutes.type, minutes.default, minutes.label) == (
        "minutes",
        int,
        3,
        "Time in the pot",
    )
    assert (minutes.low, minutes.high, minutes.unit, minutes.optional) == (1, 10, "min", False)
    assert (milk.type, milk.optional) == (bool, True)
    assert kind.choices == ("green", "black")
    assert spices.type is tuple
