"""A byte-level transformer that spells numbers in English adapts, through LoRA on every matrix, to German; stacked.

The text is made here: numbers below 1000 in words, in random order. Numbers that end in 7 are held out.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, layer_norm, scaled_dot_product_attention

ENGLISH = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
GERMAN = (
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn"
)
TENS = {
    "English": "twenty thirty forty fifty sixty seventy eighty ninety".split(),
    "German": "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split(),
}
SMALL = {"English": [*ENGLISH.split(), "eighteen", "nineteen"], "German": [*GERMAN.split(), "achtzehn", "neunzehn"]}
ALPHABET = sorted(set(" -abcdefghijklmnopqrstuvwxyzßöü".encode()))  # the bytes in use
LENGTH = 24  # bytes that the transformer sees
MATRICES = ("query", "key", "value", "output", "up", "down")


def words(n: int, language: str) -> str:
    """The number n < 1000."""
    small, tens = SMALL[language], TENS[language]
    if n >= 100:
        rest = words(n % 100, language) if n % 100 else ""
        if language == "English":
            return f"{small[n // 100]} hundred" + (f" and {rest}" if rest else "")
        return f"{small[n // 100].removesuffix('s') if n < 200 else small[n // 100]}hundert{rest}"
    if n < 20 or n % 10 == 0:
        return small[n] if n < 20 else tens[n // 10 - 2]
    ten, one = tens[n // 10 - 2], small[n % 10]
    return f"{ten}-{one}" if language == "English" else f"{'ein' if one == 'eins' else one}und{ten}"


def text(language: str, held_out: bool, numbers: int = 4000) -> Tensor:
    """Numbers in random order as one tensor of bytes."""
    some = torch.tensor([n for n in range(1000) if (n % 10 == 7) == held_out])
    drawn = some[torch.randint(len(some), (numbers,), generator=torch.Generator().manual_seed(int(held_out)))]
    return torch.tensor(
        [ALPHABET.index(byte) for byte in " ".join(words(n, language) for n in drawn.tolist()).encode()]
    )


class Spelling:
    """The frozen transformer and scale · BA beside each of its matrices; interface and members as adaptation.Images.

    Blocks of causal attention and a GELU layer, normalized before, without gains or biases; bytes in and out.
    """

    def __init__(self, width=32, heads=4, depth=2, scale=1.0):
        self.width, self.heads, self.scale = width, heads, scale
        sizes = dict.fromkeys(MATRICES, (width, width)) | {"up": (2 * width, width), "down": (width, 2 * width)}
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

        self.weights = [normal(*sizes[name]) for _ in range(depth) for name in MATRICES]
        letters = len(ALPHABET)
        self.outer = [normal(letters, width), 0.3 * normal(LENGTH, width), normal(letters, width)]
        self.shapes, self.device = [tuple(W.shape) for W in self.weights], torch.device("cpu")  # it is small
        self.text, self.text_test = (text("German", held_out) for held_out in (False, True))

    def pretrained(self, steps: int):
        """Train all weights on English by Adam (3e-3, batch 32); return self."""
        leaves, english = [*self.weights, *self.outer], text("English", False)
        optimizer = torch.optim.Adam([W.requires_grad_() for W in leaves], 3e-3)
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            x, y = windows(english, (1, 32), generator)
            optimizer.zero_grad()
            self._loss([], x, y).sum().backward()
            optimizer.step()
        for W in leaves:
            W.requires_grad_(False)
        return self

    def batches(self, seeds: list, size: int, steps: int):
        """Yield `steps` mini-batches: bytes x and the next bytes y, (S, size, LENGTH)."""
        generators = [torch.Generator().manual_seed(1_000_000 + seed) for seed in seeds]
        for _ in range(steps):
            yield [torch.stack(z) for z in zip(*(windows(self.text, (size,), g) for g in generators))]

    def gradients(self, pairs: list, batch: tuple) -> tuple:
        """Losses (E,) and gradients [(E, r, d_in + d_out), …] of the pairs [(A, Bᵀ), …]."""
        leaves = [tuple(factor.detach().requires_grad_() for factor in pair) for pair in pairs]
        loss = self._loss(leaves, *batch)
        found = iter(torch.autograd.grad(loss.sum(), [factor for pair in leaves for factor in pair]))
        return loss.detach(), [torch.cat(pair, -1) for pair in zip(found, found)]

    @torch.no_grad()
    def held_out(self, pairs: list) -> Tensor:
        """Loss on 200 windows of held-out numbers, (E,)."""
        x, y = windows(self.text_test, (1, 200), torch.Generator().manual_seed(0))
        return self._loss(pairs, x, y)

    def _loss(self, pairs, x, y):
        E, (S, n, T) = len(pairs[0][0]) if pairs else len(x), x.shape
        h = (self.outer[0][x] + self.outer[1]).repeat_interleave(E // S, 0).view(E, n * T, -1)

        def linear(m, h):
            z = h @ self.weights[m].T
            return torch.baddbmm(z, h @ pairs[m][0].mT, pairs[m][1], alpha=self.scale) if pairs else z

        for m in range(0, len(self.weights), len(MATRICES)):
            z = layer_norm(h, (self.width,))
            q, k, v = (linear(m + i, z).view(E * n, T, self.heads, -1).transpose(1, 2) for i in range(3))
            z = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(E, n * T, -1)
            h = h + linear(m + 3, z)
            h = h + linear(m + 5, gelu(linear(m + 4, layer_norm(h, (self.width,)))))
        logits = layer_norm(h, (self.width,)) @ self.outer[2].T
        y = y.repeat_interleave(E // S, 0).view(E, -1)
        return cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(E, -1).mean(1)


def windows(text, shape, generator):
    """Windows of LENGTH bytes and of the bytes that follow each, (*shape, LENGTH), at random places."""
    place = torch.randint(len(text) - LENGTH - 1, shape, generator=generator).unsqueeze(-1) + torch.arange(LENGTH)
    return text[place], text[place + 1]
