"""A tokenizer for dye checkpoints: token 17 is the word "t17"."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from moetrace.conformance.dye.form import DyeForm

_CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
"""Contents and nothing else: there are no words for roles."""


def word_tokenizer(form: DyeForm) -> PreTrainedTokenizerFast:
    """The tokenizer of a form; a word that is no token is an error of the tokenizer."""
    words = {f"t{token}": token for token in range(form.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    eos = None if form.eos_token_id is None else f"t{form.eos_token_id}"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, chat_template=_CHAT)
