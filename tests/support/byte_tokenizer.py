"""A tokenizer.json for random models: one token per byte, then filler, so that every id of the vocabulary decodes."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def write_byte_tokenizer(directory: Path, vocab_size: int) -> None:
    """Ids 0 and 1 are bos and eos, the next 256 are bytes, the rest `<|n|>` strings."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<bos>", "<eos>", *alphabet, *(f"<|{n}|>" for n in range(258, vocab_size))]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
