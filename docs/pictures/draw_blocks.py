r"""Draw the pictures of the pages in docs/families: one SVG file per family in docs/pictures/families.

    python docs/pictures/draw_blocks.py            draw all pictures
    python docs/pictures/draw_blocks.py gpt lstm   draw some pictures

``PICTURES`` describes each picture. A line is a node or edges:

    KIND NAME COLUMN ROW LABEL   a node: w weights, n norm, m mixes tokens, s state, a elementwise, o circle, t text
    a > b > c                    arrows, from the bottom of a node to the top of the next node or to the side of a
                                 circle; in the same row, from side to side
    a = b                        a dashed arrow from or to a state
    a ~ b @ COLUMN               an arrow around other nodes, along a column, such as a residual connection
    # TEXT                       a line of the caption

``|`` in a label starts a new line. ``*`` is drawn as a multiplication sign.
"""

from __future__ import annotations

import html
import sys
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "families"
COLUMN, ROW, MARGIN = 128, 54, 26
"""Width of a column, height of a row, and the margin of a picture, in pixels."""
LINE, CHARACTER = 15, 6.4
"""Height of a line of text, and mean width of a character, in pixels."""
COLORS = {
    "w": ("#dbe9f9", "#3b6ea5"),
    "n": ("#fdf3c8", "#b58900"),
    "m": ("#fde0c5", "#c8640a"),
    "s": ("#dff3df", "#2e7d32"),
    "a": ("#f1f1f1", "#777777"),
    "o": ("#ffffff", "#333333"),
}
INK = "#222222"

_BERT_BLOCK = """
    n norm0 1 1 LayerNorm
    w qkv 1 2 query, key, value
    m attention 1 3 attention to all tokens
    w output 1 4 linear
    o add1 1 5 +
    n norm1 1 6 LayerNorm
    w up 1 7 linear, GELU
    w down 1 8 linear
    o add2 1 9 +
    n norm2 1 10 LayerNorm
    t y 1 11 x of the next block
    tokens > norm0 > qkv > attention > output > add1 > norm1 > up > down > add2 > norm2 > y
    norm0 ~ add1 @ 0
    norm1 ~ add2 @ 0
"""
"""The nodes and edges of the first block of BERT and RoBERTa. A picture defines the input node ``tokens`` before it."""

PICTURES = {
    "gpt": """
        t x 1 0 x
        n norm1 1 1 LayerNorm
        w qkv 1 2 query, key, value
        m attention 1 3 causal attention
        s cache 2.5 3 keys and values|of earlier tokens
        w output 1 4 linear
        o add1 1 5 +
        n norm2 1 6 LayerNorm
        w up 1 7 linear, GELU
        w down 1 8 linear
        o add2 1 9 +
        t y 1 10 x of the next block
        x > norm1 > qkv > attention > output > add1 > norm2 > up > down > add2 > y
        cache = attention
        x ~ add1 @ 0
        add1 ~ add2 @ 0
        # Block of GPT-2. In GPT-1, the norms are after the sums.
    """,
    "llama": """
        t x 1 0 x
        n norm1 1 1 RMS norm
        w q 0 2 query
        w k 1 2 key
        w v 2 2 value
        a rq 0 3 rotate
        a rk 1 3 rotate
        m attention 1 4 causal attention
        s cache 2.6 4 keys and values|of earlier tokens
        w output 1 5 linear
        o add1 1 6 +
        n norm2 1 7 RMS norm
        w gate 0.4 8 gate, SiLU
        w up 1.6 8 up
        o times 1 9 *
        w down 1 10 down
        o add2 1 11 +
        t y 1 12 x of the next block
        x > norm1 > q > rq > attention
        norm1 > k > rk > attention
        norm1 > v > attention
        attention > output > add1 > norm2 > gate > times
        norm2 > up > times
        times > down > add2 > y
        cache = attention
        x ~ add1 @ -0.75
        add1 ~ add2 @ -0.75
        # Block of Llama. With experts, a router selects a few such MLPs
        # for each token. Gemma 3 also has a norm before each sum.
    """,
    "bert": f"""
        t tokens 1 0 token + position + type vectors
        {_BERT_BLOCK}
        # Input and first block of BERT.
    """,
    "roberta": f"""
        t tokens 1 0 token + position vectors (row t + 2) + type 0
        {_BERT_BLOCK}
        # Input and first block of RoBERTa. The block is that of BERT.
    """,
    "t5": """
        t source 0 0 source
        n enorm1 0 1 RMS norm
        m eattention 0 2 attention to all|source tokens
        a ebias 1.35 2 bias of distances
        o eadd1 0 3 +
        n enorm2 0 4 RMS norm
        w emlp 0 5 MLP
        o eadd2 0 6 +
        n enorm3 0 7 RMS norm
        s keys 0 8 keys and values|of the source
        t target 3 0 target
        n norm1 3 1 RMS norm
        m attention 3 2 causal attention
        a bias 1.35 3 bias of distances
        s cache 4.5 2 keys and values|of earlier tokens
        o add1 3 3 +
        n norm2 3 4 RMS norm
        m cross 3 5 attention to|the source
        o add2 3 6 +
        n norm3 3 7 RMS norm
        w mlp 3 8 MLP
        o add3 3 9 +
        n norm4 3 10 RMS norm
        t y 3 11 to the head
        source > enorm1 > eattention > eadd1 > enorm2 > emlp > eadd2 > enorm3 > keys
        target > norm1 > attention > add1 > norm2 > cross > add2 > norm3 > mlp > add3 > norm4 > y
        cache = attention
        ebias > eattention
        bias ~ attention @ 2.2
        keys ~ cross @ 1.9
        source ~ eadd1 @ -0.8
        eadd1 ~ eadd2 @ -0.8
        target ~ add1 @ 3.9
        add1 ~ add2 @ 3.9
        add2 ~ add3 @ 3.9
        # Encoder (left) and decoder (right). The last norm of each is after all blocks.
        # Attention includes its projections.
    """,
    "xlnet": """
        t h 0 0 content stream h
        s memory 1.6 0 memory: h of earlier tokens
        t g 3.2 0 query stream g
        w q1 0 1 query
        w kv 1.6 1 key, value
        w q2 3.2 1 query
        m attention1 0 2 attention:|order ≤ own order
        m attention2 3.2 2 attention:|order < own order
        a position 1.6 2 distances (sinusoids)
        w output1 0 3 linear
        w output2 3.2 3 linear
        o add1 0 4 +
        o add2 3.2 4 +
        n norm1 0 5 LayerNorm
        n norm2 3.2 5 LayerNorm
        w mlp1 0 6 MLP
        w mlp2 3.2 6 MLP
        o add3 0 7 +
        o add4 3.2 7 +
        n norm3 0 8 LayerNorm
        n norm4 3.2 8 LayerNorm
        t y1 0 9 h of the next block
        t y2 3.2 9 g of the next block
        h > q1 > attention1 > output1 > add1 > norm1 > mlp1 > add3 > norm3 > y1
        g > q2 > attention2 > output2 > add2 > norm2 > mlp2 > add4 > norm4 > y2
        memory = kv
        h > kv
        kv > attention1
        kv > attention2
        position > attention1
        position > attention2
        h ~ add1 @ -0.8
        norm1 ~ add3 @ -0.8
        g ~ add2 @ 4
        norm2 ~ add4 @ 4
        # Both streams have the same weights. Keys and values come from
        # the content stream and the memory.
    """,
    "transformer_xl": """
        s memory 0.3 0 memory: x of|earlier tokens
        t x 1.5 0 x
        w kv 0.3 1 key, value
        w q 1.5 1 query
        w relative 2.9 1 linear
        t distances 2.9 0 distances (sinusoids)
        m attention 1.5 2 causal attention
        w output 1.5 3 linear
        o add1 1.5 4 +
        n norm1 1.5 5 LayerNorm
        w up 1.5 6 linear, ReLU
        w down 1.5 7 linear
        o add2 1.5 8 +
        n norm2 1.5 9 LayerNorm
        t y 1.5 10 x of the next block
        memory = kv
        x > kv > attention
        x > q > attention > output > add1 > norm1 > up > down > add2 > norm2 > y
        distances > relative > attention
        x ~ add1 @ 3.7
        norm1 ~ add2 @ 3.7
        # The memory gets no gradient. With pre_norm,
        # the norms are on the inputs of the sublayers.
    """,
    "lstm": """
        t x 1.5 0 input x
        w gates 1.5 1 x W + h W + b
        s h 3.3 1 h of the token before
        a f 0 2 f: sigmoid
        a i 1 2 i: sigmoid
        a g 2 2 g: tanh
        a o 3 2 o: sigmoid
        s c -1.3 3 c of the token before
        o times1 0 3 *
        o times2 1.5 3 *
        o add 0.75 4 +
        s c2 -1.3 5.1 c of this token
        a tanh 0.75 5 tanh
        o times3 0.75 6 *
        t y 0.75 7 output h, also the state
        x > gates > f > times1 > add
        gates > i > times2
        gates > g > times2 > add
        gates > o > times3
        h = gates
        c = times1
        add = c2
        add > tanh > times3 > y
        # Cell of one layer.
    """,
    "gru": """
        t x 1 0 input x
        w gates 1 1 x W + h W + b
        s h 2.9 1 h of the token before
        a r 0.4 2 r: sigmoid
        a z 1.6 2 z: sigmoid
        w n 0.4 3 n = tanh(x W + b +|r * (h W + b))
        a mix 1 4 (1 - z) n + z h
        t y 1 5 output h, also the state
        x > gates > r > n > mix
        gates > z > mix
        h = gates
        h ~ mix @ 2.9
        mix > y
        # Cell of one layer with reset="after".
        # With "before", n = tanh(x W + b + (r * h) W).
    """,
    "attention_rnn": """
        t source 0.5 0 source
        w forward 0 1 GRU, forward
        w backward 1.1 1 GRU, backward
        s encoded 0.5 2 states e and keys|of the source
        s state 3.7 1 decoder state|before the token
        t y 5 0 target token y
        m align 2.3 2 attention with the state:|context c
        w gru 3.7 3 GRU of y, c and state
        s next 3.7 4 state after the token
        w maxout 2.3 5 maxout of state, y and c
        t head 2.3 6 to the head
        source > forward > encoded
        source > backward > encoded
        encoded = align
        state = align
        state = gru
        align > gru
        align > maxout > head
        y ~ gru @ 5
        y ~ maxout @ 5
        gru = next
        # A step of RNNsearch (Bahdanau). In the form of Luong, LSTMs read y and the last h~,
        # and the state after the token attends.
    """,
    "attention_rnn_lm": """
        t x 1 0 token vector
        w lstm 1 1 LSTM layers
        s state 2.6 1 h and c of each layer
        t y 1 2 output y
        a k 0 3 key part
        a v 1 3 value part
        a p 2 3 prediction part
        m attention 0.5 4 attention to previous outputs
        s memory 2.4 4 keys and values of the|last outputs
        w output 0.5 5 tanh(r R + p X + b)
        t head 0.5 6 to the head
        x > lstm > y > k > attention
        y > v > attention
        y > p
        state = lstm
        memory = attention
        attention > output > head
        p ~ output @ 3.4
        # Language model. With parts=1, the three parts are y itself.
        # The current output is not among the keys.
    """,
    "resnet": """
        t x 1 0 x
        a halve 1 1 halve the length
        w conv1 1 2 convolution, 3 taps
        n norm1 1 3 batch norm
        a relu1 1 4 ReLU
        w conv2 1 5 convolution, 3 taps
        n norm2 1 6 batch norm
        o add 1 7 +
        a relu2 1 8 ReLU
        t y 1 9 x of the next block
        x > halve > conv1 > norm1 > relu1 > conv2 > norm2 > add > relu2 > y
        halve ~ add @ 0
        # The length is halved only in the first block of a group,
        # but not in the first group.
        # The sum exists only with shortcut=True.
    """,
    "resnet_lm": """
        t x 1 0 x
        s tail 2.7 1 last inputs|(kernel - 1)
        w conv 1 1 causal convolution, 2c outputs
        a a 0.5 2 half a
        a gate 1.5 2 half g, sigmoid
        o times 1 3 *
        o add 1 4 +
        a scale 1 5 * sqrt(0.5)
        t y 1 6 x of the next block
        x > conv > a > times
        conv > gate > times
        times > add > scale > y
        tail = conv
        x ~ add @ -0.3
        # Gated convolution. The residual may come from an earlier block.
        # Weights are weight-normalized.
    """,
    "alexnet": """
        t x1 0 0 classifier: characters, reversed
        w conv1 0 1 convolution
        a relu1 0 2 ReLU
        a pool1 0 3 max pooling, stride p
        t more1 0 4 more layers
        w fc1 0 5 two hidden layers
        t y1 0 6 label of the text
        t x2 2.4 0 language model: characters
        w conv2 2.4 1 causal convolution,|dilation d
        s tail1 3.9 1 last inputs
        a relu2 2.4 2 ReLU
        a pool2 2.4 3 causal max pooling,|stride 1, dilation d
        s tail2 3.9 3 last inputs
        t more2 2.4 4 more layers, dilation d p
        w fc2 2.4 5 two hidden layers
        t y2 2.4 6 next character
        x1 > conv1 > relu1 > pool1 > more1 > fc1 > y1
        x2 > conv2 > relu2 > pool2 > more2 > fc2 > y2
        tail1 = conv2
        tail2 = pool2
        # The pooling of a layer exists only if p > 1.
    """,
    "mamba2": """
        t x 1.5 0 u
        n norm1 1.5 1 RMS norm
        w z 0 2 linear: z
        w xi 1 2 linear: x
        w bc 2 2 linear: B, C
        w dt 3 2 linear: dt
        m convx 1 3 conv, SiLU
        m convbc 2 3 conv, SiLU
        a soft 3 3 softplus
        m ssd 1.5 4 SSD (+ D x)
        s state 3.3 5 matrix of each head,|last inputs of conv
        a silu 0 4 SiLU
        o times 1.5 5 *
        n norm2 1.5 6 RMS norm
        w output 1.5 7 linear
        o add 1.5 8 +
        t y 1.5 9 u of the next block
        x > norm1 > z > silu > times
        norm1 > xi > convx > ssd
        norm1 > bc > convbc > ssd
        norm1 > dt > soft > ssd
        state ~ ssd @ 2.2
        ssd > times > norm2 > output > add > y
        x ~ add @ -0.8
        # The only sublayer of a block is this mixer.
    """,
    "griffin": """
        t x 0 0 x
        n norm1 0 1 RMS norm
        m mixer 0 2 mixer
        o add1 0 3 +
        n norm2 0 4 RMS norm
        w mlp 0 5 gated MLP, GELU
        o add2 0 6 +
        t y 0 7 x of the next block
        x > norm1 > mixer > add1 > norm2 > mlp > add2 > y
        x ~ add1 @ -0.8
        add1 ~ add2 @ -0.8
        t in1 2 0 recurrent mixer
        w gate 1.5 1 linear, GELU
        w input 2.5 1 linear
        m conv 2.5 2 causal convolution
        m lru 2.5 3 RG-LRU
        s lstate 3.8 3 h of each channel,|last inputs of conv
        o times 1.5 4 *
        w output1 1.5 5 linear
        in1 > gate > times
        in1 > input > conv > lru > times
        lstate = lru
        times > output1
        t in2 2 6.4 attention mixer
        w q 1.5 7.4 query, rotate
        w kv 2.7 7.4 key, rotate; value
        m attention 2 8.4 attention in a window
        s cache 3.6 8.4 keys and values|of the window
        w output2 2 9.4 linear
        in2 > q > attention
        in2 > kv > attention
        cache = attention
        attention > output2
        # Layer (left) and its two mixers.
    """,
    "gated_deltanet": """
        t x 0 0 x
        n norm1 0 1 RMS norm
        m mixer 0 2 mixer
        o add1 0 3 +
        n norm2 0 4 RMS norm
        w mlp 0 5 SwiGLU or experts
        o add2 0 6 +
        t y 0 7 x of the next block
        x > norm1 > mixer > add1 > norm2 > mlp > add2 > y
        x ~ add1 @ -0.8
        add1 ~ add2 @ -0.8
        t in1 2.6 0 delta rule mixer
        w qkv 1.7 1 query, key, value
        w beta 3 1 beta, decay
        w gate 4 1 gate
        m conv 1.7 2 conv, SiLU
        a l2 1.7 3 L2 norm of q and k
        m rule 2.6 4 gated delta rule
        s state 1.1 4 matrix of each head,|last inputs of conv
        n norm3 2.6 5 RMS norm
        o times1 2.6 6 *
        a silu 4 5 SiLU
        w output1 2.6 7 linear
        in1 > qkv > conv > l2 > rule
        in1 > beta > rule
        in1 > gate > silu > times1
        state = rule
        rule > norm3 > times1 > output1
        t in2 2.9 8.4 attention mixer
        w q 2 9.4 query
        w k 2.9 9.4 key
        w v 3.7 9.4 value
        w gate2 4.4 9.4 gate
        n nq 2 10.4 RMS, rotate
        n nk 2.9 10.4 RMS, rotate
        m attention 2.9 11.4 causal attention
        s cache 1.4 11.4 keys and values
        a sigmoid 4.4 11.4 sigmoid
        o times2 2.9 12.4 *
        w output2 2.9 13.4 linear
        in2 > q > nq > attention
        in2 > k > nk > attention
        in2 > v > attention
        in2 > gate2 > sigmoid > times2
        cache = attention
        attention > times2 > output2
        # Block (left) and its two mixers.
    """,
    "xlstm": """
        t x 0 0 x
        n norm1 0 1 RMS norm
        m mixer 0 2 mixer
        o add1 0 3 +
        n norm2 0 4 RMS norm
        w mlp 0 5 SwiGLU
        o add2 0 6 +
        t y 0 7 x of the next block
        x > norm1 > mixer > add1 > norm2 > mlp > add2 > y
        x ~ add1 @ -0.8
        add1 ~ add2 @ -0.8
        t in1 2.7 0 mLSTM mixer
        w qkv 1.7 1 query, key, value
        w if 2.9 1 gates i, f
        w o 3.9 1 gate o
        a cap 2.9 2 soft cap
        m cell1 2.7 3 mLSTM
        s state1 1.4 3 C, n, m of each head
        n norm3 2.7 4 norm per head
        a sigmoid 3.9 4 sigmoid
        o times 2.7 5 *
        w output1 2.7 6 linear
        in1 > qkv > cell1
        in1 > if > cap > cell1
        in1 > o > sigmoid > times
        state1 = cell1
        cell1 > norm3 > times > output1
        t in2 2.6 7.4 sLSTM mixer
        m conv 2 8.4 conv, SiLU
        w gif 2 9.4 gates i, f
        w gzo 3.2 9.4 gates z, o
        m cell2 2.6 10.4 sLSTM: also reads|its own h
        s state2 4.2 10.4 h, c, n, m;|last inputs of conv
        n norm4 2.6 11.4 norm per head
        in2 > conv > gif > cell2
        in2 > gzo > cell2
        state2 = cell2
        cell2 > norm4
        # Block (left) and its two mixers.
    """,
    "rwkv7": """
        t x 0 0 x
        n norm1 0 1 LayerNorm
        m mixer 0 2 time mix
        o add1 0 3 +
        n norm2 0 4 LayerNorm
        m shift2 0 5 token shift
        w mlp 0 6 linear, ReLU², linear
        o add2 0 7 +
        t y 0 8 x of the next block
        x > norm1 > mixer > add1 > norm2 > shift2 > mlp > add2 > y
        x ~ add1 @ -0.8
        add1 ~ add2 @ -0.8
        t in1 3.2 0 time mix
        m shift 3.2 1 token shift, own weights for each projection
        w r 1.6 2 r
        w k 2.4 2 k
        w v 3.2 2 v
        w w 4 2 decay w
        w a 4.9 2 rate a
        w g 5.8 2 gate g
        a residual 3.2 3 value of block 1
        a keys 4.6 3 key of a, k
        m rule 3.2 4 generalized delta rule
        s state 1.5 5 matrix of each head,|last inputs of the shifts
        n norm3 3.2 5 norm per head
        o add3 3.2 6 +
        t bonus 4.5 6 bonus of r, k, v
        o times 3.2 7 *
        w output 3.2 8 linear
        in1 > shift > r > rule
        shift > k > rule
        shift > v > residual > rule
        shift > w > rule
        shift > a > keys > rule
        shift > g > times
        state = rule
        rule > norm3 > add3 > times > output
        bonus > add3
        # Block (left): time mix and channel mix. Right: the time mix.
    """,
}
"""Family -> description of the picture of its block."""


class Node(NamedTuple):
    """A node, with the position of its center and its size in pixels."""

    kind: str
    lines: list[str]
    x: float
    y: float
    width: float
    height: float

    @property
    def top(self) -> float:
        return self.y - self.height / 2

    @property
    def bottom(self) -> float:
        return self.y + self.height / 2


def parse(text: str) -> tuple[dict[str, Node], list[tuple[str, str, str, float]], list[str]]:
    """The nodes, the edges (kind ``>``, ``=`` or ``~``, source, target, column) and the lines of the caption.

    The column is that of a ``~`` edge; other edges have 0.
    """
    nodes: dict[str, Node] = {}
    edges: list[tuple[str, str, str, float]] = []
    caption: list[str] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        words = line.split()
        if words[0] == "#":
            caption.append(line[2:])
        elif words[1] in (">", "="):
            edges += [(words[1], source, target, 0.0) for source, target in zip(words[::2], words[2::2], strict=False)]
        elif words[1] == "~":
            edges.append(("~", words[0], words[2], float(words[4])))
        else:
            lines = line.split(None, 4)[4].split("|")
            width = 24.0 if words[0] == "o" else max(map(len, lines)) * CHARACTER + (4 if words[0] == "t" else 18)
            height = 24.0 if words[0] == "o" else len(lines) * LINE + (4 if words[0] == "t" else 12)
            nodes[words[1]] = Node(words[0], lines, float(words[2]) * COLUMN, float(words[3]) * ROW, width, height)
    return nodes, edges, caption


def route(kind: str, a: Node, b: Node, column: float) -> list[tuple[float, float]]:
    """The points of the line from node ``a`` to node ``b``. All coordinates and ``column`` are in pixels."""
    if kind == "~":
        start = [(a.x, a.bottom), (a.x, a.bottom + 7)] if b.y > a.y else [(a.x + side(a, column), a.y)]
        end_y = b.y
        return [*start, (column, start[-1][1]), (column, end_y), (b.x + side(b, column), end_y)]
    if a.y == b.y or (kind == "=" and abs(a.y - b.y) < b.height / 2):
        return [(a.x + side(a, b.x), a.y), (b.x + side(b, a.x), a.y)]
    if b.y < a.y:
        return [(a.x, a.top), (a.x, b.bottom)] if a.x == b.x else [(a.x, a.top), (a.x, b.y), (b.x + side(b, a.x), b.y)]
    if a.x == b.x:
        return [(a.x, a.bottom), (b.x, b.top)]
    if b.kind == "o":
        return [(a.x, a.bottom), (a.x, b.y), (b.x + side(b, a.x), b.y)]
    middle = b.top - 12
    return [(a.x, a.bottom), (a.x, middle), (b.x, middle), (b.x, b.top)]


def side(node: Node, x: float) -> float:
    """The x offset from the center of a node to its right side if ``x`` is to the right, else to its left side."""
    return node.width / 2 if x > node.x else -node.width / 2


def draw(name: str) -> str:
    """The picture ``name`` as the text of an SVG file."""
    nodes, edges, caption = parse(PICTURES[name])
    columns = [column * COLUMN for kind, _, _, column in edges if kind == "~"]
    left = min([node.x - node.width / 2 for node in nodes.values()] + columns) - MARGIN
    right = max([node.x + node.width / 2 for node in nodes.values()] + columns) + MARGIN
    caption_width = max(map(len, caption)) * CHARACTER + 2 * MARGIN
    extra = max(0.0, caption_width - (right - left)) / 2
    left, right = left - extra, right + extra
    top = min(node.top for node in nodes.values()) - MARGIN
    bottom = max(node.bottom for node in nodes.values()) + MARGIN + LINE * len(caption)
    width, height = right - left, bottom - top
    title = _escape(" ".join(caption))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="{left:.0f} {top:.0f} {width:.0f} {height:.0f}" role="img" font-family="sans-serif" font-size="12">',
        f"<title>{name}: {title}</title>",
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="3.5" orient="auto">'
        f'<path d="M0,0 L7,3.5 L0,7 Z" fill="{INK}"/></marker></defs>',
        f'<rect x="{left:.0f}" y="{top:.0f}" width="{width:.0f}" height="{height:.0f}" rx="10" fill="#ffffff"/>',
    ]
    for kind, source, target, column in edges:
        corners = route(kind, nodes[source], nodes[target], column * COLUMN)
        path = " L".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        is_state = kind == "=" or (kind == "~" and nodes[source].kind == "s")
        dashes = ' stroke-dasharray="4 3"' if is_state else ""
        parts.append(f'<path d="M{path}" fill="none" stroke="{INK}"{dashes} marker-end="url(#tip)"/>')
    for node in nodes.values():
        x, y = node.x - node.width / 2, node.top
        if node.kind == "o":
            parts.append(f'<circle cx="{node.x:.1f}" cy="{node.y:.1f}" r="12" fill="#ffffff" stroke="{INK}"/>')
        elif node.kind != "t":
            fill, stroke = COLORS[node.kind]
            dashes = ' stroke-dasharray="4 3"' if node.kind == "s" else ""
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{node.width:.1f}" height="{node.height:.1f}" rx="5" '
                f'fill="{fill}" stroke="{stroke}"{dashes}/>'
            )
        parts += [
            _text(line, node.x, node.y + LINE * (i - (len(node.lines) - 1) / 2)) for i, line in enumerate(node.lines)
        ]
    for i, line in enumerate(caption):
        parts.append(_text(line, (left + right) / 2, bottom - MARGIN / 2 - LINE * (len(caption) - 1 - i), "#555555"))
    return "\n".join([*parts, "</svg>", ""])


def _escape(text: str) -> str:
    return html.escape(text).replace("*", "\u00d7")


def _text(line: str, x: float, y: float, color: str = INK) -> str:
    return f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle" fill="{color}">{_escape(line)}</text>'


if __name__ == "__main__":
    if unknown := sorted(set(sys.argv[1:]) - set(PICTURES)):
        sys.exit(f"no picture {', '.join(unknown)}: choose from {', '.join(PICTURES)}")
    for picture in sys.argv[1:] or PICTURES:
        (FOLDER / f"{picture}.svg").write_text(draw(picture), encoding="utf-8")
