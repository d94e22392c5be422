"""Generated stories with questions, similar to bAbI (Weston et al. 2015). The answers are spans of the story.

People walk between rooms, and pick up, put down and give away things. Each question has one correct answer. The table
has the kinds of questions, their answers, and the sentences that are needed:

    where_person   the room of a person                    the last sentence about the person
    where_thing    the room of a thing that is carried     two sentences: who has it, and the person's room
    who_has        who carries a thing                     the last sentence about the thing
    when           the time of day of a walk               one sentence
    gave_what, gave_to, who_gave     a gift                one sentence
    where_before   the room before another room            two sentences
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from jaxlm.data.examples import Example, Examples

PEOPLE = (
    "Anna", "Ben", "Carol", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack", "Kate", "Leo", "Mary", "Nick",
    "Olivia", "Peter", "Rose", "Sam", "Tina", "Victor",
)  # fmt: skip
ROOMS = (
    "attic", "balcony", "barn", "basement", "bathroom", "bedroom", "cellar", "garage", "garden", "hallway", "kitchen",
    "library", "office", "park", "school", "shop", "stable", "station", "studio", "theatre",
)  # fmt: skip
THINGS = (
    "apple", "ball", "basket", "book", "bottle", "box", "camera", "coat", "cup", "hammer", "key", "lamp", "letter",
    "map", "pen", "phone", "rope", "shoe", "ticket", "umbrella",
)  # fmt: skip
ADJECTIVES = ("big", "black", "blue", "broken", "green", "heavy", "new", "old", "red", "small", "white", "yellow")
TIMES = ("the morning", "the afternoon", "the evening", "the night")
_WALKS = ("went to", "walked to", "moved to", "ran to")
_TAKES = ("picked up", "took", "grabbed")
_DROPS = ("put down", "dropped", "left")
_GIFTS = ("gave", "handed")
KINDS = ("where_person", "where_thing", "who_has", "when", "gave_what", "gave_to", "who_gave", "where_before")
"""The kinds of questions."""

_Mention = tuple[str, int]
"""A word or phrase of the story, and the position of its first character."""


def make_stories(count: int, seed: int = 0, *, sentences: int = 8, questions: int = 2) -> Examples:
    """``count`` questions about generated stories: ``id``, ``context``, ``question``, ``answers``, ``starts``,
    ``group`` (the story) and ``kind``.

    The same arguments give the same questions. With a larger ``count``, the first questions are the same.

    Args:
        seed: seed of the random choices.
        sentences: number of sentences in a story.
        questions: maximum number of questions about one story.

    Raises:
        ValueError: a number is below 1.

    Example:
        >>> example = make_stories(2)[1]
        >>> example["question"], example["answers"], example["starts"]
        ('When did Rose go to the cellar?', ['the evening'], [63])
    """
    for name, value in (("count", count), ("sentences", sentences), ("questions", questions)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    rows: list[Example] = []
    rng = random.Random(f"{seed} {sentences} {questions}")
    number = 0
    while len(rows) < count:
        story = _Story(rng)
        for _ in range(sentences):
            story.add_sentence()
        found = story.questions()
        # The kind is drawn first, so that a kind with many possible questions is not more frequent.
        kinds = list(dict.fromkeys(kind for kind, _, _ in found))
        for kind in rng.sample(kinds, min(questions, len(kinds))):
            _, question, (answer, start) = rng.choice([item for item in found if item[0] == kind])
            rows.append(
                {
                    "id": f"{seed}-{number}-{kind}", "context": story.text, "question": question, "answers": [answer],
                    "starts": [start], "group": f"story {number}", "kind": kind,
                }
            )  # fmt: skip
        number += 1
    return Examples(rows[:count], f"generated stories (seed {seed})")


@dataclasses.dataclass
class _Gift:
    """A gift, with the mentions of its sentence."""

    giver: _Mention
    thing: _Mention
    receiver: _Mention


class _Story:
    """A story: its text, the locations of all people and things, and the mentions in the text that state them."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.text = rng, ""
        self.people = rng.sample(PEOPLE, 3)
        self.rooms = rng.sample(ROOMS, 4)
        adjectives = rng.sample(ADJECTIVES, 3)
        self.things = [f"{a} {t}" for a, t in zip(adjectives, rng.sample(THINGS, 3), strict=True)]
        self.walks: dict[str, list[_Mention]] = {person: [] for person in self.people}
        self.times: dict[tuple[str, str], list[_Mention]] = {}
        self.holder: dict[str, _Mention | None] = dict.fromkeys(self.things)
        self.lies_in: dict[str, _Mention | None] = dict.fromkeys(self.things)
        self.gifts: list[_Gift] = []

    def add_sentence(self) -> None:
        """Append one possible event to the story."""
        carried = [thing for thing in self.things if self.holder[thing] is not None]
        events: list[Callable[[], None]] = [self._walk] * 2
        if any(self.walks.values()) and len(carried) < len(self.things):
            events += [self._take] * 2
        if carried:
            events += [self._drop] + [self._give] * 3
        self.rng.choice(events)()

    def questions(self) -> list[tuple[str, str, _Mention]]:
        """The kind, text and answer of every question that has one correct answer."""
        found = []
        for person, walks in self.walks.items():
            if walks:
                found.append(("where_person", f"Where is {person}?", walks[-1]))
            rooms = [room for room, _ in walks]
            for before, (room, _) in zip(walks, walks[1:], strict=False):
                if rooms.count(room) == 1:
                    found.append(("where_before", f"Where was {person} before the {room}?", before))
        for thing, holder in self.holder.items():
            room_at = self.lies_in[thing]
            if holder is not None:
                found.append(("who_has", f"Who has the {thing}?", holder))
                room_at = self.walks[holder[0]][-1]
            if room_at is not None:
                found.append(("where_thing", f"Where is the {thing}?", room_at))
        for (person, room), times in self.times.items():
            if len(times) == 1 and [name for name, _ in self.walks[person]].count(room) == 1:
                found.append(("when", f"When did {person} go to the {room}?", times[0]))
        return found + self._questions_about_gifts()

    def _questions_about_gifts(self) -> list[tuple[str, str, _Mention]]:
        found = []
        triples = [(gift.giver[0], gift.thing[0], gift.receiver[0]) for gift in self.gifts]
        for gift, (giver, thing, receiver) in zip(self.gifts, triples, strict=True):
            if sum((a, c) == (giver, receiver) for a, _, c in triples) == 1:
                found.append(("gave_what", f"What did {giver} give to {receiver}?", gift.thing))
            if sum((a, b) == (giver, thing) for a, b, _ in triples) == 1:
                found.append(("gave_to", f"Who did {giver} give the {thing} to?", gift.receiver))
            if sum((b, c) == (thing, receiver) for _, b, c in triples) == 1:
                found.append(("who_gave", f"Who gave the {thing} to {receiver}?", gift.giver))
        return found

    # ------------------------------------------------------------------------------------------------ events

    def _walk(self, person: str | None = None, room: str | None = None) -> None:
        person = person or self.rng.choice(self.people)
        room = room or self.rng.choice([room for room in self.rooms if room != self._room(person)])
        if self.rng.random() < 0.5:
            time = self.rng.choice(TIMES)
            time_at, room_at = self._say("In {}, {person} {verb} the {}.", time, room, person=person, verb=_WALKS)
            self.times.setdefault((person, room), []).append(time_at)
        else:
            (room_at,) = self._say("{person} {verb} the {}.", room, person=person, verb=_WALKS)
        self.walks[person].append(room_at)

    def _take(self) -> None:
        person = self.rng.choice([person for person in self.people if self.walks[person]])
        thing = self.rng.choice([thing for thing in self.things if self.holder[thing] is None])
        lies = self.lies_in[thing]
        if lies is not None and lies[0] != self._room(person):
            self._walk(person, lies[0])
            return
        person_at, _ = self._say("{} {verb} the {}.", person, thing, verb=_TAKES)
        self.holder[thing], self.lies_in[thing] = person_at, None

    def _drop(self) -> None:
        thing, person = self._carried()
        self._say("{person} {verb} the {}.", thing, person=person, verb=_DROPS)
        # The last walk of the person is the mention of the room.
        self.holder[thing], self.lies_in[thing] = None, self.walks[person][-1]

    def _give(self) -> None:
        thing, giver = self._carried()
        receiver = self.rng.choice([person for person in self.people if person != giver])
        if self._room(receiver) != self._room(giver):
            self._walk(receiver, self._room(giver))
            return
        giver_at, thing_at, receiver_at = self._say("{} {verb} the {} to {}.", giver, thing, receiver, verb=_GIFTS)
        self.gifts.append(_Gift(giver_at, thing_at, receiver_at))
        self.holder[thing] = receiver_at

    def _room(self, person: str) -> str | None:
        """The room of a person; None before the first walk."""
        return self.walks[person][-1][0] if self.walks[person] else None

    def _carried(self) -> tuple[str, str]:
        """A random thing that is carried, and the person who carries it."""
        holders = {thing: holder[0] for thing, holder in self.holder.items() if holder is not None}
        thing = self.rng.choice(list(holders))
        return thing, holders[thing]

    # ------------------------------------------------------------------------------------------------ words

    def _say(self, template: str, *mentions: str, verb: tuple[str, ...], person: str = "") -> list[_Mention]:
        """Append a sentence; returns the mentions that replace its empty braces, with their positions."""
        parts = template.replace("{verb}", self.rng.choice(verb)).replace("{person}", person).split("{}")
        text = self.text + " " if self.text else ""
        found = []
        for part, mention in zip(parts, mentions, strict=False):
            text += part
            found.append((mention, len(text)))
            text += mention
        self.text = text + parts[-1]
        return found
