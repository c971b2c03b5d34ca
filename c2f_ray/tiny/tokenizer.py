"""Two word-level tokenizers over the same texts: the policy's, and another that the reward model brings along.

They differ in ids, special tokens and template, as a policy's and an UltraRM's do, so ids of one mean nothing to the
other. Both give back exactly the text they were given, as long as it is made of the task's words.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from c2f_ray.tiny.settings import CHAT_TEMPLATE
from c2f_ray.tiny.task import CHECK, DIGITS, LETTERS

# `x=` is one token, so that a letter's entry is found by looking for that very token: an induction head can.
WORDS = [
    "\n", ",", "?", " ", "Q:", "A:", "so ", CHECK,
    *LETTERS, *(f"{letter}=" for letter in LETTERS), *DIGITS,
]  # fmt: skip
REWARD_WORDS = ["Human:", "Assistant:"]
END_OF_TEXT = "<|endoftext|>"
PAIR_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}Assistant: {{ message['content'] }}{{ eos_token }}"
    "{% else %}Human: {{ message['content'] }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
UNKNOWN = "<unk>"


def policy_tokenizer(with_template: bool) -> PreTrainedTokenizerFast:
    """The policy's tokenizer: no bos; end-of-text (id 0) is eos and pad. The instruct model's carries the template."""
    tokenizer = _word_level([END_OF_TEXT, UNKNOWN, *WORDS], special=[END_OF_TEXT, UNKNOWN])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=256,
        chat_template=CHAT_TEMPLATE if with_template else None,
    )


def reward_tokenizer() -> PreTrainedTokenizerFast:
    """The reward models' tokenizer with UltraRM's special ids (pad 0, bos 1, eos 2); it adds bos by itself.

    Its template is for the Mixtral pair.
    """
    half = len(WORDS) // 2
    words = [*REWARD_WORDS, *WORDS[half:], *WORDS[:half]]  # rotated, so that no word keeps its id
    tokenizer = _word_level([UNKNOWN, "<s>", "</s>", *words], special=[UNKNOWN, "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token=UNKNOWN,  # id 0, as Llama's vocabulary has it
        unk_token=UNKNOWN,
        padding_side="right",
        model_max_length=256,
        chat_template=PAIR_TEMPLATE,
    )


def reward_text(content: str, response: str) -> str:
    """UltraRM's conversation shape, with the single newline that ReMax used."""
    return f"Human: {content}\nAssistant: {response}"


def _word_level(vocabulary: list[str], special: list[str]) -> Tokenizer:
    """Words are split off longest first; decoding joins them without spaces."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    words = sorted((word for word in vocabulary if word not in special), key=len, reverse=True)
    pattern = "|".join(word.replace("?", r"\?") for word in words)
    # A special token that is spelled in plain text is no word: it falls apart, as in real tokenizers.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), pre_tokenizers.Split("<", behavior="isolated")]
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return tokenizer
