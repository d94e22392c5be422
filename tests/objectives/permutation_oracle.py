"""The authors' permutation data, step by step as their TensorFlow and numpy code describes it, slow and dense.

Written from its description, with random draws taken from a generator in the same places, so that a test can compare
draw for draw. Masks are 1 where i must NOT see j, as theirs are.
"""

import numpy as np

SEP, CLS = 4, 3


def sample_mask(word_starts, goal, rng, alpha, beta, reverse=False, max_gram=5):
    """Which tokens of a part are to be predicted."""
    starts = np.flip(word_starts) if reverse else word_starts
    length = len(starts)
    mask = np.zeros(length, bool)
    sizes = np.arange(1, max_gram + 1)
    chances = 1.0 / sizes
    chances /= chances.sum()
    predicted = current = 0
    while current < length:
        if predicted >= goal:
            break
        n = min(int(rng.choice(sizes, p=chances)), goal - predicted)
        context = (n * alpha) // beta
        left = int(rng.integers(context))
        right = context - left
        begin = current + left
        while begin < length and not starts[begin]:
            begin += 1
        if begin >= length:
            break
        end, grams = begin + 1, 1
        while end < length:
            if starts[begin]:  # theirs: the start is looked at again and again, not the token at the end
                grams += 1
                if grams > n:
                    break
            end += 1
        if end >= length:
            break
        mask[begin:end] = True
        predicted += end - begin
        current = end + right
    while predicted < goal:
        i = int(rng.integers(length))
        if not mask[i]:
            mask[i] = True
            predicted += 1
    return np.flip(mask) if reverse else mask


def local_perm(inputs, targets, is_masked, perm_size, shuffle):
    """perm_mask, current tokens as targets, target_mask of a part; ``shuffle`` is how rows of indices are permuted."""
    length = len(inputs)
    index = np.arange(length).reshape(-1, perm_size).T
    index = index[shuffle]
    index = index.T.reshape(-1)
    non_functional = ~((inputs == SEP) | (inputs == CLS))
    non_mask = ~is_masked & non_functional
    masked_or_functional = ~non_mask
    rev_index = np.where(non_mask, -1, index)
    target_tokens = masked_or_functional & non_functional
    self_rev_index = np.where(target_tokens, rev_index, rev_index + 1)
    perm_mask = np.zeros((length, length))
    for i in range(length):
        for j in range(length):
            perm_mask[i, j] = self_rev_index[i] <= rev_index[j] and masked_or_functional[j]
    new_targets = np.concatenate([inputs[:1], targets[:-1]])
    return perm_mask, new_targets, target_tokens.astype(np.float32)


def join_parts(first, second):
    """The first part sees nothing of the second, the second all of the first."""
    (mask_0, targets_0, target_mask_0), (mask_1, targets_1, target_mask_1) = first, second
    T0, T1 = len(targets_0), len(targets_1)
    mask = np.concatenate(
        [
            np.concatenate([mask_0, np.ones((T0, T1))], axis=1),
            np.concatenate([np.zeros((T1, T0)), mask_1], axis=1),
        ]
    )
    return mask, np.concatenate([targets_0, targets_1]), np.concatenate([target_mask_0, target_mask_1])


def dense_masks(perm_mask):
    """The masks of the content stream, which may see its own place, and of the query stream."""
    query = (perm_mask > 0).astype(np.float32)
    content = ((query - np.eye(len(query))) > 0).astype(np.float32)
    return content, query
