"""The published training recipe of each family: optimizer, schedule and regularisation of the optimizer.

    >>> recipe("t5", steps=3000).name
    'adafactor'

A recipe is that of the paper, for its model size, batch and number of updates. :func:`recipe` scales the warm-up to the
length of a training; nothing else is scaled. Learning rates often do not transfer: small models want larger ones (the
peak of a Transformer falls about as the inverse of its width), and small batches smaller ones. ``Recipe.transfer`` says
what is known.
"""

from __future__ import annotations

import dataclasses

from jaxlm.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the authors of a family trained it."""

    optimizer: OptimizerConfig
    """The published numbers."""
    steps: int | None
    """Updates of the published training; None: not published, or as many as validation allows."""
    batch: str
    """The published batch."""
    source: str
    """Paper and section or table, or the authors' code."""
    transfer: str
    """What differs from the paper, and what does not transfer to another size or task."""


RECIPES: dict[str, Recipe] = {
    "gpt": Recipe(
        OptimizerConfig(
            learning_rate=6e-4, schedule="cosine", warmup_steps=750, final_fraction=0.1, beta1=0.9, beta2=0.95,
            epsilon=1e-8, weight_decay=0.1, clip_norm=1.0,
        ),
        600_000, "0.5 M tokens",
        "Brown et al. 2020 (GPT-3), table 2.1 (125 M parameters) and appendix B",
        "GPT-2's paper names no optimizer, so this is GPT-3's for the size of GPT-2. Their cosine ends after 260 of "
        "300 billion tokens, ours at the last step. GPT-1: 2.5e-4, 2,000 steps of warm-up, cosine to 0.",
    ),
    "llama": Recipe(
        OptimizerConfig(
            learning_rate=3e-4, schedule="cosine", warmup_steps=2_000, final_fraction=0.1, beta1=0.9, beta2=0.95,
            epsilon=1e-8, weight_decay=0.1, clip_norm=1.0,
        ),
        250_000, "4 M tokens",
        "Touvron et al. 2023, section 2.3 and table 2 (7 B parameters)",
        "The learning rate is that of 7 B parameters; models of a few million learn with ten times that.",
    ),
    "bert": Recipe(
        OptimizerConfig(
            learning_rate=1e-4, schedule="linear", warmup_steps=10_000, final_fraction=0.0, beta1=0.9, beta2=0.999,
            epsilon=1e-6, weight_decay=0.01, clip_norm=1.0,
        ),
        1_000_000, "256 rows of 128, then 512 tokens",
        "Devlin et al. 2018, appendix A.2; epsilon, clipping and no bias correction from the authors' optimization.py",
        "Our Adam corrects its bias. Fine-tuning (appendix A.3): 2e-5 to 5e-5, batch 16 or 32, 2 to 4 epochs, the "
        "first tenth as warm-up.",
    ),
    "roberta": Recipe(
        OptimizerConfig(
            learning_rate=6e-4, schedule="linear", warmup_steps=24_000, final_fraction=0.0, beta1=0.9, beta2=0.98,
            epsilon=1e-6, weight_decay=0.01, clip_norm=None,
        ),
        500_000, "8,000 rows of 512 tokens",
        "Liu et al. 2019, table 9 (base)",
        "The learning rate belongs to batches of 8,000 rows.",
    ),
    "t5": Recipe(
        OptimizerConfig(
            name="adafactor", learning_rate=1e-2, schedule="inverse_square_root", warmup_steps=0, hold_steps=10_000,
            weight_decay=0.0, clip_norm=None,
        ),
        524_288, "128 rows of 512 tokens",
        "Raffel et al. 2020, sections 3.1.2 and 3.1.3: 1 / sqrt(max(n, 10^4)), relative to the size of each parameter",
        "The rate is relative, so it transfers between sizes; a training of fewer than 10,000 steps has the constant "
        "0.01. Fine-tuning (section 3.1.3): constant 0.001.",
    ),
    "xlnet": Recipe(
        OptimizerConfig(
            learning_rate=4e-4, schedule="linear", warmup_steps=40_000, final_fraction=0.001, beta1=0.9, beta2=0.999,
            epsilon=1e-6, weight_decay=0.01, clip_norm=1.0,
        ),
        500_000, "8,192 rows of 512 tokens",
        "Yang et al. 2019, appendix A.4.1 (large); clipping and last learning rate from the defaults of train.py",
        "The learning rate belongs to batches of 8,192 rows. Fine-tuning (appendix A.4.2): 1e-5 to 3e-5, with layer "
        "decay 0.75 on SQuAD and 1.0 elsewhere.",
    ),
    "transformer_xl": Recipe(
        OptimizerConfig(
            learning_rate=2.5e-4, schedule="cosine", warmup_steps=0, final_fraction=0.0, beta1=0.9, beta2=0.999,
            epsilon=1e-8, weight_decay=0.0, clip_norm=0.25,
        ),
        200_000, "60 rows of 150 tokens",
        "Dai et al. 2019, the authors' pytorch/run_wt103_base.sh and the defaults of train.py",
        "Without warm-up; the larger models have 16,000 steps of it.",
    ),
    "lstm": Recipe(
        OptimizerConfig(
            name="nt_asgd", learning_rate=30.0, schedule="constant", warmup_steps=0, beta1=0.0, weight_decay=1.2e-6,
            clip_norm=0.25,
        ),
        None, "80 rows of about 70 tokens (WikiText-2), 40 (Penn Treebank)",
        "Merity et al. 2017 (AWD-LSTM), section 5; decay and clipping from the authors' main.py",
        "The averaging starts when validation stops improving (jaxlm.training.nt_asgd). The learning rate presumes the "
        "mean loss of a token, dropout as published, and up to 750 epochs: short trainings learn faster with AdamW. "
        "The authors' decay also touches biases.",
    ),
    "gru": Recipe(
        OptimizerConfig(
            name="adadelta", learning_rate=1.0, schedule="constant", warmup_steps=0, beta2=0.95, epsilon=1e-6,
            weight_decay=0.0, clip_norm=None,
        ),
        None, "64 phrase pairs",
        "Cho et al. 2014, section 4.1",
        "Their GRU is an encoder-decoder for phrases. No published GRU language model has a reproducible recipe: Chung "
        "et al. 2014 draw the learning rate of RMSProp at random for each run.",
    ),
    "attention_rnn": Recipe(
        OptimizerConfig(
            name="adadelta", learning_rate=1.0, schedule="constant", warmup_steps=0, beta2=0.95, epsilon=1e-6,
            weight_decay=0.0, clip_norm=1.0,
        ),
        288_000, "80 sentence pairs of similar length",
        "Bahdanau et al. 2015, appendix B.2 and table 2 (RNNsearch-50)",
        "Adadelta needs many updates before its steps are large: trainings of some thousand steps learn faster with "
        "AdamW. Luong et al. 2015: SGD at 1.0, halved after each epoch from the fifth on, clipping at 5, batch 128.",
    ),
    "attention_rnn_lm": Recipe(
        OptimizerConfig(
            learning_rate=1e-3, schedule="constant", warmup_steps=0, beta1=0.9, beta2=0.999, epsilon=1e-8,
            weight_decay=0.0, clip_norm=5.0,
        ),
        None, "64 rows of 20 tokens",
        "Daniluk et al. 2017, training details of section 3",
        "The numbers were not compared with the text of the paper again. Lin et al. 2017 (classification): SGD, with a "
        "learning rate for each data set.",
    ),
    "resnet": Recipe(
        OptimizerConfig(
            name="sgd", learning_rate=0.01, schedule="constant", warmup_steps=0, beta1=0.9, weight_decay=0.0,
            clip_norm=None,
        ),
        None, "128 texts",
        "Conneau et al. 2017 (VDCNN), section 4.2",
        "10 to 15 epochs of up to 3.6 million texts; the paper does not say how the initial learning rate falls.",
    ),
    "resnet_lm": Recipe(
        OptimizerConfig(
            name="sgd", learning_rate=1.0, schedule="constant", warmup_steps=0, beta1=0.99, nesterov=True,
            weight_decay=0.0, clip_norm=0.1,
        ),
        None, "750 rows of 20 tokens (Google Billion Word)",
        "Dauphin et al. 2017 (GCNN), section 4.2: learning rate from [1, 2]",
        "The learning rate presumes weight normalisation, and falls when validation stops improving.",
    ),
    "alexnet": Recipe(
        OptimizerConfig(
            name="sgd", learning_rate=0.01, schedule="constant", warmup_steps=0, beta1=0.9, weight_decay=0.0,
            clip_norm=None,
        ),
        None, "128 texts",
        "Zhang et al. 2015, section 2.1",
        "They halve the learning rate every 3 epochs, 10 times, where an epoch is a number of samples that differs by "
        "data set. The causal form is not published, so neither is its recipe.",
    ),
}  # fmt: skip
"""Family -> its published recipe."""


def recipe(family: str, steps: int) -> OptimizerConfig:
    """The published optimizer of a family for a training of ``steps`` updates.

    The warm-up keeps its share of the training; all other numbers are the published ones. Change some with
    ``dataclasses.replace(recipe(...), learning_rate=...)``.

    Raises:
        ValueError: no such family, or no updates.
    """
    if family not in RECIPES:
        raise ValueError(f"no recipe for family {family!r}: choose from {', '.join(RECIPES)}")
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    published = RECIPES[family]
    warmup = published.optimizer.warmup_steps
    if published.steps is not None:
        warmup = round(warmup * steps / published.steps)
    return dataclasses.replace(published.optimizer, warmup_steps=warmup)
