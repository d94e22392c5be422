"""XLNet's permutation data: a slow reference with dense masks and the steps of the authors' TensorFlow and numpy code.

It was written from a description of that code. It uses the random generator in the same order as jaxlm, so that tests
can compare exact results. Masks are 1 if query i must NOT attend to key j, as in the authors' code.
"""

import numpy as np

SEP, CLS = 4, 3


def sample_mask(word_starts, goal, rng, alpha, beta, reverse=False, max_gram=5):
    """Return a mask of the tokens of one part that are predicted."""
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
            if starts[begin]:  # as in the authors' code: this checks the token at `begin`, not at `end`
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
    """Return the attention mask [T, T], the targets (the tokens themselves) and the target mask of one part.

    ``shuffle`` is the permutation of the rows of indices.
    """
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
    """Join two parts. The first part cannot attend to the second; the second can attend to all of the first."""
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
    """Return the masks of the content stream, which can attend to its own position, and of the query stream."""
    query = (perm_mask > 0).astype(np.float32)
    content = ((query - np.eye(len(query))) > 0).astype(np.float32)
    return content, query
