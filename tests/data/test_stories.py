"""Generated stories: every answer is a span, and a second reading of the story gives the same answer."""

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


def read(story: str) -> dict[str, str]:
    """Every question with a single answer, from the sentences alone."""
    room: dict[str, str] = {}
    visited: dict[str, list[str]] = collections.defaultdict(list)
    holder: dict[str, str] = {}
    lies: dict[str, str] = {}
    answers: dict[str, set[str]] = collections.defaultdict(set)
    for sentence in story.removesuffix(".").split(". "):
        if walk := WALK.fullmatch(sentence):
            who, where = walk["who"], walk["room"]
            if who in room:
                answers[f"Where was {who} before the {where}?"].add(room[who] + "#" + str(len(visited[who])))
            visited[who].append(where)
            room[who] = where
            if walk["time"]:
                answers[f"When did {who} go to the {where}?"].add(walk["time"])
        elif take := TAKE.fullmatch(sentence):
            assert take["thing"] not in holder, "somebody else has it"
            assert lies.get(take["thing"], room[take["who"]]) == room[take["who"]], "it is elsewhere"
            holder[take["thing"]] = take["who"]
        elif drop := DROP.fullmatch(sentence):
            assert holder.pop(drop["thing"]) == drop["who"]
            lies[drop["thing"]] = room[drop["who"]]
        else:
            gift = GIVE.fullmatch(sentence)
            assert gift is not None, sentence
            who, thing, to = gift["who"], gift["thing"], gift["to"]
            assert holder[thing] == who
            assert room[who] == room[to], "they are in different rooms"
            holder[thing] = to
            answers[f"What did {who} give to {to}?"].add(thing)
            answers[f"Who did {who} give the {thing} to?"].add(to)
            answers[f"Who gave the {thing} to {to}?"].add(who)
    for who, where in room.items():
        answers[f"Where is {who}?"].add(where)
    for thing, who in holder.items():
        answers[f"Who has the {thing}?"].add(who)
    for thing in {**holder, **lies}:
        answers[f"Where is the {thing}?"].add(room[holder[thing]] if thing in holder else lies[thing])
    return {question: found.pop().split("#")[0] for question, found in answers.items() if len(found) == 1}


def test_every_answer_is_a_span_and_the_only_answer() -> None:
    for example in EXAMPLES:
        (answer,), (start,) = example["answers"], example["starts"]
        assert example["context"][start : start + len(answer)] == answer
        assert read(example["context"])[example["question"]] == answer, example


def test_all_kinds_occur_with_two_questions_of_different_kinds_about_a_story() -> None:
    counts = collections.Counter(EXAMPLES.column("kind"))
    assert set(counts) == set(KINDS)
    assert min(counts.values()) > 50
    per_story = collections.defaultdict(list)
    for example in EXAMPLES:
        per_story[example["context"]].append(example["kind"])
    assert all(len(set(kinds)) == len(kinds) <= 2 for kinds in per_story.values())
    assert len(set(EXAMPLES.column("group"))) == len(per_story)
    assert len(set(EXAMPLES.column("id"))) == len(EXAMPLES)


def test_seed_and_count() -> None:
    assert list(make_stories(30)) == list(EXAMPLES[:30])
    assert make_stories(30, seed=1).column("context") != EXAMPLES[:30].column("context")
    assert len(make_stories(7, sentences=3, questions=1)) == 7


def test_the_vocabulary_is_small() -> None:
    texts = (example["context"] + " " + example["question"] for example in EXAMPLES)
    assert 100 <= len({word for text in texts for word in re.findall(r"\w+", text)}) <= 200


@pytest.mark.parametrize("bad", ["count", "sentences", "questions"])
def test_numbers_below_one(bad: str) -> None:
    options: dict[str, Any] = {"count": 2, bad: 0}
    with pytest.raises(ValueError, match=f"{bad}=0 must be at least 1"):
        make_stories(**options)
