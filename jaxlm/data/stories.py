"""Generated stories with questions, similar to bAbI (Weston et al. 2015). The answers are spans of the story.

People walk between rooms, and pick up, put down and give away things. Each question has one correct answer. The table
lists the kinds of questions, their answers, and the sentences that a reader needs:

    where_person   the room of a person                    the sentence about the person's last walk
    where_thing    the room of a thing                     two sentences: who has or dropped the thing, and this
                                                           person's last walk (for a drop: the last walk before it)
    who_has        who carries a thing                     the last sentence about the thing
    when           the time of day of a walk               one sentence
    gave_what      the thing that a person gave            one sentence
    gave_to        the person who received a thing         one sentence
    who_gave       the person who gave a thing             one sentence
    where_before   the previous room of a person           two sentences
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

from jaxlm.config import check_min
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
_WALK_VERBS = ("went to", "walked to", "moved to", "ran to")
_TAKE_VERBS = ("picked up", "took", "grabbed")
_DROP_VERBS = ("put down", "dropped", "left")
_GIVE_VERBS = ("gave", "handed")
KINDS = ("where_person", "where_thing", "who_has", "when", "gave_what", "gave_to", "who_gave", "where_before")
"""The kinds of questions."""
_GIFT_QUESTIONS = (
    ("gave_what", 1, "What did {0} give to {2}?"),
    ("gave_to", 2, "Who did {0} give the {1} to?"),
    ("who_gave", 0, "Who gave the {1} to {2}?"),
)
"""Kind of a question about a gift, index of its answer in the gift, and text of the question."""

_Mention = tuple[str, int]
"""A word or phrase of the story, and the position of its first character."""


def make_stories(count: int, seed: int = 0, *, sentences: int = 8, questions: int = 2) -> Examples:
    """``count`` questions about generated stories, in the format of :func:`jaxlm.data.squad.read_squad`.

    The fields are ``id``, ``context``, ``question``, ``answers``, ``starts``, ``group`` (the story) and ``kind``. The
    same arguments give the same questions. A larger ``count`` only adds questions at the end.

    Args:
        seed: seed of the random choices.
        sentences: number of sentences in a story.
        questions: maximum number of questions about one story.

    Raises:
        ValueError: ``count``, ``sentences`` or ``questions`` is below 1.

    Example:
        >>> example = make_stories(2)[1]
        >>> example["question"], example["answers"], example["starts"]
        ('When did Rose go to the cellar?', ['the evening'], [63])
    """
    check_min(1, count=count, sentences=sentences, questions=questions)
    rows: list[Example] = []
    rng = random.Random(f"{seed} {sentences} {questions}")
    number = 0
    while len(rows) < count:
        story = _Story(rng)
        for _ in range(sentences):
            story.add_sentence()
        candidates = story.questions()
        # Draw the kind first, so that kinds with many possible questions are not more frequent than others.
        kinds = list(dict.fromkeys(kind for kind, _, _ in candidates))
        for kind in rng.sample(kinds, min(questions, len(kinds))):
            _, question, (answer, start) = rng.choice([item for item in candidates if item[0] == kind])
            rows.append(
                {
                    "id": f"{seed}-{number}-{kind}", "context": story.text, "question": question, "answers": [answer],
                    "starts": [start], "group": f"story {number}", "kind": kind,
                }
            )  # fmt: skip
        number += 1
    return Examples(rows[:count], f"generated stories (seed {seed})")


class _Story:
    """A story: its text, and the current state of people and things, stored as mentions in the text.

    Attributes:
        people, rooms, things: the names that the story uses.
        walks: person -> the rooms that the person walked to, in order.
        times: (person, room) -> the times of day of the person's walks to the room, if the sentences name them.
        holder: thing -> the person who carries it, or None.
        dropped_in: thing -> the room in which it was put down, or None if it was never put down or is carried.
        gifts: the mentions of the giver, the thing and the receiver in each sentence about a gift, in order.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.text = rng, ""
        self.people = rng.sample(PEOPLE, 3)
        self.rooms = rng.sample(ROOMS, 4)
        adjectives = rng.sample(ADJECTIVES, 3)
        self.things = [f"{a} {t}" for a, t in zip(adjectives, rng.sample(THINGS, 3), strict=True)]
        self.walks: dict[str, list[_Mention]] = {person: [] for person in self.people}
        self.times: dict[tuple[str, str], list[_Mention]] = {}
        self.holder: dict[str, _Mention | None] = dict.fromkeys(self.things)
        self.dropped_in: dict[str, _Mention | None] = dict.fromkeys(self.things)
        self.gifts: list[tuple[_Mention, ...]] = []

    def add_sentence(self) -> None:
        """Append a sentence about a random event that is possible in the current state.

        If a person must be in another room to take or receive a thing, the sentence is about the walk to this room.
        """
        carried = [thing for thing in self.things if self.holder[thing] is not None]
        events: list[Callable[[], None]] = [self._walk] * 2
        if any(self.walks.values()) and len(carried) < len(self.things):
            events += [self._take] * 2
        if carried:
            events += [self._drop] + [self._give] * 3
        self.rng.choice(events)()

    def questions(self) -> list[tuple[str, str, _Mention]]:
        """The (kind, text, answer) of every question that has one correct answer."""
        candidates = []
        for person, walks in self.walks.items():
            if walks:
                candidates.append(("where_person", f"Where is {person}?", walks[-1]))
            rooms = [room for room, _ in walks]
            for before, (room, _) in zip(walks, walks[1:], strict=False):
                if rooms.count(room) == 1:
                    candidates.append(("where_before", f"Where was {person} before the {room}?", before))
        for thing, holder in self.holder.items():
            room_mention = self.dropped_in[thing]
            if holder is not None:
                candidates.append(("who_has", f"Who has the {thing}?", holder))
                room_mention = self.walks[holder[0]][-1]
            if room_mention is not None:
                candidates.append(("where_thing", f"Where is the {thing}?", room_mention))
        for (person, room), times in self.times.items():
            if len(times) == 1 and [name for name, _ in self.walks[person]].count(room) == 1:
                candidates.append(("when", f"When did {person} go to the {room}?", times[0]))
        about_gifts = [
            (kind, template.format(*(phrase for phrase, _ in gift)), gift[index])
            for gift in self.gifts
            for kind, index, template in _GIFT_QUESTIONS
        ]
        counts = Counter(text for _, text, _ in about_gifts)
        return candidates + [question for question in about_gifts if counts[question[1]] == 1]

    # ------------------------------------------------------------------------------------------------ events

    def _walk(self, person: str | None = None, room: str | None = None) -> None:
        person = person or self.rng.choice(self.people)
        room = room or self.rng.choice([room for room in self.rooms if room != self._current_room(person)])
        if self.rng.random() < 0.5:
            time = self.rng.choice(TIMES)
            time_mention, _, room_mention = self._append_sentence(
                "In {}, {} {verb} the {}.", time, person, room, verb=_WALK_VERBS
            )
            self.times.setdefault((person, room), []).append(time_mention)
        else:
            _, room_mention = self._append_sentence("{} {verb} the {}.", person, room, verb=_WALK_VERBS)
        self.walks[person].append(room_mention)

    def _take(self) -> None:
        person = self.rng.choice([person for person in self.people if self.walks[person]])
        thing = self.rng.choice([thing for thing in self.things if self.holder[thing] is None])
        thing_room = self.dropped_in[thing]
        if thing_room is not None and thing_room[0] != self._current_room(person):
            self._walk(person, thing_room[0])
            return
        person_mention, _ = self._append_sentence("{} {verb} the {}.", person, thing, verb=_TAKE_VERBS)
        self.holder[thing], self.dropped_in[thing] = person_mention, None

    def _drop(self) -> None:
        thing, person = self._random_carried_thing()
        self._append_sentence("{} {verb} the {}.", person, thing, verb=_DROP_VERBS)
        # The sentence does not name the room, so store the mention in the sentence about the person's last walk.
        self.holder[thing], self.dropped_in[thing] = None, self.walks[person][-1]

    def _give(self) -> None:
        thing, giver = self._random_carried_thing()
        receiver = self.rng.choice([person for person in self.people if person != giver])
        if self._current_room(receiver) != self._current_room(giver):
            self._walk(receiver, self._current_room(giver))
            return
        gift = self._append_sentence("{} {verb} the {} to {}.", giver, thing, receiver, verb=_GIVE_VERBS)
        self.gifts.append(tuple(gift))
        self.holder[thing] = gift[2]

    def _current_room(self, person: str) -> str | None:
        """The room of a person; None before the first walk."""
        return self.walks[person][-1][0] if self.walks[person] else None

    def _random_carried_thing(self) -> tuple[str, str]:
        """A random carried thing, and the person who carries it."""
        holders = {thing: holder[0] for thing, holder in self.holder.items() if holder is not None}
        thing = self.rng.choice(list(holders))
        return thing, holders[thing]

    # ------------------------------------------------------------------------------------------------ text

    def _append_sentence(self, template: str, *phrases: str, verb: tuple[str, ...]) -> list[_Mention]:
        """Append a sentence. Returns the mentions of ``phrases``, which fill the empty braces of the template.

        Args:
            verb: the verbs from which one is drawn.
        """
        parts = template.replace("{verb}", self.rng.choice(verb)).split("{}")
        text = self.text + " " if self.text else ""
        mentions = []
        for part, phrase in zip(parts, phrases, strict=False):
            text += part
            mentions.append((phrase, len(text)))
            text += phrase
        self.text = text + parts[-1]
        return mentions
