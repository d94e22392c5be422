"""Generated stories: every answer is a span, and an independent parser of the story finds the same answer."""

from __future__ import annotations

import collections
import re
from typing import Any

import pytest

from jaxlm.data.stories import KINDS, make_stories

EXAMPLES = make_stories(2000)
WALK = re.compile(r"(?:In (?P<time>the \w+), )?(?P<who>\w+) (?:went|walked|moved|ran) to the (?P<room>\w+)")
TAKE = re.compile(r"(?P<who>\w+) (?:picked up|took|grabbed) the (?P<thing>\w+ \w+)")
DROP = re.compile(r"(?P<who>\w+) (?:put down|dropped|left) the (?P<thing>\w+ \w+)")
GIVE = re.compile(r"(?P<who>\w+) (?:gave|handed) the (?P<thing>\w+ \w+) to (?P<to>\w+)")


def answers_of(story: str) -> dict[str, str]:
    """Parse the story. Return all questions that have exactly one answer, with this answer."""
    room_of: dict[str, str] = {}
    visited: dict[str, list[str]] = collections.defaultdict(list)
    holder_of: dict[str, str] = {}
    room_of_thing: dict[str, str] = {}
    answers: dict[str, set[str]] = collections.defaultdict(set)
    for sentence in story.removesuffix(".").split(". "):
        if walk := WALK.fullmatch(sentence):
            who, room = walk["who"], walk["room"]
            if who in room_of:
                answers[f"Where was {who} before the {room}?"].add(room_of[who] + "#" + str(len(visited[who])))
            visited[who].append(room)
            room_of[who] = room
            if walk["time"]:
                answers[f"When did {who} go to the {room}?"].add(walk["time"])
        elif take := TAKE.fullmatch(sentence):
            assert take["thing"] not in holder_of, "somebody has the thing already"
            assert room_of_thing.get(take["thing"], room_of[take["who"]]) == room_of[take["who"]], (
                "the thing is in another room"
            )
            holder_of[take["thing"]] = take["who"]
        elif drop := DROP.fullmatch(sentence):
            assert holder_of.pop(drop["thing"]) == drop["who"]
            room_of_thing[drop["thing"]] = room_of[drop["who"]]
        else:
            gift = GIVE.fullmatch(sentence)
            assert gift is not None, sentence
            who, thing, receiver = gift["who"], gift["thing"], gift["to"]
            assert holder_of[thing] == who
            assert room_of[who] == room_of[receiver], "the two people are in different rooms"
            holder_of[thing] = receiver
            answers[f"What did {who} give to {receiver}?"].add(thing)
            answers[f"Who did {who} give the {thing} to?"].add(receiver)
            answers[f"Who gave the {thing} to {receiver}?"].add(who)
    for who, room in room_of.items():
        answers[f"Where is {who}?"].add(room)
    for thing, who in holder_of.items():
        answers[f"Who has the {thing}?"].add(who)
    for thing in {**holder_of, **room_of_thing}:
        answers[f"Where is the {thing}?"].add(room_of[holder_of[thing]] if thing in holder_of else room_of_thing[thing])
    return {question: found.pop().split("#")[0] for question, found in answers.items() if len(found) == 1}


def test_every_answer_is_a_span_and_unique() -> None:
    for example in EXAMPLES:
        (answer,), (start,) = example["answers"], example["starts"]
        assert example["context"][start : start + len(answer)] == answer
        assert answers_of(example["context"])[example["question"]] == answer, example


def test_all_kinds_of_questions_occur_and_differ_within_a_story() -> None:
    counts = collections.Counter(EXAMPLES.column("kind"))
    assert set(counts) == set(KINDS)
    assert min(counts.values()) > 50
    per_story = collections.defaultdict(list)
    for example in EXAMPLES:
        per_story[example["context"]].append(example["kind"])
    assert all(len(set(kinds)) == len(kinds) <= 2 for kinds in per_story.values())
    assert len(set(EXAMPLES.column("group"))) == len(per_story)
    assert len(set(EXAMPLES.column("id"))) == len(EXAMPLES)


def test_stories_depend_on_seed_and_count() -> None:
    assert list(make_stories(30)) == list(EXAMPLES[:30])
    assert make_stories(30, seed=1).column("context") != EXAMPLES[:30].column("context")
    assert len(make_stories(7, sentences=3, questions=1)) == 7


def test_the_vocabulary_is_small() -> None:
    texts = (example["context"] + " " + example["question"] for example in EXAMPLES)
    assert 100 <= len({word for text in texts for word in re.findall(r"\w+", text)}) <= 200


@pytest.mark.parametrize("bad", ["count", "sentences", "questions"])
def test_options_must_be_at_least_1(bad: str) -> None:
    options: dict[str, Any] = {"count": 2, bad: 0}
    with pytest.raises(ValueError, match=f"{bad}=0 must be at least 1"):
        make_stories(**options)
