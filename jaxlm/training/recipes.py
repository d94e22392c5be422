"""The published training recipe of each family: optimizer, schedule, weight decay and clipping.

    >>> recipe("t5").name
    'adafactor'

The option ``--recipe FAMILY`` of the modules in ``experiments/`` selects a recipe by the name of its family.

A recipe has the values of the paper. They are for the paper's model size, batch size and number of updates. If the
paper does not state a value, or has a schedule that jaxlm does not have, ``source`` or ``transfer`` says so. Adam's
usual values (``epsilon`` 1e-8, betas 0.9 and 0.999) are an exception: a recipe may have them without such a note.
:func:`recipe` converts the number of warm-up steps to a fraction of the training and changes no other value.

Learning rates often do not transfer to other sizes. Small models need larger learning rates: the best peak learning
rate of a Transformer is roughly proportional to the inverse of its width. Small batches need smaller learning rates.
``Recipe.transfer`` says what is known for each family.
"""

from __future__ import annotations

import dataclasses

from jaxlm.models.registry import family_names
from jaxlm.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The published training settings of a family."""

    optimizer: OptimizerConfig
    """The published optimizer settings."""
    steps: int | None
    """Number of updates of the published training. None: not published, or published only in epochs, or determined by
    early stopping."""
    batch: str
    """The published batch size."""
    source: str
    """Paper and section or table, or the authors' code."""
    transfer: str
    """Differences between the recipe and the paper, and settings that do not transfer to another size or task."""


RECIPES: dict[str, Recipe] = {
    "gpt": Recipe(
        OptimizerConfig(
            learning_rate=6e-4, schedule="cosine", warmup_steps=750, final_fraction=0.1, beta1=0.9, beta2=0.95,
            epsilon=1e-8, weight_decay=0.1, clip_norm=1.0,
        ),
        600_000, "0.5 M tokens",
        "Brown et al. 2020 (GPT-3), table 2.1 (125 M parameters) and appendix B",
        "GPT-2's paper names no optimizer, so this is GPT-3's recipe for a model of GPT-2's size. GPT-3's cosine decay "
        "ends after 260 of 300 billion tokens; here it ends at the last step. GPT-1: learning rate 2.5e-4, 2,000 "
        "steps of warm-up, cosine decay to 0.",
    ),
    "llama": Recipe(
        OptimizerConfig(
            learning_rate=3e-4, schedule="cosine", warmup_steps=2_000, final_fraction=0.1, beta1=0.9, beta2=0.95,
            epsilon=1e-8, weight_decay=0.1, clip_norm=1.0,
        ),
        250_000, "4 M tokens",
        "Touvron et al. 2023, section 2.3 and table 2 (7 B parameters)",
        "The learning rate is for 7 B parameters. Models of a few million parameters need about ten times this value.",
    ),
    "bert": Recipe(
        OptimizerConfig(
            learning_rate=1e-4, schedule="linear", warmup_steps=10_000, final_fraction=0.0, beta1=0.9, beta2=0.999,
            epsilon=1e-6, weight_decay=0.01, clip_norm=1.0,
        ),
        1_000_000, "256 rows of 128 tokens, later of 512 tokens",
        "Devlin et al. 2019, appendix A.2; epsilon and clipping from the authors' optimization.py",
        "The Adam of the authors' optimization.py has no bias correction; jaxlm's Adam has it. Fine-tuning (appendix "
        "A.3): learning rate 2e-5 to 5e-5, batch size 16 or 32, 2 to 4 epochs, with 10 % of the steps as warm-up.",
    ),
    "roberta": Recipe(
        OptimizerConfig(
            learning_rate=6e-4, schedule="linear", warmup_steps=24_000, final_fraction=0.0, beta1=0.9, beta2=0.98,
            epsilon=1e-6, weight_decay=0.01, clip_norm=None,
        ),
        500_000, "8,000 rows of 512 tokens",
        "Liu et al. 2019, table 9 (base)",
        "The learning rate is for batches of 8,000 rows.",
    ),
    "t5": Recipe(
        OptimizerConfig(
            name="adafactor", learning_rate=1e-2, schedule="inverse_square_root", warmup_steps=0, hold_steps=10_000,
            weight_decay=0.0, clip_norm=None,
        ),
        524_288, "128 rows of 512 tokens",
        "Raffel et al. 2020, section 3.1.2: 1 / sqrt(max(n, 10^4)), relative to the RMS of each parameter",
        "The learning rate is relative to the RMS of each parameter, so it transfers between model sizes. It is "
        "constant at 0.01 for the first 10,000 steps. Fine-tuning (section 3.1.2): constant 0.001.",
    ),
    "xlnet": Recipe(
        OptimizerConfig(
            learning_rate=4e-4, schedule="linear", warmup_steps=40_000, final_fraction=0.001, beta1=0.9, beta2=0.999,
            epsilon=1e-6, weight_decay=0.01, clip_norm=1.0,
        ),
        500_000, "8,192 rows of 512 tokens",
        "Yang et al. 2019, appendix A.4.1 (large); clipping and last learning rate from the defaults of train.py",
        "The learning rate is for batches of 8,192 rows. Fine-tuning (appendix A.4.2): learning rate 1e-5 to 3e-5, "
        "with layer decay 0.75 on SQuAD and 1.0 on the other tasks.",
    ),
    "transformer_xl": Recipe(
        OptimizerConfig(
            learning_rate=2.5e-4, schedule="cosine", warmup_steps=0, final_fraction=0.0, beta1=0.9, beta2=0.999,
            epsilon=1e-8, weight_decay=0.0, clip_norm=0.25,
        ),
        200_000, "60 rows of 150 tokens",
        "Dai et al. 2019, the authors' pytorch/run_wt103_base.sh and the defaults of train.py",
        "The base model (this recipe) has no warm-up. The large model on WikiText-103 has 16,000 steps of warm-up "
        "(run_wt103_large.sh).",
    ),
    "lstm": Recipe(
        OptimizerConfig(
            name="nt_asgd", learning_rate=30.0, schedule="constant", warmup_steps=0, beta1=0.0, weight_decay=1.2e-6,
            clip_norm=0.25,
        ),
        None, "80 rows (WikiText-2) or 40 rows (Penn Treebank) of about 70 tokens",
        "Merity et al. 2017 (AWD-LSTM), section 5; decay and clipping from the authors' main.py",
        "Averaging starts when validation stops improving (jaxlm.training.nt_asgd). The learning rate is for the mean "
        "loss per token, the published dropout and up to 750 epochs. Models learn faster with AdamW if the training is "
        "short. The authors' weight decay also applies to biases; jaxlm's weight decay does not.",
    ),
    "gru": Recipe(
        OptimizerConfig(
            name="adadelta", learning_rate=1.0, schedule="constant", warmup_steps=0, beta2=0.95, epsilon=1e-6,
            weight_decay=0.0, clip_norm=None,
        ),
        None, "64 phrase pairs",
        "Cho et al. 2014, section 4.1",
        "The paper's GRU is an encoder-decoder for phrases. No published GRU language model has a reproducible recipe: "
        "Chung et al. 2014 sample the learning rate of RMSProp for each run.",
    ),
    "attention_rnn": Recipe(
        OptimizerConfig(
            name="adadelta", learning_rate=1.0, schedule="constant", warmup_steps=0, beta2=0.95, epsilon=1e-6,
            weight_decay=0.0, clip_norm=1.0,
        ),
        288_000, "80 sentence pairs of similar length",
        "Bahdanau et al. 2015, appendix B.2 and table 2 (RNNsearch-50)",
        "Adadelta's steps are small until it has made many updates, so models learn faster with AdamW if the training "
        "has a few thousand steps. Luong et al. 2015: SGD with learning rate 1.0, halved after each epoch from the "
        "fifth, clipping at norm 5, batch size 128.",
    ),
    "attention_rnn_lm": Recipe(
        OptimizerConfig(
            learning_rate=1e-3, schedule="constant", warmup_steps=0, beta1=0.9, beta2=0.999, epsilon=1e-8,
            weight_decay=0.0, clip_norm=5.0,
        ),
        None, "64 rows of 20 tokens",
        "Daniluk et al. 2017, training details of section 3",
        "These values have not been checked a second time against the paper. Lin et al. 2017 (classification): SGD, "
        "with a different learning rate for each data set.",
    ),
    "resnet": Recipe(
        OptimizerConfig(
            name="sgd", learning_rate=0.01, schedule="constant", warmup_steps=0, beta1=0.9, weight_decay=0.0,
            clip_norm=None,
        ),
        None, "128 texts",
        "Conneau et al. 2017 (VDCNN), section 4.2",
        "The paper trains for 10 to 15 epochs of up to 3.6 million texts and does not describe the decay of the "
        "learning rate.",
    ),
    "resnet_lm": Recipe(
        OptimizerConfig(
            name="sgd", learning_rate=1.0, schedule="constant", warmup_steps=0, beta1=0.99, nesterov=True,
            weight_decay=0.0, clip_norm=0.1,
        ),
        None, "750 rows of 20 tokens (Google Billion Word)",
        "Dauphin et al. 2017 (GCNN), section 4.2: a learning rate in [1, 2]",
        "The learning rate is for models with weight normalization. In the paper, the learning rate decays when "
        "validation stops improving.",
    ),
    "alexnet": Recipe(
        OptimizerConfig(
            name="sgd", learning_rate=0.01, schedule="constant", warmup_steps=0, beta1=0.9, weight_decay=0.0,
            clip_norm=None,
        ),
        None, "128 texts",
        "Zhang et al. 2015, section 2.1",
        "The paper halves the learning rate every 3 epochs, 10 times; the number of samples in an epoch depends on the "
        "data set. The causal variant of this family is not from a paper, so it has no published recipe.",
    ),
    "mamba2": Recipe(
        OptimizerConfig(
            learning_rate=3e-3, schedule="cosine", warmup_steps=480, final_fraction=1 / 300, beta1=0.9, beta2=0.95,
            epsilon=1e-8, weight_decay=0.1, clip_norm=1.0,
        ),
        4_800, "0.5 M tokens",
        "Gu & Dao 2023 (Mamba), appendix E.2.1: the improved recipe, for 125 M parameters; Dao & Gu 2024 also use it",
        "The learning rate is 5 times that of GPT-3 for this size, with a cosine decay to 1e-5. The length of the "
        "warm-up (10 % of the training) is our choice. These values have not been checked a second time against the "
        "paper.",
    ),
    "griffin": Recipe(
        OptimizerConfig(
            learning_rate=3e-4, schedule="cosine", warmup_steps=0, final_fraction=0.1, beta1=0.9, beta2=0.95,
            epsilon=1e-8, weight_decay=0.1, clip_norm=1.0,
        ),
        None, "not published",
        "De et al. 2024, section 3.1, names AdamW and no values, so the values are those of llama, without a warm-up",
        "The paper tunes learning rate, weight decay and beta2 at small sizes and extrapolates them. Models with a few "
        "million parameters need about ten times this learning rate.",
    ),
    "gated_deltanet": Recipe(
        OptimizerConfig(
            learning_rate=4e-4, schedule="cosine", warmup_steps=2_000, final_fraction=0.0, beta1=0.9, beta2=0.95,
            epsilon=1e-8, weight_decay=0.1, clip_norm=1.0,
        ),
        200_000, "0.5 M tokens",
        "Yang et al. 2024, section 4 (1.3 B parameters, 100 billion tokens)",
        "These values have not been checked a second time against the paper. The paper states neither the betas nor "
        "epsilon nor the last learning rate. Small models need a larger learning rate.",
    ),
    "xlstm": Recipe(
        OptimizerConfig(
            learning_rate=5e-4, schedule="cosine", warmup_steps=3_000, final_fraction=0.0, beta1=0.99, beta2=0.95,
            epsilon=1e-8, weight_decay=0.1, clip_norm=0.5,
        ),
        550_000, "512 rows of 8,192 tokens",
        "Beck et al. 2025 (xLSTM 7B), section on pre-training",
        "The paper decays the learning rate exponentially, by a factor of 10 in 500,000 steps, and then linearly to 0 "
        "in 7,000 steps; this recipe has a cosine decay. These values have not been checked a second time against the "
        "paper. Small models need a larger learning rate.",
    ),
    "rwkv7": Recipe(
        OptimizerConfig(
            learning_rate=6e-4, schedule="cosine", warmup_steps=10, final_fraction=0.1, beta1=0.9, beta2=0.99,
            epsilon=1e-18, weight_decay=0.001, clip_norm=1.0,
        ),
        182_889, "16 rows of 512 tokens (MiniPile)",
        "RWKV-LM, RWKV-v7/train_temp (the authors' code): demo-training-run.sh, for 191 M parameters",
        "The authors recommend a learning rate of 4e-4 for 0.4 B parameters and 3e-4 for 1.5 B. They double the "
        "learning rate of the decay biases; this recipe does not.",
    ),
}  # fmt: skip
"""The recipe of each family in ``jaxlm.models.registry.FAMILIES``. Other families (``chess_llama``) have no recipe."""


def recipe(family: str) -> OptimizerConfig:
    """The published optimizer settings of a family, for a training of any length.

    The warm-up is the same fraction of the training as in the paper (``warmup_steps`` is below 1). All other values are
    those of :data:`RECIPES`. ``hold_steps`` remains a number of steps. Change values with
    ``dataclasses.replace(recipe(...), learning_rate=...)``.

    For a family without an entry in :data:`RECIPES`, such as a family of another package, the result has the default
    values of ``OptimizerConfig`` (AdamW), with 5 % of the training as warm-up.

    Raises:
        ValueError: the family is unknown.
    """
    if family not in family_names():
        raise ValueError(f"unknown family {family!r}: choose from {', '.join(family_names())}")
    if family not in RECIPES:
        return OptimizerConfig(warmup_steps=0.05)
    published = RECIPES[family]
    warmup = published.optimizer.warmup_steps
    if warmup == 0:
        return published.optimizer
    assert published.steps is not None
    return dataclasses.replace(published.optimizer, warmup_steps=warmup / published.steps)
