"""A small tokenizer for captions of emoji scenes, in the files of transformers' CLIPTokenizer.

    python -m afa_jax.data.emoji.tokenizer --out DIR

Byte-pair encoding, learnt until every word that a caption can hold is one token. Its alphabet is a-z, 0-9 and ,.'-;
any other character is unknown, which for CLIP means the id of <|endoftext|>. The result lies next to this file:

    transformers.CLIPTokenizer.from_pretrained(TOKENIZER_DIR)
"""

import argparse
import itertools
import json
import string
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from afa_jax.data.emoji.vocabulary import HERE, Vocabulary, read_vocabulary

TOKENIZER_DIR = HERE / "tokenizer"
ALPHABET = string.ascii_lowercase + string.digits + ",.'-"
END = "</w>"  # marks a word's last token
START_OF_TEXT = "<|startoftext|>"
END_OF_TEXT = "<|endoftext|>"
MAX_LENGTH = 16


def count_words(vocabulary: Vocabulary) -> Counter[str]:
    """Count how often a word stands in the names, and the words of the captions around them."""
    names = [subject.name for subject in vocabulary.subjects] + [style.name for style in vocabulary.styles]
    return Counter(word for name in [*names, "and", "style"] for word in name.split())


def learn_merges(words: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the merges, in order, that make a single token of each word.

    Each joins the most frequent pair of neighbours; of equals, the first in the alphabet, so that there is no chance.

    Args:
        words: the count of each word; words have characters of ALPHABET only.

    Raises:
        ValueError: if a word has other characters, naming the word.
    """
    if foreign := [word for word in words if not set(word) <= set(ALPHABET)]:
        raise ValueError(f"words {foreign} have characters beyond {ALPHABET}; change their names in vocabulary.json")
    tokens = {word: [*word[:-1], word[-1] + END] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in tokens.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        tokens = {word: _join(parts, best) if best[0] in parts else parts for word, parts in tokens.items()}


def write_tokenizer(out: Path, merges: list[tuple[str, str]]) -> None:
    """Write vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json into the folder `out`."""
    # CLIP's order: the alphabet, the alphabet at a word's end, the merges, the special tokens.
    tokens = [*ALPHABET, *(letter + END for letter in ALPHABET), *map("".join, merges), START_OF_TEXT, END_OF_TEXT]
    # Two ways to the same token ("a" + "bc", "ab" + "c") are two merges but one entry.
    ids = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    special = {
        "bos_token": START_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
    }
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH, "do_lower_case": True, **special}
    config["whole_words"] = True  # read by afa_jax.weights.tokenizer.tokenizer: the vocabulary is closed
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "vocab.json", json.dumps(ids, indent=0))
    _write(out / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges)]))
    _write(out / "tokenizer_config.json", json.dumps(config, indent=2))
    _write(out / "special_tokens_map.json", json.dumps(special, indent=2))


def _join(parts: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the tokenizer's files into")
    out = parser.parse_args().out
    merges = learn_merges(count_words(read_vocabulary()))
    write_tokenizer(out, merges)
    print(f"wrote a tokenizer of {len(merges)} merges to {out}")


if __name__ == "__main__":
    main()
