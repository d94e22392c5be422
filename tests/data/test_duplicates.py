"""Groups of near-duplicates."""

import numpy as np
import pytest

from jaxlm.data.duplicates import group_phrases, group_similar, trigrams

WORDS = [f"w{number}" for number in range(5000)]
RNG = np.random.default_rng(0)


def random_text(words=40):
    return " ".join(RNG.choice(WORDS, words))


def test_texts_are_in_one_group_if_they_share_most_trigrams():
    first, second = random_text(), random_text()
    longer = f"{first} and one more paragraph here"
    assert group_similar([first, second, longer, first.upper() + "!", random_text()]) == [0, 1, 0, 0, 4]
    half = " ".join([*first.split()[:10], *random_text(30).split()])  # 8 of 68 trigrams in common
    assert group_similar([first, half]) == [0, 1]


def test_texts_without_words_are_similar_only_if_they_are_equal():
    assert group_similar(["", "?!", "a", "?!"]) == [0, 1, 2, 1]


def test_similarity_is_the_jaccard_index_of_trigrams():
    first = random_text(60)
    changed = " ".join([*first.split()[:48], *random_text(12).split()])
    jaccard = len(trigrams(first) & trigrams(changed)) / len(trigrams(first) | trigrams(changed))
    assert 0.6 < jaccard < 0.7
    assert group_similar([first, changed], similarity=0.4) == [0, 0]
    assert group_similar([first, changed], similarity=0.9) == [0, 1]


def test_equal_keys_or_similar_texts_merge_groups():
    texts = [random_text() for _ in range(5)]
    texts[3] = texts[0] + " again"
    for keys in (["a", "b", "b", "c", "c"], np.array([1, 2, 2, 3, 3])):
        assert group_similar(texts, keys=keys) == [0, 1, 1, 0, 0]


def test_many_copies_with_small_changes_are_in_one_group():
    template = random_text(30)
    texts = [f"{template} for {number}" for number in range(300)] + [random_text(30) for _ in range(300)]
    groups = group_similar(texts)
    assert set(groups[:300]) == {0}
    assert groups[300:] == list(range(300, 600))


def test_edge_cases_and_invalid_input():
    """Empty texts form one group; wrong keys and similarities are errors."""
    assert group_similar([]) == []
    assert group_similar(["", "", "one"]) == [0, 0, 2]
    with pytest.raises(ValueError, match="each text needs one key: got 2 texts and 1 keys"):
        group_similar(["a", "b"], keys=["a"])
    with pytest.raises(ValueError, match="similarity=0.0 must be above 0"):
        group_similar(["a", "b"], similarity=0.0)


def test_a_sentence_and_its_phrases_are_in_one_group():
    words = RNG.permutation(WORDS)[:67]  # no word occurs twice
    sentences = [" ".join(part) for part in np.split(words, (12, 42, 47))]
    phrases, expected = [], []
    for number, sentence in enumerate(sentences):
        words = sentence.split()
        for _ in range(20):
            start, stop = sorted(RNG.choice(len(words) + 1, 2, replace=False))
            phrases.append(" ".join(words[start:stop]))
            expected.append(number)
    assert group_phrases([*sentences, *phrases]) == [0, 1, 2, 3, *expected]


def test_a_phrase_of_several_sentences_joins_only_the_longest():
    texts = ["one two", "zero one two three", "one two four", "two one", "one two", "One two", "", " "]
    assert group_phrases(texts) == [1, 1, 2, 3, 1, 5, 6, 6]
    assert group_phrases([]) == []
