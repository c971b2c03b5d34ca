"""Chat templates: which one renders the policy's prompts."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from c2f_ray.errors import RecipeError

# For base models: no special tokens but the beginning of the text.
PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def chat_template(setting: str, tokenizer: PreTrainedTokenizerBase, key: str = "policy.chat_template") -> str:
    """The Jinja source that `setting` names: `model`, `plain`, or a path. Raises RecipeError naming `key`."""
    if setting == "plain":
        return PLAIN_TEMPLATE
    if setting != "model":
        path = Path(setting)
        if not path.is_file():
            raise RecipeError(f"{key}: {setting}: no such file; give `model`, `plain`, or a .jinja file")
        return path.read_text(encoding="utf-8")
    if not isinstance(tokenizer.chat_template, str):
        raise RecipeError(
            f"{key}: the tokenizer of {tokenizer.name_or_path} has no chat template; "
            "set it to `plain` for a base model, or to a .jinja file"
        )
    return tokenizer.chat_template


def render(tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, str]]) -> str:
    """The prompt text that asks for the assistant's next message."""
    text = tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, tokenize=False)
    assert isinstance(text, str)
    return text
